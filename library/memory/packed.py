"""Frozen weights in fewer bits: tensors that are stored packed and unpacked layer by layer, each time one is used.

A `PackedTensor` takes the place of a layer's weight and looks like one of the number type it was made for. `F.linear` and
`F.conv2d` keep the packed weight for the backward pass and unpack it there again, so that autograd never holds a full copy, and
`weight.to(dtype)` gives a plain tensor. Every other reading operation sees the unpacked values; nothing can write to a packed one.

Shapes: N rows (all axes but the last), I and O input and output features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input
from torch.utils._pytree import tree_map

from library.models.number_types import product_dtype
from library.models.weights import Hold

_aten = torch.ops.aten


class Codec(Protocol):
    """One way to store a tensor in fewer bits."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def accepts(self, shape: torch.Size) -> bool:
        """Tell whether a layer's weight of this shape, (O, I, …), is packed; otherwise it stays as it is."""

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that stand for a floating-point tensor; the first may have its shape, and with it its strides."""

    def unpack(self, parts: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a new tensor of `shape` and `dtype` from what `pack` gave.

        Its strides are those of the first part, where that has the shape; otherwise those of rows, or of channels last.
        """


_FEW = 256
"""Elements of tables, which may as well be kept."""


@torch.library.custom_op("atelier::once_there", mutates_args=())
def _once_there(part: Tensor, other: Tensor) -> Tensor:
    """Return a copy of `part`, made when `other` is there."""
    return part.clone()


@_once_there.register_fake
def _(part: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(part)


def _is_compiled() -> bool:
    """Whether a compiler looks on. PyTorch 2.11 calls methods of tensor classes a stage later than `is_compiling` speaks of."""
    return torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None


class PackedTensor(Tensor):
    """A tensor that is stored by a codec.

    Args:
        parts: as the codec packed them.
        codec: unpacks them.
        shape: of the tensor they stand for.
        dtype: that it pretends to have.
    """

    codec: Codec

    @staticmethod
    def __new__(cls, parts: tuple[Tensor, ...], codec: Codec, shape: torch.Size, dtype: torch.dtype) -> "PackedTensor":
        """Make a tensor without memory of its own."""
        first = parts[0]
        strides = first.stride() if first.shape == shape else _strides(shape)
        return Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=first.device)

    def __init__(self, parts: tuple[Tensor, ...], codec: Codec, shape: torch.Size, dtype: torch.dtype) -> None:
        self.codec = codec
        self._names = [f"part{number}" for number in range(len(parts))]
        for name, part in zip(self._names, parts, strict=True):
            setattr(self, name, part)  # attributes of their own: torch.compile looks for them by the names of __tensor_flatten__

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What the codec packed."""
        return tuple(getattr(self, name) for name in self._names)

    @classmethod
    def pack(cls, tensor: Tensor, codec: Codec, dtype: torch.dtype | None = None) -> "PackedTensor":
        """Pack a floating-point tensor where it is.

        Args:
            tensor: any floating-point type.
            codec: packs it.
            dtype: that the result pretends to have; None for the tensor's own.
        """
        return cls(codec.pack(tensor.detach()), codec, tensor.shape, dtype or tensor.dtype)

    def unpack(self, dtype: torch.dtype | None = None, after: Tensor | None = None) -> Tensor:
        """Return the values as a new plain tensor.

        Args:
            dtype: of the result; None for the type it pretends to have.
            after: a tensor that is there before: a compiler, which sees the same values unpacked for the forward pass, would keep
                them from then on instead of unpacking them for a gradient.
        """
        parts = self.parts
        if after is not None and _is_compiled():
            parts = tuple(_once_there(part, after) if part.numel() > _FEW else part for part in parts)
        return self.codec.unpack(parts, self.shape, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch annotates only the type
        return f"PackedTensor({self.codec.name}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return self._names, (self.codec, self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], about: Any, outer_size: Any, outer_stride: Any) -> "PackedTensor":
        return PackedTensor(tuple(inner.values()), *about)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        layer = _LAYERS.get(func)
        if layer is not None and isinstance(args[1], PackedTensor) and not isinstance(args[0], PackedTensor):
            return layer(*args, **kwargs)
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], torch.dtype):
            return args[0].unpack(args[1])
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], Tensor) and isinstance(args[0], PackedTensor):
            return args[0].unpack(args[1].dtype, after=args[1])
        if func == Tensor.data.__set__ and not isinstance(args[1], PackedTensor):  # type: ignore[attr-defined]
            raise TypeError(f"a tensor that is packed as {args[0].codec.name} cannot be given other values")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a plain function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default, _aten.clone.default):
            return args[0]._changed(lambda part: func(part, **_for_part(kwargs, part, args[0])))
        if func is _aten._to_copy.default:  # moved with its layer, or told to look like another number type
            dtype = kwargs.pop("dtype", None)
            return args[0]._changed(lambda part: func(part, **_for_part(kwargs, part, args[0])), dtype)
        if func._schema.is_mutable:
            raise TypeError(f"{func} would change a tensor that is packed as {args[0].codec.name}; unpack it first")
        return func(*tree_map(_unpacked, args), **tree_map(_unpacked, kwargs))

    def _changed(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "PackedTensor":
        return PackedTensor(tuple(change(part) for part in self.parts), self.codec, self.shape, dtype or self.dtype)


def _strides(shape: torch.Size) -> tuple[int, ...] | None:
    """Return the strides of a convolution's weight that is laid out channels last; None for other shapes, laid out in rows."""
    if len(shape) != 4:
        return None
    _, inputs, height, width = shape
    return (inputs * height * width, 1, inputs * width, inputs)


def _for_part(kwargs: Mapping[str, Any], part: Tensor, whole: Tensor) -> dict[str, Any]:
    """Leave out the memory format for parts that are laid out otherwise than the tensor they stand for."""
    return {name: value for name, value in kwargs.items() if name != "memory_format" or part.ndim == whole.ndim}


def _unpacked(value: Any) -> Any:
    return value.unpack() if isinstance(value, PackedTensor) else value


def hold_packed(codec: Codec) -> Hold:
    """Return what keeps the weights of linear layers and convolutions packed, and everything else as it is."""

    def hold(owner: nn.Module, tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
        is_weight = isinstance(owner, nn.Linear | nn.Conv2d) and tensor.ndim > 1 and codec.accepts(tensor.shape)
        return PackedTensor.pack(tensor, codec, dtype) if is_weight else None

    return hold


def pack_layers(module: nn.Module, codec: Codec) -> None:
    """Pack the weights of a module's linear layers and convolutions where they are, one after the other, and freeze them."""
    hold = hold_packed(codec)
    for layer in module.modules():
        weight = layer._parameters.get("weight")
        packed = None if weight is None else hold(layer, weight, weight.dtype)
        if packed is not None:
            layer.weight = nn.Parameter(packed, requires_grad=False)


# --- layers with a packed weight ----------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = _PackedLinear.apply(x, weight, bias, product_dtype(x))
    return out


def _conv2d(
    x: Tensor,
    weight: PackedTensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str):  # uneven padding is for torch to work out; autograd keeps a copy then
        conv2d: Any = F.conv2d
        same: Tensor = conv2d(x, weight.unpack(product_dtype(x)), bias, stride, padding, dilation, groups)
        return same
    geometry = tuple((n, n) if isinstance(n, int) else tuple(n) for n in (stride, padding, dilation))
    out: Tensor = _PackedConv2d.apply(x, weight, bias, product_dtype(x), geometry, groups)
    return out


_LAYERS: Mapping[Any, Callable[..., Tensor]] = {F.linear: _linear, F.conv2d: _conv2d}
"""The functions of layers, which know what to do with a packed weight."""


class _PackedLinear(torch.autograd.Function):
    """Wx + b with W frozen: nothing but the packed W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(weight)
        return F.linear(x.to(dtype), weight.unpack(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.unpack(grad.dtype, after=grad)).view(*grad.shape[:-1], -1).to(ctx.x_dtype)
        return grad_x, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _PackedConv2d(torch.autograd.Function):
    """The convolution case; see `_PackedLinear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: PackedTensor, bias: Tensor | None, dtype: torch.dtype, geometry: Any, groups: int
    ) -> Tensor:
        ctx.x_dtype, ctx.x_shape, ctx.geometry, ctx.groups = x.dtype, x.shape, geometry, groups
        ctx.save_for_backward(weight)
        stride, padding, dilation = geometry
        bias = None if bias is None else bias.to(dtype)
        return F.conv2d(x.to(dtype), weight.unpack(dtype), bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation = ctx.geometry
            plain = weight.unpack(grad.dtype, after=grad)
            grad_x = conv2d_input(ctx.x_shape, plain, grad, stride, padding, dilation, ctx.groups).to(ctx.x_dtype)
        return grad_x, None, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None, None
