"""Options about image geometry; all are fallbacks for the keys of the same name in a dataset file."""

from typing import Annotated, ClassVar, Literal

from pydantic import field_validator

from library.options.declare import CommaList, OptionGroup, flag, option


class ImageOptions(OptionGroup):
    """Buckets, resizing and augmentation."""

    topic: ClassVar[str] = "Image geometry, buckets and augmentation"

    enable_bucket: bool = flag("Sort images of different shape into buckets instead of cropping all to one shape.")
    min_bucket_reso: int = option(256, "Smallest bucket side in pixels.", ge=1)
    max_bucket_reso: int = option(1024, "Largest bucket side in pixels; 2048 suits training at 1024x1024.", ge=1)
    bucket_reso_steps: int = option(64, "Step between bucket sides in pixels; a multiple of 32.", ge=1)
    bucket_no_upscale: bool = flag("Never enlarge an image: make the bucket from the size of the image.")
    resize_interpolation: Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"] | None = option(
        None, "Resampling method; when left out, area for shrinking and Lanczos for enlarging."
    )
    color_aug: bool = flag("Vary hue and gamma of some images a little.")
    flip_aug: bool = flag("Mirror every second image at random.")
    random_crop: bool = flag("Crop at random instead of at the centre.")
    face_crop_aug_range: Annotated[str | None, CommaList()] = option(
        None, "Crop around the face named in the file name, by a factor between low,high."
    )
    alpha_mask: bool = flag("Use the alpha channel of an image as a mask of its loss.")
    true_crop_conditioning: bool = flag("Tell SDXL the crop that is made, instead of the value that sd-scripts computes.")

    @field_validator("face_crop_aug_range")
    @classmethod
    def _is_a_range(cls, text: str | None) -> str | None:
        if text is None:
            return None
        try:
            low, high = (float(part) for part in text.split(","))
        except ValueError:
            raise ValueError("two numbers with a comma are wanted, such as 2.0,4.0") from None
        if not 0 < low <= high:
            raise ValueError("the first number must be above 0 and not above the second, such as 2.0,4.0")
        return text
