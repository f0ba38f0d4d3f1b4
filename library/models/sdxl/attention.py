"""The ways to compute softmax(q kᵀ / √D) v. All give the same numbers up to rounding; they differ in speed and memory.

Shapes: B batch, L query tokens, S key tokens, H heads, D head width.
"""

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.options.errors import UserError

logger = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, L, H, D), k and v (B, S, H, D) to (B, L, H, D)."""


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let PyTorch choose the kernel (flash, memory-efficient, cuDNN …)."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def memory_efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's memory-efficient kernel: never holds the (L, S) matrix."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and a softmax; holds the (B, H, L, S) matrix."""
    scores = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhls,bshd->blhd", scores.softmax(dim=-1).to(v.dtype), v)


def _load_xformers() -> Attend:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise UserError(
            "--xformers needs the package xformers, which is not installed: `pip install xformers`, "
            "or use --sdpa instead, which needs nothing and is as fast."
        ) from error
    attend: Attend = memory_efficient_attention
    return attend


def _load_memory_efficient() -> Attend:
    logger.info("--mem_eff_attn uses PyTorch's memory-efficient attention kernel.")
    return memory_efficient


_KINDS: dict[str, Callable[[], Attend]] = {
    "sdpa": lambda: sdpa,
    "xformers": _load_xformers,
    "mem_eff_attn": _load_memory_efficient,
    "plain": lambda: plain,
}


def load_attention(kind: str) -> Attend:
    """Return the attention function called `kind`.

    Args:
        kind: "sdpa", "xformers", "mem_eff_attn" or "plain".

    Raises:
        UserError: the package it needs is not installed.
    """
    return _KINDS[kind]()
