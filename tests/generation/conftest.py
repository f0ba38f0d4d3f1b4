"""The tiny model, loaded once."""

from pathlib import Path

import pytest
from tiny_pipeline import CPU, load_components

from library.generation.pipeline import Pipeline
from library.models.family import Components, ModelSource
from library.models.sdxl.family import SdxlFamily


@pytest.fixture(scope="session")
def family(tiny_checkpoint: Path) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(tiny_checkpoint)))


@pytest.fixture(scope="session")
def components(family: SdxlFamily) -> Components:
    """Shared: tests that change weights load their own."""
    return load_components(family)


@pytest.fixture
def pipeline(family: SdxlFamily, components: Components) -> Pipeline:
    return Pipeline(family, components, device=CPU)
