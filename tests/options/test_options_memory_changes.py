"""Which options save memory, and in what order they are tried."""

import pytest

from library.options.groups.forecast import parse_memory
from library.options.memory_changes import levels, no_swapping
from library.options.parse import parse
from library.options.scripts import SdxlTrainNetworkOptions, SdxlTrainOptions, TrainingOptions

FILES = ["--pretrained_model_name_or_path", ".", "--train_data_dir", ".", "--resolution", "64", "--output_dir", "o"]
NETWORK = [*FILES, "--network_module", "networks.lora", "--network_train_unet_only"]


def tried(options: TrainingOptions, *, keeps_the_run: bool) -> list[str]:
    return [" ".join(each.flags for each in changes) for _, changes in levels(options, keeps_the_run=keeps_the_run)]


def test_the_cheapest_comes_first_and_what_is_given_is_left_out() -> None:
    options = parse(SdxlTrainNetworkOptions, [*NETWORK, "--cache_latents", "--gradient_checkpointing"])
    found = tried(options, keeps_the_run=False)
    assert found[0] == "--cache_text_encoder_outputs"
    assert found[1] == "--cache_text_encoder_outputs --optimizer_type AdamW8bit"
    assert found[2].endswith("--optimizer_states host")
    assert found[3].endswith("--offload_fraction 0.3") and "checkpoint" not in " ".join(found)
    assert found[-1].endswith("--offload_fraction 0.9 --base_quant nf4")


def test_a_budget_changes_neither_what_is_trained_nor_what_it_is_trained_on() -> None:
    found = tried(parse(SdxlTrainNetworkOptions, NETWORK), keeps_the_run=True)
    assert "cache" not in " ".join(found) and found[0] == "--optimizer_type AdamW8bit"


def test_only_what_goes_together_is_tried() -> None:
    whole = parse(SdxlTrainOptions, FILES)
    kept = tried(whole, keeps_the_run=True)
    assert not any("quant" in each or each.startswith("--fused") for each in kept)
    assert kept[-1].endswith("--optimizer_states host --fused_backward_pass --offload_fraction 0.9") and no_swapping(whole) is None
    more = tried(whole, keeps_the_run=False)
    assert any("--fused_backward_pass --gradient_checkpointing" in each for each in more)
    assert all(each.count("--fused_backward_pass") <= 1 for each in more)


def test_why_trained_blocks_cannot_be_swapped_is_said() -> None:
    adds_up = parse(SdxlTrainOptions, [*FILES, "--gradient_accumulation_steps", "2"])
    assert not any("offload" in each for each in tried(adds_up, keeps_the_run=True))
    assert "--gradient_accumulation_steps 2 has nothing" in (no_swapping(adds_up) or "")
    assert no_swapping(parse(SdxlTrainNetworkOptions, NETWORK)) is None


def test_levels_have_what_their_changes_say() -> None:
    options, changes = list(levels(parse(SdxlTrainNetworkOptions, NETWORK), keeps_the_run=True))[2]
    assert changes[-1].flags == "--gradient_checkpointing"
    assert options.precision.gradient_checkpointing and options.precision.checkpoint_fraction == 1
    assert options.optimizer.optimizer_type == "AdamW8bit"


@pytest.mark.parametrize(("text", "gib"), [("8GB", 8), ("7.5 GiB", 7.5), ("6", 6), ("10g", 10)])
def test_a_size_is_read_in_gib(text: str, gib: float) -> None:
    assert parse_memory(text) == gib * 2**30


@pytest.mark.parametrize("text", ["", "0", "8 MB", "-1", "much"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 8GB"):
        parse_memory(text)
