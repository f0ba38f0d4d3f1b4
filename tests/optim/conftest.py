import json
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def training_reference() -> dict[str, Any]:
    """Expected numbers of optimizers and learning-rate schedules."""
    return json.loads((Path(__file__).parents[1] / "compat" / "training_reference_values.json").read_text(encoding="utf-8"))


@pytest.fixture
def parameters() -> list[torch.nn.Parameter]:
    """A matrix large enough for the 8-bit states of bitsandbytes, and a vector."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 64), (64,))]
