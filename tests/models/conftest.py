"""A tiny SDXL model in float32, ours and diffusers', shared by the tests of the models."""

from pathlib import Path

import pytest
import torch

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from tools.make_tiny_sdxl import main as make_tiny_sdxl

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    make_tiny_sdxl([str(path), "--dtype", "fp32"])
    return path


@pytest.fixture(scope="session")
def family(tiny_file: Path) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(tiny_file)))


@pytest.fixture(scope="session")
def diffusers_configs(tmp_path_factory: pytest.TempPathFactory, family: SdxlFamily) -> Path:
    from diffusers_reference import write_configs

    return write_configs(tmp_path_factory.mktemp("configs"), family.sizes)


@pytest.fixture(scope="session")
def pipeline(tiny_file: Path, diffusers_configs: Path):
    """The same file, opened by diffusers with its own conversion of names."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_single_file(str(tiny_file), config=str(diffusers_configs), local_files_only=True)
