"""Options about a word that is learned."""

from typing import ClassVar, Literal

from library.options.declare import OptionGroup, flag, option
from library.options.groups.output import SavingOptions


class TextualInversionOptions(OptionGroup):
    """The word, its vectors, and the captions it stands in."""

    topic: ClassVar[str] = "Textual inversion"

    token_string: str | None = option(None, "Word to learn; one that is not in the vocabulary.")
    init_word: str | None = option(None, "Words whose vectors the new one's begin with, over and over.")
    num_vectors_per_token: int = option(1, "Vectors of the word; more of them hold more detail, and take more of a prompt.", ge=1)
    weights: str | None = option(None, "File of a learned word to start from.")
    use_object_template: bool = flag("Train on sentences about an object in place of the images' captions.")
    use_style_template: bool = flag("Train on sentences about a style in place of the images' captions.")


class WordOutputOptions(SavingOptions):
    """Saving of learned words."""

    save_model_as: Literal["ckpt", "pt", "safetensors"] = option("pt", "File format; only safetensors carries metadata.")

    @property
    def extension(self) -> str:
        """Of saved words, with its dot."""
        return f".{self.save_model_as}"
