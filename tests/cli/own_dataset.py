"""A dataset class such as a person writes for --dataset_class."""

import random
from typing import Any

import torch
from torch.utils.data import Dataset


class Stripes(Dataset[dict[str, Any]]):
    """Three batches of two striped pictures."""

    def __init__(self, tokenizer: None, max_token_length: int | None, resolution: tuple[int, int], debug_dataset: bool) -> None:
        self.made_with = (tokenizer, max_token_length, resolution, debug_dataset)
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> dict[str, Any]:
        width, height = self.made_with[2]
        images = torch.linspace(-1, 1, width).repeat(2, 3, height, 1) * (number + 1) / 3 + random.uniform(-0.001, 0.001)
        sizes = torch.tensor([[height, width]] * 2)
        return {
            "images": images,
            "latents": None,
            "captions": ["a stripe", f"stripes {number}"],
            "text_encoder_outputs_list": None,
            "input_ids_list": None,
            "loss_weights": torch.tensor([1.0, 0.5]),
            "original_sizes_hw": sizes,
            "crop_top_lefts": torch.zeros(2, 2, dtype=torch.int64),
            "target_sizes_hw": sizes,
            "network_multipliers": torch.ones(2),
        }

    def set_current_epoch(self, epoch: int) -> None:
        """Remember which epochs it was told of."""
        self.epochs.append(epoch)


class Encoded(Stripes):
    """The same with latents and text outputs of noise, as if they had been made elsewhere."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        texts = [torch.randn(2, 77, 64), torch.randn(2, 77, 128), torch.randn(2, 128)]  # the widths of the tiny model
        latents = torch.randn(2, 4, self.made_with[2][1] // 8, self.made_with[2][0] // 8)
        return super().__getitem__(number) | {"images": None, "latents": latents, "text_encoder_outputs_list": texts}
