"""Tensors of a model's parts as they lie in files: known by name and shape, read one at a time, renamed and reshaped on the way.

Nothing here holds a tensor: a part is filled tensor by tensor into a module built without memory, so that loading never needs
more than the finished weights and one tensor.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.files.safetensors_io import TensorFile

Hold = Callable[[nn.Module, Tensor, torch.dtype], Tensor | None]
"""(layer, tensor read for it, wanted type) to what the layer holds instead, such as the tensor in fewer bits; None: the tensor."""


@dataclass(frozen=True)
class Entry:
    """One tensor that can be read from a file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> "Entry":
        """Return the tensor this becomes by `change`, which has `shape`."""
        return Entry(shape, lambda: change(self.read()))


Part = dict[str, Entry]
"""The tensors of one part of a model, by the names of the module they go into."""


def entries(file: TensorFile) -> Part:
    """Return all tensors of an open file, under the file's names."""

    def entry(name: str) -> Entry:
        return Entry(file.infos[name].shape, lambda: file[name])

    return {name: entry(name) for name in file}


def shapes(part: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a part."""
    return {name: entry.shape for name, entry in part.items()}


def without_prefix(part: Mapping[str, Entry], prefix: str) -> Part:
    """Return the tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: entry for name, entry in part.items() if name.startswith(prefix)}


def disagreements(part: Mapping[str, Entry], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tell, one phrase each, which tensors a part lacks, or has in another shape than is `wanted`."""
    problems = []
    for name, shape in wanted.items():
        entry = part.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
        elif entry.shape != shape:
            problems.append(f"{name} has the shape {list(entry.shape)} instead of {list(shape)}")
    return problems


def fill(
    module: nn.Module,
    part: Mapping[str, Entry],
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    hold: Hold | None = None,
) -> nn.Module:
    """Read a part into a module that was built on the meta device, tensor by tensor, and return it frozen and in evaluation mode.

    Args:
        module: all its persistent tensors are on the meta device; its other buffers are real.
        part: has at least the module's tensors.
        names: each of the module's tensor names, and what the part calls it.
        dtype: of the floating-point tensors.
        device: where they go.
        hold: what layers keep instead of some tensors.
    """

    def kept(name: str, tensor: Tensor) -> Tensor:
        owner = module.get_submodule(name.rpartition(".")[0])
        held = hold(owner, tensor.to(device), dtype) if hold is not None and tensor.is_floating_point() else None
        return _own(tensor, dtype, device) if held is None else held

    module.load_state_dict({name: kept(name, part[stored].read()) for name, stored in names.items()}, assign=True)
    return module.to(device).eval().requires_grad_(False)


def _own(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous tensor that shares no memory with the file, which others may overwrite."""
    wanted = dtype if tensor.is_floating_point() else tensor.dtype
    if device.type == "cpu":
        return tensor.to(wanted, copy=True, memory_format=torch.contiguous_format)
    # Moved first: converting on the device is faster, and half-precision files cross the bus at half the size.
    return tensor.to(device, memory_format=torch.contiguous_format).to(wanted)


def content_hash(part: Mapping[str, Entry]) -> str:
    """Hash names, dtypes, shapes and values: the same weights give the same 16 hexadecimal digits whatever file they are in."""
    digest = hashlib.sha256()
    for name in sorted(part):
        tensor = part[name].read().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
