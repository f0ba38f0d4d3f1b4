"""The `modelspec.*` keys (version 1.0.1) that every trained file carries: what it is, and what its maker says of it."""

import base64
import mimetypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from library.diffusion.objective import PredictionKind
from library.options.errors import UserError
from library.options.groups.modelspec import ModelSpecOptions
from library.training.environment import source_revision
from library.training.metadata import Metadata
from library.training.setting import MetadataAt, Setting


@dataclass(frozen=True)
class ModelSpec:
    """The parts of `modelspec.*` (version 1.0.1) that are the same for every file of a run."""

    model: Mapping[str, str]
    """`architecture` and `implementation` as the family names them, with `/lora` in the architecture of a network."""
    title: str
    resolution: tuple[int, int]
    """Width and height in pixels."""
    prediction: PredictionKind
    timestep_range: tuple[int | None, int | None]
    """`--min_timestep` and `--max_timestep`."""
    clip_skip: int | None
    fields: Mapping[str, str]
    """What the person said of the model, see `described_fields`."""

    def at_save(self, now: float) -> Metadata:
        """Return the `modelspec.*` keys of a file saved at Unix time `now`."""
        spec = {
            "sai_model_spec": "1.0.1",
            **self.model,
            "implementation_version": f"atelier/{source_revision()}",
            "title": self.title,
            "resolution": "{}x{}".format(*self.resolution),
            "date": datetime.fromtimestamp(int(now)).isoformat(),
            "prediction_type": self.prediction,
        }
        low, high = self.timestep_range
        if low is not None or high is not None:
            spec["timestep_range"] = f"{low or 0},{1000 if high is None else high}"
        if self.clip_skip is not None:
            spec["encoder_layer"] = str(self.clip_skip)
        return {f"modelspec.{key}": value for key, value in (spec | dict(self.fields)).items()}

    def alone(self) -> MetadataAt:
        """Return the metadata of files that say nothing else: how they were trained is for networks."""
        return lambda stem, position: self.at_save(time.time())


def model_spec(setting: Setting, kind: str, suffix: str = "") -> ModelSpec:
    """Collect what `modelspec.*` says of a file of this run.

    Args:
        setting: of the run.
        kind: what is trained, for the title of files without a name.
        suffix: of the family's architecture, such as `/lora`.
    """
    options, of_model = setting.options, setting.family.model_spec()
    return ModelSpec(
        model=of_model | {"architecture": of_model["architecture"] + suffix},
        title=model_title(options.modelspec, options.output.output_name, kind, setting.started_at),
        resolution=setting.dataset.sections[0].config.resolution,
        prediction=setting.objective.prediction,
        timestep_range=(options.noise.min_timestep, options.noise.max_timestep),
        clip_skip=options.model.clip_skip,
        fields=described_fields(options.modelspec),
    )


_DESCRIBED = ("author", "description", "license", "tags", "usage_hint", "merged_from", "trigger_phrase", "preprocessor",
              "is_negative_embedding")  # fmt: skip


def model_title(options: ModelSpecOptions, output_name: str | None, kind: str, started_at: float) -> str:
    """Return the title of a model: as given, else the output name, else `LoRA@<timestamp>` with the kind in LoRA's place."""
    return options.metadata_title or output_name or f"{kind}@{started_at}"


def described_fields(options: ModelSpecOptions) -> dict[str, str]:
    """Return what the `--metadata_*` options say, by `modelspec` field, with a thumbnail file as a data URL.

    Raises:
        UserError: the thumbnail is neither a data URL nor a readable picture file.
    """
    given = {name: getattr(options, f"metadata_{name}") for name in _DESCRIBED}
    if options.metadata_thumbnail:
        given["thumbnail"] = thumbnail_data_url(options.metadata_thumbnail)
    return {name: str(value) for name, value in given.items() if value is not None}


def thumbnail_data_url(thumbnail: str) -> str:
    """Turn `--metadata_thumbnail` into a data URL, which it may be already.

    Raises:
        UserError: it is neither a data URL nor a readable picture file.
    """
    if thumbnail.startswith("data:"):
        return thumbnail
    media_type, _ = mimetypes.guess_type(thumbnail)
    if media_type is None or not media_type.startswith("image/"):
        raise UserError(f"--metadata_thumbnail is {thumbnail!r}: give a picture (.png, .jpg, .webp) or a data URL (data:image/…).")
    try:
        content = Path(thumbnail).read_bytes()
    except OSError as error:
        raise UserError(f"--metadata_thumbnail {thumbnail} cannot be read ({error.strerror}): check the path.") from error
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
