"""One LoRA adapter: two small matrices beside one frozen layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.forwards import function_of, owner_of
from library.models.geglu import gated
from library.models.number_types import product_dtype
from networks.low_rank import adapted_conv2d, adapted_linear, adapted_linears

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Dropouts:
    """What is dropped while training; probabilities in [0, 1), 0 for never."""

    neuron: float = 0.0
    """Elements of the down-projection's output; survivors are scaled by 1/(1−p)."""
    rank: float = 0.0
    """Whole ranks per image; the adapter's scale becomes s/(1−p)."""
    module: float = 0.0
    """The whole adapter for one call; kept calls are not rescaled."""


class Joint(NamedTuple):
    """Linear layers with one input and their adapters, computed together."""

    layers: Sequence[Layer]
    down: Tensor
    """Their D one below the other, (n·r, I)."""
    up: Tensor
    """(n, O, r)."""
    scale: float

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer for x (…, I)."""
        return adapted_linears(x, [layer.weight for layer in self.layers], self.down, self.up, self.scale)


@dataclass(slots=True)
class AtHand:
    """What the block an adapter is in has made ready for it while it runs, in the number type of the computation."""

    matrices: tuple[Tensor, Tensor] | None = None
    """D and U."""
    joint: Joint | None = None
    """Kept by the first of several adapters that are computed together."""

    def clear(self) -> None:
        """Keep nothing."""
        self.matrices = self.joint = None


class LoRAModule(nn.Module):
    """Adds multiplier·(α/r)·U(Dx) to the output of a linear layer or a convolution.

    Dropouts draw from torch's global generators in this order: module (CPU, one number per call), neuron, rank (device of the
    input). Whoever sets these generators before a step gets the same draws again, also when checkpointing computes a block twice.

    Args:
        layer: the frozen layer; its `forward` is replaced by `apply_to`, until then it is untouched.
        rank: r, at least 1.
        alpha: α; None or 0 means r.
        multiplier: strength of the adapter.
        dropouts: see `Dropouts`; they act in training mode only.
    """

    alpha: Tensor
    lora_down: Layer
    lora_up: Layer

    def __init__(
        self, layer: Layer, rank: int, alpha: float | None, multiplier: float = 1.0, dropouts: Dropouts | None = None
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha_value = float(alpha or rank)
        self.multiplier = multiplier
        self.enabled = True
        self.dropouts = dropouts or Dropouts()
        self._layer = (layer,)  # in a tuple, so that the frozen layer does not become a part of the network
        self._plain_forward: Callable[[Tensor], Tensor] = layer.forward
        self._original_weight: Tensor | None = None
        self.at_hand = AtHand()
        self.lora_down, self.lora_up = _matrices(layer, rank)
        self.register_buffer("alpha", torch.tensor(self.alpha_value))
        self.register_load_state_dict_post_hook(_read_alpha)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAModule":
        """Move and convert the matrices; α stays float32, since half precision would change the scale of a resumed run."""
        super()._apply(fn, recurse)
        self.alpha = torch.full((), self.alpha_value, device=self.alpha.device)
        return self

    @property
    def layer(self) -> Layer:
        """The frozen layer this adapter belongs to."""
        return self._layer[0]

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha_value / self.rank

    @property
    def strength(self) -> float:
        """multiplier·α/r."""
        return self.multiplier * self.alpha_value / self.rank

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """D and U."""
        return self.lora_down.weight, self.lora_up.weight

    @property
    def acts(self) -> bool:
        """Whether it changes what its layer gives."""
        return self.enabled and self.multiplier != 0

    @property
    def can_join(self) -> bool:
        """Whether the layer may be computed together with others that have its input."""
        return self.layer.bias is None and self._is_all_there_is

    @property
    def _is_all_there_is(self) -> bool:
        """Whether nothing but this adapter stands between a linear layer and those that call it, and it draws nothing."""
        layer = self.layer
        return (
            self.acts
            and not (self.training and self.dropouts != _NO_DROPOUTS)
            and owner_of(layer.forward) is self
            and isinstance(layer, nn.Linear)
            and not (layer._forward_hooks or layer._forward_pre_hooks)
            and _is_frozen_and_plain(layer, self._plain_forward)
        )

    @property
    def joint(self) -> Joint | None:
        """What computes this layer together with others that have its input; None where each is computed by itself."""
        return self.at_hand.joint

    @property
    def is_spatial(self) -> bool:
        """Whether the layer is a convolution that looks beyond one pixel."""
        return is_spatial(self.layer)

    def apply_to(self) -> None:
        """Put the adapter into the layer's forward pass; adapters of several networks may stand one upon another."""
        self._plain_forward = self.layer.forward
        self.layer.forward = self.forward  # type: ignore[method-assign, assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with the adapter's part added.

        Args:
            x: (…, in) or (B, in, h, w).
        """
        if not self.acts or self._is_dropped():
            return self._plain_forward(x)
        scale = self.strength
        mask = self._dropout_mask(x)
        if self.training and self.dropouts.rank:
            scale /= 1 - self.dropouts.rank
        if not _is_frozen_and_plain(self.layer, self._plain_forward):
            return self._plain_forward(x) + self._low_rank_output(x, mask) * scale
        down, up = self._matrices_for(x)
        if isinstance(self.layer, nn.Linear):
            return adapted_linear(x, self.layer, down, up, scale, mask)
        return adapted_conv2d(x, self.layer, down, up, scale, mask)

    def after_gate(self, halves: Tensor) -> Tensor:
        """Return the layer's output for value · GELU(gate), where possible without keeping that for the backward pass.

        Args:
            halves: value and gate side by side, (…, 2·in).
        """
        layer = self.layer
        if not (isinstance(layer, nn.Linear) and self._is_all_there_is):
            out: Tensor = layer(gated(halves))
            return out
        down, up = self._matrices_for(halves)
        return adapted_linear(halves, layer, down, up, self.strength, None, is_gated=True)

    def delta_weight(self) -> Tensor:
        """Return ΔW = (α/r)·U·D in float32 and the shape of the layer's weight; the multiplier is not in it."""
        return delta_weight(self.lora_down.weight, self.lora_up.weight, self.scale)

    def merge(self, delta: Tensor, dtype: torch.dtype | None = None) -> None:
        """Add multiplier·delta to the layer's weight, computed in float32 where delta is.

        Args:
            delta: float32, in the shape of the weight.
            dtype: what the weight is stored in afterwards; None keeps its own.
        """
        weight = self.layer.weight
        merged = weight.detach().to(delta.device, torch.float32) + self.multiplier * delta
        weight.data = merged.to(weight.device, dtype or weight.dtype)

    def backup_weight(self) -> None:
        """Remember the layer's weight for `restore_weight`."""
        self._original_weight = self.layer.weight.detach().clone()

    def restore_weight(self) -> None:
        """Put back what `backup_weight` remembered, to the bit, and switch the adapter on again."""
        if self._original_weight is not None:
            self.layer.weight.data = self._original_weight
            self._original_weight = None
        self.enabled = True

    def _low_rank_output(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return U(mask ∘ Dx) on its own, for layers whose output is not just their weight's product."""
        down, up = self._matrices_for(x)
        x = x.to(down.dtype)
        if isinstance(self.lora_down, nn.Linear):
            low = F.linear(x, down)
            return F.linear(low if mask is None else low * mask, up)
        low = self.lora_down._conv_forward(x, down, None)
        return F.conv2d(low if mask is None else low * mask, up)

    def _matrices_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and U in the number type of the computation."""
        dtype, ready = product_dtype(x), self.at_hand.matrices
        if ready is not None and ready[0].dtype == dtype:
            return ready
        return self.lora_down.weight.to(dtype), self.lora_up.weight.to(dtype)

    def _is_dropped(self) -> bool:
        return self.training and self.dropouts.module > 0 and torch.rand(1).item() < self.dropouts.module

    def _dropout_mask(self, x: Tensor) -> Tensor | None:
        """Draw the factors for the down-projection's output, in a shape that broadcasts against it; None without dropout."""
        if not self.training or not (self.dropouts.neuron or self.dropouts.rank):
            return None
        shape, dtype = _low_shape(self.layer, x, self.rank), product_dtype(x)
        mask = None
        if self.dropouts.neuron:
            keep = 1 - self.dropouts.neuron
            mask = torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(keep).div_(keep)
        if self.dropouts.rank:
            kept = (torch.rand(shape[0], self.rank, device=x.device) > self.dropouts.rank).to(dtype)
            kept = kept[:, :, None, None] if isinstance(self.layer, nn.Conv2d) else kept.view(shape[0], *[1] * (len(shape) - 2), -1)
            mask = kept if mask is None else mask * kept
        return mask


_NO_DROPOUTS = Dropouts()


def delta_weight(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return scale·U·D in float32 and the shape of the adapted weight.

    Args:
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
        scale: α/r.
    """
    product = up.detach().float().flatten(1) @ down.detach().float().flatten(1)
    return (product * scale).view(up.shape[0], *down.shape[1:])


def is_spatial(layer: Layer) -> bool:
    """Tell convolutions that look beyond one pixel from linear layers and 1×1 convolutions."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _matrices(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """Make D (Kaiming-uniform, a = √5: uniform in ±1/√fan_in) and U (zero), both without bias, in float32."""
    down: Layer
    up: Layer
    if isinstance(layer, nn.Linear):
        down = nn.Linear(layer.in_features, rank, bias=False)
        up = nn.Linear(rank, layer.out_features, bias=False)
    else:
        kernel: Any = layer.kernel_size
        geometry: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        down = nn.Conv2d(layer.in_channels, rank, kernel, bias=False, padding_mode=layer.padding_mode, **geometry)
        up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)
    return down, up


def _is_frozen_and_plain(layer: Layer, forward: Callable[[Tensor], Tensor]) -> bool:
    """Tell whether the layer's own output is the textbook one, so that it can be computed together with the adapter."""
    if function_of(forward) not in (nn.Linear.forward, nn.Conv2d.forward) or layer.weight.requires_grad:
        return False
    if layer.bias is not None and layer.bias.requires_grad:
        return False
    return isinstance(layer, nn.Linear) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _low_shape(layer: Layer, x: Tensor, rank: int) -> tuple[int, ...]:
    """Return the shape of the down-projection's output for an input."""
    if isinstance(layer, nn.Linear):
        return (*x.shape[:-1], rank)
    padding = (0, 0) if isinstance(layer.padding, str) else layer.padding
    if layer.padding == "same":
        return (x.shape[0], rank, *x.shape[2:])
    sizes = [
        (x.shape[2 + axis] + 2 * padding[axis] - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1) // layer.stride[axis] + 1
        for axis in (0, 1)
    ]
    return (x.shape[0], rank, *sizes)


def _read_alpha(module: LoRAModule, _incompatible_keys: object) -> None:
    """Use the α that was loaded: the file's effect stays what it was, whatever α the network was made with."""
    module.alpha_value = float(module.alpha)
