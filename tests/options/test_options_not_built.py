"""An option whose feature does not exist is refused by name; nothing is accepted and then ignored."""

import pytest

from library.options.effects import effective_options
from library.options.errors import UsageError
from library.options.not_built import NOT_BUILT
from library.options.parse import parse
from library.options.record import Kind, Option, options_of
from library.options.scripts import SCRIPTS, CacheTextEncoderOutputsOptions, SdxlTrainNetworkOptions

_DATA = "--pretrained_model_name_or_path owner/model --train_data_dir d"
ESSENTIALS = {
    "sdxl_train.py": f"{_DATA} --output_dir o",
    "sdxl_train_network.py": f"{_DATA} --output_dir o --network_module networks.lora",
    "sdxl_train_textual_inversion.py": f"{_DATA} --output_dir o --token_string mychar",
    "sdxl_train_control_net.py": f"{_DATA} --output_dir o",
    "sdxl_train_control_net_lllite.py": f"{_DATA} --output_dir o --cond_emb_dim 32 --network_dim 64",
    "sdxl_gen_img.py": "--ckpt m --prompt cat",
    "tools/cache_latents.py": _DATA,
    "tools/cache_text_encoder_outputs.py": _DATA,
}


def another_value(option: Option) -> list[str]:
    """Type a value that differs from the default and is in range."""
    if option.kind is Kind.FLAG:
        return [option.flag]
    if option.choices:
        return [option.flag, str(next(choice for choice in option.choices if choice != option.default))]
    candidates = ["2", "1", "0.25", "2,4"]
    options = [text for text in candidates if text != str(option.default)]
    if option.comma_list:
        return [option.flag, "2,4"]
    for text in options:
        try:
            number = float(text)
        except ValueError:
            continue
        fits = (option.ge is None or number >= option.ge) and (option.le is None or number <= option.le)
        if fits and number != option.default:
            return [option.flag, text]
    return [option.flag, "1"]


CASES = [(script, name) for script in SCRIPTS for name in options_of(script) if name in NOT_BUILT]


@pytest.mark.parametrize(("script", "name"), CASES, ids=lambda value: getattr(value, "script", value))
def test_an_option_that_is_not_built_is_refused_where_it_would_matter(script, name):
    argv = [*ESSENTIALS[script.script].split(), *another_value(options_of(script)[name])]
    if name not in effective_options(script):
        parse(script, argv)
        return
    with pytest.raises(UsageError) as error:
        parse(script, argv)
    assert list(error.value.problems) == [f"--{name} is not built yet in this version: {NOT_BUILT[name]}. Leave it out."]


def test_the_list_names_only_options_that_exist_and_would_have_an_effect():
    matters = {name for script in SCRIPTS for name in effective_options(script)}
    assert NOT_BUILT.keys() <= matters


def test_effective_options_exist():
    for script in SCRIPTS:
        assert effective_options(script) <= options_of(script).keys()


def test_the_default_of_an_option_that_is_not_built_is_accepted():
    argv = [
        *ESSENTIALS["sdxl_train_network.py"].split(),
        "--dynamo_backend",
        "inductor",
        "--zero_stage",
        "2",
        "--token_warmup_min",
        "1",
    ]
    parse(SdxlTrainNetworkOptions, argv)


def test_an_option_that_is_not_built_is_refused_in_a_configuration_file_with_its_place(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("flux = true\nmasked_loss = false\n")
    with pytest.raises(UsageError) as error:
        parse(CacheTextEncoderOutputsOptions, [*ESSENTIALS["tools/cache_latents.py"].split(), "--config_file", str(path)])
    (told,) = error.value.problems
    assert told.startswith(f"flux in {path} is not built yet in this version: only SDXL models are supported.")
