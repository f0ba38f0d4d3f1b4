"""Whose method a layer's `forward` is: adapters put theirs in its place. Asked in a way that PyTorch's compiler follows too.

To the compiler of PyTorch 2.11, no method has a `__self__` when `getattr` is asked with a default; layers with adapters would pass
for layers that something unknown was done to, and be computed one by one.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any


def owner_of(forward: Callable[..., Any]) -> Any:
    """Return the object whose method this is; None for a plain function."""
    return forward.__self__ if isinstance(forward, MethodType) else None


def function_of(forward: Callable[..., Any]) -> Any:
    """Return the function that this method was bound from; None for a plain function."""
    return forward.__func__ if isinstance(forward, MethodType) else None
