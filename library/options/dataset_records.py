"""What a dataset definition says, read and checked: plain records that everyone else works with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class CaptionRules:
    """How the text of a caption file becomes the caption of one use of the image."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    """Flexible tags that are used at the first update of the tag warm-up."""
    token_warmup_step: float = 0.0
    """Update from which all tags are used; below 1 a fraction of all updates; 0 is no warm-up."""
    templates: tuple[str, ...] = ()
    """Sentences of which one stands in for the image's own text at each use; no key of dataset files sets them."""

    @property
    def moves_tags(self) -> bool:
        """Whether captions are taken apart into tags and put together again."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    def varying(self) -> list[str]:
        """Return the names of the settings that give an image another caption from use to use."""
        names = (
            "shuffle_caption",
            "enable_wildcard",
            "caption_dropout_rate",
            "caption_dropout_every_n_epochs",
            "caption_tag_dropout_rate",
            "token_warmup_step",
        )
        return [name for name in names if getattr(self, name)]

    def varying_text(self) -> list[str]:
        """Return those of `varying` that change the text itself; the others decide whether there is any."""
        return [name for name in self.varying() if not name.startswith("caption_dropout_")]

    @property
    def drops_captions(self) -> bool:
        """Whether some uses of an image have no caption at all."""
        return self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images with caption files, or the images that one metadata file names."""

    image_dir: str
    """Empty where a metadata file has whole paths."""
    metadata_file: str | None
    conditioning_data_dir: str | None
    """Folder with a control or mask image for every image."""
    num_repeats: int
    is_reg: bool
    class_tokens: str | None
    """The caption of images without a caption file; None warns about such images."""
    caption_extension: str
    cache_info: bool
    flip_aug: bool
    color_aug: bool
    random_crop: bool
    face_crop_aug_range: tuple[float, float] | None
    """Factors between which the crop around a face is larger than the face."""
    alpha_mask: bool
    resize_interpolation: str | None
    """None: area where both sides shrink, else Lanczos."""
    validation_split: float
    """Fraction of the images that is held out of training."""
    validation_seed: int | None
    custom_attributes: Mapping[str, Any]
    """Handed on with every image, for whoever knows them."""
    captions: CaptionRules

    @property
    def source(self) -> str:
        """The file or folder the images come from."""
        return self.metadata_file or self.image_dir


@dataclass(frozen=True)
class SectionConfig:
    """One dataset of the file: images that share resolution, batch size and buckets."""

    resolution: tuple[int, int]
    """Width and height in pixels."""
    batch_size: int
    """Images per process and step."""
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    network_multiplier: float
    """Strength at which the trained network acts on these images."""
    resize_interpolation: str | None
    subsets: tuple[SubsetConfig, ...]


@dataclass(frozen=True)
class DatasetConfig:
    """All that is trained on."""

    sections: tuple[SectionConfig, ...]
    prior_loss_weight: float
    """Loss weight of regularisation images."""
    from_file: bool
    warnings: tuple[str, ...] = ()
    """What is odd but not wrong, for the log."""
    true_crop_conditioning: bool = False
    """Whether SDXL is told the crop that is made instead of what sd-scripts tells it."""

    def with_templates(self, templates: tuple[str, ...]) -> "DatasetConfig":
        """Return the same data with these sentences in place of captions; regularisation images keep theirs."""

        def changed(subset: SubsetConfig) -> SubsetConfig:
            return subset if subset.is_reg else replace(subset, captions=replace(subset.captions, templates=templates))

        sections = (replace(section, subsets=tuple(map(changed, section.subsets))) for section in self.sections)
        return replace(self, sections=tuple(sections))
