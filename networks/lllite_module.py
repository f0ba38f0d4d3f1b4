"""One ControlNet-LLLite module: a control image moves what one frozen linear layer is given.

y = W(x + m·U(M[E, D x])): D, M and U are small linear layers (the first two end in ReLU), E are features that convolutions make of
the control image, one row for each token of the layer's input (kohya-ss 2023, "ControlNet-LLLite").

Shapes: B rows of the model's input, N control images (B is N, or a multiple of it under guidance), T tokens, c `cond_emb_dim`,
r `mlp_dim`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}
"""Strides (and kernels) of the convolutions by depth: the layer's tokens are 8, 16 or 32 pixels apart."""


class LLLiteModule(nn.Module):
    """Adds m·U(M[E, D x]) to the input of a linear layer; starts without effect.

    Args:
        layer: the frozen layer; its `forward` is replaced by `apply_to`.
        depth: 1, 2 or 3: how far the layer's tokens are apart, see `STRIDES`.
        cond_emb_dim: c, width of the control image's features; even, at least 2.
        mlp_dim: r, inner width, at least 1.
        dropout: probability of dropping each value of M's output while training, in [0, 1).
        multiplier: m.
    """

    def __init__(
        self, layer: nn.Linear, depth: int, cond_emb_dim: int, mlp_dim: int, dropout: float = 0.0, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.dropout = dropout
        self._layer = (layer,)  # in a tuple, so that the frozen layer does not become a part of the network
        self._plain_forward: Callable[[Tensor], Tensor] = layer.forward
        self.conditioning1 = _convolutions(STRIDES[depth], cond_emb_dim)
        self.down = nn.Sequential(nn.Linear(layer.in_features, mlp_dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(mlp_dim + cond_emb_dim, mlp_dim), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(mlp_dim, layer.in_features))
        nn.init.zeros_(self.up[0].weight)  # type: ignore[arg-type]  # a Sequential's item is a plain Module to mypy
        nn.init.zeros_(self.up[0].bias)  # type: ignore[arg-type]  # or the untrained module would change the model
        self.features: Tensor | None = None
        """E (N, T, c) of the control images at hand; None leaves the layer as it is."""

    def apply_to(self) -> None:
        """Put the module into the layer's forward pass; several may stand one upon another."""
        layer = self._layer[0]
        self._plain_forward = layer.forward
        layer.forward = self.forward  # type: ignore[method-assign, assignment]

    def see(self, images: Tensor | None) -> None:
        """Take the control images (N, 3, H, W) in [-1, 1] that the next calls follow; None for none."""
        self.features = None if images is None else self.conditioning1(images).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for x (B, T, in)."""
        if self.features is None or self.multiplier == 0:
            return self._plain_forward(x)
        return self._plain_forward(x + self.multiplier * self.shift(x).to(x.dtype))

    def shift(self, x: Tensor) -> Tensor:
        """Return U(M[E, D x]), (B, T, in), in autocast's type or that of the weights.

        Raises:
            ValueError: the control images are of another size or number than the pictures.
        """
        features = self._features_for(x)
        weight = self.down[0].weight
        inner = self.down(x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype))  # type: ignore[arg-type]
        inner = self.mid(torch.cat([features.to(inner.dtype), inner], dim=-1))
        return self.up(F.dropout(inner, self.dropout, self.training and self.dropout > 0))  # type: ignore[no-any-return]

    def _features_for(self, x: Tensor) -> Tensor:
        features = self.features
        if features is None or x.shape[0] % features.shape[0] or x.shape[1] != features.shape[1]:
            shape = None if features is None else tuple(features.shape[:2])
            raise ValueError(
                f"control images of {shape} rows and tokens do not fit pictures of {tuple(x.shape[:2])}: they must have the "
                "pictures' size and number"
            )
        repeats = x.shape[0] // features.shape[0]
        return features if repeats == 1 else features.repeat(repeats, 1, 1)


def _convolutions(strides: tuple[int, ...], width: int) -> nn.Sequential:
    """Return the convolutions of a depth, 3 → c/2 → … → c channels, with ReLU between them."""
    channels = [3, *[width // 2] * (len(strides) - 1), width]
    layers: list[nn.Module] = []
    for index, stride in enumerate(strides):
        layers += [nn.ReLU()] if index else []
        layers.append(nn.Conv2d(channels[index], channels[index + 1], kernel_size=stride, stride=stride))
    return nn.Sequential(*layers)
