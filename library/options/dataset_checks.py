"""What is wrong or odd about a dataset whose keys are each right by themselves."""

from collections.abc import Sequence

from library.options.dataset_records import SectionConfig


def section_problems(section: SectionConfig, where: str, size_multiple: int) -> list[str]:
    """Return what makes the sizes of a dataset unusable."""
    width, height = section.resolution
    size, step = f"{width}x{height}", section.bucket_reso_steps
    if not section.enable_bucket:
        fits = width % size_multiple == 0 and height % size_multiple == 0
        advice = f"{where}: resolution {size} must consist of multiples of {size_multiple}. Change it or set enable_bucket."
        return [] if fits else [advice]
    problems = []
    if step % size_multiple:
        problems.append(f"{where}: bucket_reso_steps is {step}, but it must be a multiple of {size_multiple}.")
    if section.bucket_no_upscale:  # buckets then follow the images, whatever the limits
        return problems
    lowest, highest = bucket_limits(section)
    if min(width, height) < lowest:
        problems.append(f"{where}: min_bucket_reso {lowest} is above the resolution {size}. Lower it.")
    if max(width, height) > highest:
        problems.append(
            f"{where}: max_bucket_reso {highest} is below the resolution {size}. Raise it, for example to {2 * max(width, height)}."
        )
    return problems


def bucket_limits(section: SectionConfig) -> tuple[int, int]:
    """Return the smallest and largest bucket side: rounded outwards to multiples of the step, of which it has at least one."""
    step = section.bucket_reso_steps
    return max(section.min_bucket_reso // step, 1) * step, -(-section.max_bucket_reso // step) * step


def section_warnings(section: SectionConfig, where: str) -> list[str]:
    """Return what in a dataset probably is not meant."""
    warnings = []
    lowest, highest = bucket_limits(section)
    if section.enable_bucket and section.bucket_no_upscale:
        warnings.append(f"{where}: min_bucket_reso and max_bucket_reso are not used with bucket_no_upscale.")
    elif section.enable_bucket:
        if (lowest, highest) != (section.min_bucket_reso, section.max_bucket_reso):
            warnings.append(
                f"{where}: bucket sides are taken from {lowest} to {highest}, multiples of {section.bucket_reso_steps}."
            )
        if highest == max(section.resolution):
            warnings.append(
                f"{where}: max_bucket_reso is {highest}, so images that are not square are trained at a smaller area "
                f"than the resolution. {2 * highest} is usual."
            )
    return warnings


def latent_cache_problems(section: SectionConfig, where: str) -> list[str]:
    """Return the augmentations that need other pixels at each use, which an image encoded once cannot give."""
    return [
        f"{where}: {name} of {subset.source} changes the image from use to use; --cache_latents encodes it once. "
        f"Switch one of them off."
        for subset in section.subsets
        for name in ("color_aug", "random_crop", "face_crop_aug_range")
        if getattr(subset, name)
    ]


def mask_problems(sections: Sequence[SectionConfig], source: str, masked_loss: bool) -> list[str]:
    """Return what keeps masks from being used, or the loss from having any.

    Args:
        sections: all datasets of the run.
        source: the dataset file, or words for the command line.
        masked_loss: whether the loss is weighted by masks.
    """
    subsets = [subset for section in sections for subset in section.subsets]
    conditioned = [subset.source for subset in subsets if subset.conditioning_data_dir]
    if conditioned and not masked_loss:
        return [
            f"{source}: conditioning_data_dir of {', '.join(conditioned)} holds masks, which are used with --masked_loss only. "
            "Give --masked_loss, or leave the folder out; what follows images is trained by sdxl_train_control_net.py."
        ]
    if masked_loss and not conditioned and not any(subset.alpha_mask for subset in subsets):
        return [
            f"--masked_loss has no masks in {source}. Name a conditioning_data_dir with a mask for every image, or give alpha_mask "
            "to take the transparency of the images as mask; or leave --masked_loss out."
        ]
    return []


def control_problems(sections: Sequence[SectionConfig], source: str) -> list[str]:
    """Return what keeps a network from learning to follow control images.

    Args:
        sections: all datasets of the run.
        source: the dataset file, or words for the command line.
    """
    subsets = [subset for section in sections for subset in section.subsets]
    problems = []
    if without := [subset.source for subset in subsets if not subset.conditioning_data_dir]:
        problems.append(
            f"{source}: there are no control images for {', '.join(without)}. Name a conditioning_data_dir with an image of the "
            "same name for every image; regularisation images and metadata files cannot be used here."
        )
    if cropped := [subset.source for subset in subsets if subset.random_crop]:
        problems.append(f"{source}: random_crop of {', '.join(cropped)} cannot be used with control images. Switch it off.")
    return problems
