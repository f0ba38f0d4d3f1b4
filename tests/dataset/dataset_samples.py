"""Small datasets of real files, and a family whose encoders are arithmetic."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from library.dataset.batch import Batch
from library.dataset.dataset import Dataset
from library.dataset.loader import Loader
from library.models.family import LatentCacheSpec, TextCacheSpec, TextCond, Tokens
from library.models.prompt_weights import PromptStyle, parse_prompt_weights
from library.options.dataset_config import CaptionRules, DatasetConfig, SectionConfig, SubsetConfig

POSTERIOR_STD = 0.01
"""Of the fake VAE's posterior, everywhere."""


def make_image(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, **save: Any) -> Path:
    """Write a picture of smooth colours that differ by seed."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (x + y + seed / 7) % 1], axis=-1) * 255
    Image.fromarray(pixels.astype(np.uint8)).save(path, **save)
    return path


def subset(folder: Path | str, **changes: Any) -> SubsetConfig:
    rules = {name: changes.pop(name) for name in list(changes) if name in CaptionRules.__dataclass_fields__}
    values: dict[str, Any] = {
        "image_dir": str(folder), "metadata_file": None, "conditioning_data_dir": None, "num_repeats": 1,
        "is_reg": False, "class_tokens": None, "caption_extension": ".txt", "cache_info": False,
        "flip_aug": False, "color_aug": False, "random_crop": False, "face_crop_aug_range": None, "alpha_mask": False,
        "resize_interpolation": None, "validation_split": 0.0, "validation_seed": None, "custom_attributes": {},
        "captions": CaptionRules(**rules),
    }  # fmt: skip
    return SubsetConfig(**(values | changes))


def section(*subsets: SubsetConfig, **changes: Any) -> SectionConfig:
    values: dict[str, Any] = {
        "resolution": (64, 64), "batch_size": 2, "enable_bucket": False, "min_bucket_reso": 32, "max_bucket_reso": 128,
        "bucket_reso_steps": 32, "bucket_no_upscale": False, "network_multiplier": 1.0,
        "resize_interpolation": None, "subsets": subsets,
    }  # fmt: skip
    return SectionConfig(**(values | changes))


def config(*sections: SectionConfig, prior_loss_weight: float = 1.0, from_file: bool = True) -> DatasetConfig:
    return DatasetConfig(sections, prior_loss_weight, from_file)


def make_loader(
    dataset: Dataset,
    epoch: int,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    start_batch: int = 0,
    pin: bool = False,
) -> Iterable[Batch]:
    """Return the batches of one epoch for one process."""
    loader = Loader(dataset, process_index=process_index, num_processes=num_processes, num_workers=num_workers, pin=pin)
    return loader.epoch(epoch, start_batch)


class FakeVae(nn.Module):
    """Counts the images it sees; `poison` makes everything it gives infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.poison = False


class FakeFamily:
    """SDXL's cache files over encoders that are arithmetic."""

    name = "fake"
    latent_channels = 4
    latent_stride = 8
    size_multiple = 32
    encoder_names: tuple[str, ...] = ("te1", "te2")
    latent_cache = LatentCacheSpec("_sdxl.npz")

    def __init__(self) -> None:
        self.fingerprints = {"vae": "vae-1", "text_encoders": "te-1"}
        self.encoded_texts: list[str] = []
        self.max_token_length = 75
        self.text_cache = TextCacheSpec("_te_outputs.npz", frozenset({"hidden_state1", "hidden_state2", "pool2"}), _pack, _unpack)

    def fingerprint(self, part: str) -> str:
        return self.fingerprints[part]

    def trusts_foreign_text_caches(self) -> bool:
        return False

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        self.encoded_texts += texts
        return {"ids": torch.tensor([[len(text), sum(text.encode()) % 1000] for text in texts])}

    def encode_text(self, tokens: Tokens, encoders: Sequence[nn.Module | None]) -> TextCond:
        length = self.max_token_length + 2
        ids = tokens["ids"].float()
        return {
            "hidden1": ids[:, :1, None].expand(-1, length, 3).contiguous(),
            "hidden2": ids[:, 1:, None].expand(-1, length, 5).contiguous(),
            "pool2": ids.repeat(1, 3)[:, :5],
        }

    def encode_prompts(self, texts: Sequence[str], encoders: Sequence[nn.Module | None], style: PromptStyle) -> list[TextCond]:
        """Multiply by the weight of the first run; the number of encoded texts stays to be seen in `encoded_texts`."""
        plain = self.encode_text(self.tokenize(texts), encoders)
        weights = [parse_prompt_weights(text)[0].weight for text in texts]
        return [{name: value[i : i + 1] * weight for name, value in plain.items()} for i, weight in enumerate(weights)]

    def encode_images(self, vae: FakeVae, images: Tensor, noise: Tensor) -> Tensor:
        latents = self._mean(vae, images) + POSTERIOR_STD * noise
        return latents * float("inf") if vae.poison else latents

    def encode_posterior(self, vae: FakeVae, images: Tensor) -> Tensor:
        mean = self._mean(vae, images)
        return torch.cat([mean, torch.full_like(mean, 2 * math.log(POSTERIOR_STD))], dim=1)

    def _mean(self, vae: FakeVae, images: Tensor) -> Tensor:
        vae.seen += len(images)
        small = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)


_NAMES = {"hidden1": "hidden_state1", "hidden2": "hidden_state2", "pool2": "pool2"}


def _pack(cond: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {_NAMES[name]: value.numpy() for name, value in cond.items()}


def _unpack(arrays: Mapping[str, np.ndarray[Any, Any]]) -> TextCond:
    return {name: torch.from_numpy(arrays[stored]) for name, stored in _NAMES.items()}
