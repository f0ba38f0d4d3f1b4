"""Options about captions; all are fallbacks for the keys of the same name in a dataset file."""

from typing import Any, ClassVar

from pydantic import model_validator

from library.options.declare import OptionGroup, flag, option


class CaptionTextOptions(OptionGroup):
    """How captions are found, split, varied and dropped."""

    topic: ClassVar[str] = "Captions"

    caption_extension: str = option(".caption", "Extension of caption files; a missing leading dot is added.")
    caption_extention: str | None = option(None, "Old misspelling of --caption_extension; wins over it when given.")
    caption_separator: str = option(",", "Text that separates the tags of a caption.")
    shuffle_caption: bool = flag("Shuffle the tags of a caption at every use, except the leading --keep_tokens.")
    keep_tokens: int = option(0, "Number of leading tags that are never shuffled or dropped.", ge=0)
    keep_tokens_separator: str = option("", "Text in a caption before which (and after whose second occurrence) tags stay fixed.")
    secondary_separator: str | None = option(None, "Text that joins several tags into one unit for shuffling and dropping.")
    enable_wildcard: bool = flag("Pick one line of a multi-line caption and one alternative of {a|b|c} at every use.")
    caption_prefix: str | None = option(None, "Text put before every caption, with one blank between.")
    caption_suffix: str | None = option(None, "Text put after every caption, with one blank between.")
    caption_dropout_rate: float = option(0.0, "Probability of training on an empty caption.", ge=0, le=1)
    caption_dropout_every_n_epochs: int = option(0, "Train on empty captions in every N-th epoch; 0 never does.", ge=0)
    caption_tag_dropout_rate: float = option(0.0, "Probability of dropping each tag that is not kept.", ge=0, le=1)
    token_warmup_min: int = option(1, "Number of tags used at the start of the tag warm-up.", ge=0)
    token_warmup_step: float = option(0, "Step from which all tags are used; below 1 a fraction of all steps.", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _settle_extension(cls, given: dict[str, Any]) -> dict[str, Any]:
        extension = given.get("caption_extention") or given.get("caption_extension")
        if not isinstance(extension, str) or not extension:
            return given
        return given | {"caption_extension": extension if extension.startswith(".") else f".{extension}"}


class CaptionOptions(CaptionTextOptions):
    """Captions where they are also encoded."""

    weighted_captions: bool = flag("Read (text:1.3), (text) and [text] in captions as weights.")
