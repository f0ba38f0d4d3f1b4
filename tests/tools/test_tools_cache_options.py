"""What the caching tools take of a training command line."""

from pathlib import Path

import pytest

from library.options.parse import parse
from library.options.scripts import CacheLatentsOptions, CacheTextEncoderOutputsOptions
from tools import cache_latents, cache_text_encoder_outputs


@pytest.mark.parametrize("tool", ["latents", "texts"])
def test_the_tools_hold_out_what_training_holds_out(tmp_path: Path, tool: str) -> None:
    (tmp_path / "data" / "2_cats").mkdir(parents=True)
    model = tmp_path / "model.safetensors"
    model.touch()
    arguments = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(tmp_path / "data"), "--resolution", "64"]
    arguments += ["--validation_split", "0.25", "--validation_seed", "7", "--validate_every_n_steps", "5"]
    if tool == "latents":
        definition = cache_latents.dataset_definition(parse(CacheLatentsOptions, arguments))
    else:
        definition = cache_text_encoder_outputs.dataset_definition(parse(CacheTextEncoderOutputsOptions, arguments))
    (subset,) = definition.sections[0].subsets
    assert (subset.validation_split, subset.validation_seed) == (0.25, 7)
