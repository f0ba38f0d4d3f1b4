"""Save a loaded model with all its parts as if they had been trained."""

from pathlib import Path
from typing import Any

from library.models.family import Components
from library.models.sdxl.build import part_tensors
from library.models.sdxl.family import SdxlFamily


def save_parts(family: SdxlFamily, path: Path, components: Components, layout: str = "safetensors", **options: Any) -> None:
    """Save the parts that are not None from memory, the others from the files."""
    te1, te2 = components.text_encoders
    modules = {"unet": components.denoiser, "te1": te1, "te2": te2, "vae": components.vae}
    trained = {name: part_tensors(module) for name, module in modules.items() if module is not None}
    defaults = {"dtype": None, "metadata": {}, "v_prediction": False, "zero_terminal_snr": False}
    family.save_model(path, layout, trained, **defaults | options)
