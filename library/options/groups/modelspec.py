"""Options about the model-spec metadata of saved files."""

from typing import ClassVar

from library.options.declare import OptionGroup, PathText, option


class ModelSpecOptions(OptionGroup):
    """What the saved file says about itself (modelspec.*)."""

    topic: ClassVar[str] = "Metadata of the saved file"

    metadata_title: str | None = option(None, "Title; the output name when left out.")
    metadata_author: str | None = option(None, "Author.")
    metadata_description: str | None = option(None, "Description.")
    metadata_license: str | None = option(None, "Licence.")
    metadata_tags: str | None = option(None, "Tags, separated by commas.")
    metadata_usage_hint: str | None = option(None, "Hint on how to use the model.")
    metadata_thumbnail: PathText = option(None, "Picture: a data URL, or an image file that is stored as one.")
    metadata_merged_from: str | None = option(None, "Names of the models this one was merged from.")
    metadata_trigger_phrase: str | None = option(None, "Words that call up what was trained.")
    metadata_preprocessor: str | None = option(None, "Name of the preprocessor of control images.")
    metadata_is_negative_embedding: str | None = option(None, "Says that an embedding is meant for the negative prompt.")
