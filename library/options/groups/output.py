"""Options about what is saved, when, and how long it is kept."""

from pathlib import PurePath
from typing import Annotated, ClassVar, Literal

from library.options.declare import OptionGroup, PathText, SameAsUnset, flag, option


class SavingOptions(OptionGroup):
    """Names, intervals and retention of saved files."""

    topic: ClassVar[str] = "Output and saving"

    output_dir: PathText = option(None, "Folder for everything the run writes; made when needed.")
    output_name: str | None = option(None, "Base name of the saved files; `last` and the like when left out.")
    save_precision: Literal["float", "fp16", "bf16"] | None = option(
        None, "Number type of the saved weights; the type they were trained in when left out."
    )
    save_every_n_epochs: Annotated[int | None, SameAsUnset(0)] = option(None, "Save after every N-th epoch but the last.", ge=1)
    save_every_n_steps: Annotated[int | None, SameAsUnset(0)] = option(None, "Save after every N-th step.", ge=1)
    save_n_epoch_ratio: Annotated[int | None, SameAsUnset(0)] = option(
        None, "Save about N times in the whole run; replaces --save_every_n_epochs.", ge=1
    )
    save_last_n_epochs: Annotated[int | None, SameAsUnset(0)] = option(None, "Keep only the newest N epoch files.", ge=1)
    save_last_n_steps: Annotated[int | None, SameAsUnset(0)] = option(None, "Keep only the files of the last N steps.", ge=1)
    save_last_n_epochs_state: Annotated[int | None, SameAsUnset(0)] = option(
        None, "Like --save_last_n_epochs, for state folders.", ge=1
    )
    save_last_n_steps_state: Annotated[int | None, SameAsUnset(0)] = option(
        None, "Like --save_last_n_steps, for state folders.", ge=1
    )

    @staticmethod
    def is_plain(name: str) -> bool:
        """Say whether files can be named so: without folders."""
        return PurePath(name).name == name and name not in {".", ".."}

    @property
    def extension(self) -> str:
        """Of saved models, with its dot; "" for models saved as folders."""
        return ".safetensors"


class OutputOptions(SavingOptions):
    """Saving of network files."""

    save_model_as: Literal["ckpt", "pt", "safetensors"] = option("safetensors", "File format; only safetensors carries metadata.")

    @property
    def extension(self) -> str:
        """Of saved networks, with its dot."""
        return f".{self.save_model_as}"


class ModelOutputOptions(SavingOptions):
    """Saving of whole models."""

    save_model_as: Literal["ckpt", "safetensors", "diffusers", "diffusers_safetensors"] | None = option(
        None, "Layout of saved models: one file, or a diffusers folder with .bin or .safetensors files; safetensors when left out."
    )
    use_safetensors: bool = flag("Write .safetensors files into the folder of --save_model_as diffusers.")

    @property
    def layout(self) -> str:
        """The layout in effect: "safetensors", "ckpt", "diffusers" or "diffusers_safetensors"."""
        if self.save_model_as == "diffusers" and self.use_safetensors:
            return "diffusers_safetensors"
        return self.save_model_as or "safetensors"

    @property
    def extension(self) -> str:
        """Of saved models, with its dot; "" for diffusers folders."""
        return {"safetensors": ".safetensors", "ckpt": ".ckpt"}.get(self.layout, "")
