"""Keep the size of an adapter's weight change below a limit (`--scale_weight_norms`), without waiting for the device."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from networks.lora_module import LoRAModule


class NormReport(NamedTuple):
    """What limiting did, as scalars on the adapters' device; reading one waits for the device."""

    scaled: Tensor
    """How many adapters were scaled down."""
    mean: Tensor
    """Mean norm of ΔW afterwards."""
    largest: Tensor


@torch.no_grad()
def limit_norms(adapters: Iterable[LoRAModule], limit: float) -> NormReport:
    """Scale U and D by √(limit/‖ΔW‖) wherever ‖ΔW‖ = ‖(α/r)·U·D‖ is above the limit; the multiplier does not count.

    Adapters of one shape are taken together, which makes a few dozen kernels of what would be thousands.

    Args:
        adapters: at least one, all on one device.
        limit: the largest Frobenius norm allowed, above 0.
    """
    by_shape: dict[tuple[torch.Size, torch.Size], list[LoRAModule]] = defaultdict(list)
    for adapter in adapters:
        by_shape[adapter.lora_down.weight.shape, adapter.lora_up.weight.shape].append(adapter)
    norms = torch.cat([_limit_group(group, limit) for group in by_shape.values()])
    limited = norms.clamp(max=limit)
    return NormReport((norms > limit).sum(), limited.mean(), limited.max())


def _limit_group(group: Sequence[LoRAModule], limit: float) -> Tensor:
    """Limit adapters of one shape and return their norms before, float32 (n,)."""
    downs, ups = [adapter.lora_down.weight for adapter in group], [adapter.lora_up.weight for adapter in group]
    down, up = (torch.stack([weight.flatten(1).float() for weight in weights]) for weights in (downs, ups))
    scales = torch.tensor([adapter.scale for adapter in group]).to(down.device, non_blocking=True)
    norms = product_norm(down, up) * scales
    factors = (limit / norms.clamp(min=limit)).sqrt()[:, None, None]
    for weights, stacked in ((downs, down), (ups, up)):
        torch._foreach_copy_(weights, [new.view_as(old) for new, old in zip(stacked * factors, weights, strict=True)])
    return norms


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """Return ‖U·D‖_F without making the product: its square is the sum of UᵀU ∘ DDᵀ.

    Args:
        down: (n, r, in) float32.
        up: (n, out, r) float32.

    Returns:
        (n,) float32.
    """
    squares = (up.mT @ up) * (down @ down.mT)
    return squares.sum(dim=(1, 2)).clamp(min=0).sqrt()
