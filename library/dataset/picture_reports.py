"""Tell which pictures are not what the settings of their subset are made for."""

import numpy as np

from library.dataset.augmentation import face_in_name
from library.dataset.columns import Pictures
from library.dataset.findings import Findings, Kind, names_of
from library.dataset.images import Trait
from library.options.dataset_config import SubsetConfig


def report_of_subset(subset: SubsetConfig, pictures: Pictures, findings: Findings) -> None:
    """Tell which images of a subset have an alpha channel that is no mask, and which have no face to be cropped around."""
    if not subset.alpha_mask:
        with_alpha = np.flatnonzero(pictures.traits & Trait.ALPHA).tolist()
        told = f"{len(with_alpha)} of {len(pictures)} images of {subset.source} have an alpha channel"
        _warn(findings, Kind.TRANSPARENT, subset, told, pictures, with_alpha)
    if subset.face_crop_aug_range:
        faceless = [row for row, name in enumerate(pictures.names) if face_in_name(name) is None]
        told = (
            f"face_crop_aug_range: {len(faceless)} of {len(pictures)} images of {subset.source} have no face in their name, as "
            f"name_CX_CY_W_H.png has, and are cropped as without it"
        )
        _warn(findings, Kind.CONFIG, subset, told, pictures, faceless)


def _warn(findings: Findings, kind: Kind, subset: SubsetConfig, told: str, pictures: Pictures, rows: list[int]) -> None:
    if rows:
        names, paths = [pictures.names[row] for row in rows], [pictures.path(row) for row in rows]
        findings.warning(kind, subset.source, f"{told}: {names_of(names)}.", count=len(rows), files=paths)
