"""From a command line and a configuration file to options: precedence, oddities, and every mistake at once."""

import logging
import tomllib

import pytest

from library.options.errors import UsageError
from library.options.parse import parse
from library.options.scripts import CacheLatentsOptions, SdxlGenImgOptions, SdxlTrainNetworkOptions

ESSENTIALS = [
    "--pretrained_model_name_or_path", "owner/model", "--train_data_dir", "d",
    "--output_dir", "o", "--network_module", "networks.lora",
]  # fmt: skip


def train(*argv):
    return parse(SdxlTrainNetworkOptions, [*ESSENTIALS, *argv])


def mistakes(*argv, script=SdxlTrainNetworkOptions):
    with pytest.raises(UsageError) as error:
        parse(script, [*ESSENTIALS, *argv] if script is SdxlTrainNetworkOptions else argv)
    assert error.value.exit_status == 2
    return list(error.value.problems)


@pytest.fixture
def config(tmp_path):
    def write(text, name="run.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_every_mistake_of_command_line_and_file_is_told_at_once(config):
    path = config('network_dim = "many"\ncaption_dropout_rate = 3\n')
    told = mistakes(
        "--lernig_rate", "1", "--mixed_precision", "fp61", "--resolution", "1,2,3", "--adaptive_noise_scale", "1",
        "--config_file", path,
    )  # fmt: skip
    expected = [
        "--lernig_rate",
        "--mixed_precision",
        "network_dim in",
        "caption_dropout_rate in",
        "--resolution",
    ]
    assert len(told) == 6
    assert all(any(words in problem for problem in told) for words in expected)
    assert "--adaptive_noise_scale changes the noise offset, so it needs --noise_offset above 0." in told


def test_a_mistake_that_only_follows_from_another_is_not_told():
    assert len(mistakes("--noise_offset", "abc", "--adaptive_noise_scale", "1")) == 1
    told = [problem for problem in mistakes("--outputdir", "x", script=SdxlTrainNetworkOptions) if "output_dir" in problem]
    assert told == ["--outputdir is not an option. Did you mean --output_dir?"]


def test_missing_essentials_are_told_before_anything_is_loaded():
    with pytest.raises(UsageError) as error:
        parse(SdxlTrainNetworkOptions, [])
    told = str(error.value)
    for name in ("--pretrained_model_name_or_path", "--output_dir", "--network_module", "--dataset_config"):
        assert name in told


def test_what_was_typed_wins_over_the_file_and_the_file_over_the_default(config):
    path = config("seed = 5\nnetwork_dim = 8\nnetwork_args = ['conv_dim=4']\n[more]\nseed = 7\n")
    options = train("--config_file", path, "--network_dim", "16")
    assert (options.length.seed, options.network.network_dim, options.network.network_alpha) == (7, 16, 1)
    assert options.network.network_args == ("conv_dim=4",)


def test_typing_the_default_overrides_the_file(config):
    path = config("max_train_steps = 5\nmixed_precision = 'bf16'")
    assert train("--config_file", path, "--max_train_steps", "1600").length.max_train_steps == 1600


def test_the_ending_of_the_configuration_file_may_be_left_out(config):
    path = config("seed = 5", "v1.5.toml")
    assert train("--config_file", path.removesuffix(".toml")).length.seed == 5


def test_unknown_keys_of_the_file_are_warned_about_with_the_nearest_name(config, caplog):
    path = config("lernig_rate = 1\nblock_lr = '1'\nsdxl = true\nxyzzy = 1\n[more]\nnetwork = {dim = 4}\n")
    with caplog.at_level(logging.INFO):
        train("--config_file", path)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    quiet = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(warnings) == 3
    assert f"lernig_rate in {path} is not an option. Did you mean learning_rate? It is ignored." in warnings
    assert quiet == ["Keys of the configuration file that are for other scripts: block_lr, sdxl"]


@pytest.mark.parametrize("strict", ["typed", "in_file"])
def test_unknown_keys_are_fatal_when_asked_for_but_keys_of_other_scripts_are_not(config, strict):
    path = config("lernig_rate = 1\nblock_lr = '1'\n" + ("strict_config = true\n" if strict == "in_file" else ""))
    assert mistakes("--config_file", path, *(["--strict_config"] if strict == "typed" else [])) == [
        f"lernig_rate in {path} is not an option. Did you mean learning_rate?"
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"seed = ", "is not valid TOML"), (b"output_name = '\xff'", "is not UTF-8 (byte 15)"), (None, "there is no file")],
)
def test_a_configuration_file_that_cannot_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    (told,) = mistakes("--config_file", str(path))
    assert words in told
    assert str(path) in told


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 5")
    assert train("--config_file", str(path)).length.seed == 5


def test_written_options_are_read_back_the_same_without_secrets_and_defaults(tmp_path, config):
    path = tmp_path / "run.toml"
    typed = [
        "--seed", "5", "--lr_warmup_steps", "10%", "--text_encoder_lr", "1e-4", "2e-4", "--dataset_config", "ü.toml",
        "--enable_bucket", "--resolution", "832,1216", "--network_dim", "8", "--max_train_steps", "1600",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        train(*typed, "--wandb_api_key", "k", "--huggingface_token", "t", "--config_file", str(path), "--output_config")
    assert ended.value.code == 0
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    assert written["dataset_config"] == "ü.toml"
    assert not {"wandb_api_key", "huggingface_token", "config_file", "output_config", "max_train_steps"} & written.keys()
    again, direct = parse(SdxlTrainNetworkOptions, ["--config_file", str(path)]), train(*typed)
    assert all(getattr(again, topic) == getattr(direct, topic) for topic in SdxlTrainNetworkOptions.groups() if topic != "config")


def test_an_existing_file_is_not_overwritten(config):
    path = config("seed = 5")
    (told,) = mistakes("--seed", "6", "--config_file", path, "--output_config")
    assert "exists already" in told
    with open(path) as file:
        assert file.read() == "seed = 5"


def test_writing_needs_a_name_and_correct_values(tmp_path):
    assert mistakes("--output_config") == ["--output_config needs --config_file, the name of the file to write."]
    path = tmp_path / "run.toml"
    assert len(mistakes("--output_config", "--config_file", str(path), "--seed", "x")) == 1
    assert not path.exists()


def test_help_is_shown_by_topic_and_ends_well(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(SdxlGenImgOptions, ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Prompts and output:" in shown
    assert "--images_per_prompt N" in shown


def test_a_caching_tool_takes_a_training_command_line_and_says_what_does_nothing(caplog):
    argv = [
        "--pretrained_model_name_or_path",
        "owner/model",
        "--train_data_dir",
        "d",
        "--sdxl",
        "--loss_type",
        "l1",
        "--torch_compile",
    ]
    with caplog.at_level(logging.INFO):
        parse(CacheLatentsOptions, argv)
    assert caplog.messages == ["Options for training that do nothing in tools/cache_latents.py: loss_type, torch_compile"]


def test_a_script_may_add_problems_to_the_same_report():
    def further(options):
        assert options.length.seed is None
        yield "the dataset is empty"
        yield "--seed is odd"

    with pytest.raises(UsageError) as error:
        parse(SdxlTrainNetworkOptions, [*ESSENTIALS, "--seed", "x"], further)
    assert list(error.value.problems) == ["--seed: 'x' is not a whole number.", "the dataset is empty"]


def test_implied_options_are_switched_on():
    options = train("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--caption_extention", "txt")
    assert options.cache.cache_latents
    assert options.cache.cache_text_encoder_outputs
    assert options.caption.caption_extension == ".txt"
    assert train("--caption_extension", "txt").caption.caption_extension == ".txt"


@pytest.mark.parametrize(("text", "size"), [("1024", (1024, 1024)), ("832,1216", (832, 1216)), ("832, 1216", (832, 1216))])
def test_a_resolution_is_one_number_or_two(text, size):
    assert train("--resolution", text).dataset.size == size


@pytest.mark.parametrize("text", ["0", "1,2,3", "a", "1024x1024", "-5,5", "1024,"])
def test_another_resolution_is_refused_with_an_example(text):
    (told,) = mistakes(f"--resolution={text}")
    assert told.startswith(f"--resolution: {text!r} is not usable")
    assert "832,1216" in told
