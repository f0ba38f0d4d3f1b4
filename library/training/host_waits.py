"""Where the host waits for the device while it trains: every such place keeps a GPU from being given its next work in time.

On CUDA, PyTorch reports them itself. On a CPU nothing waits, so the operations are watched that would: those that need the value of
something that lies on the device, or bring it to the host. What lies on the device is known from the start (the model and the
batches) and followed from there.
"""

import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from library.dataset.batch import Batch
from library.training.feeding import Sent
from library.training.loop import TrainingRun

NEED_VALUES = frozenset(
    {
        "_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "_unique", "_unique2", "unique_dim",
        "unique_consecutive", "unique_dim_consecutive", "equal", "allclose", "bincount", "repeat_interleave",
    }
)  # fmt: skip
"""Operations whose result, or its shape, depends on values."""
BRING_BACK: frozenset[Any] = frozenset({Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__})
"""Methods whose result is on the host."""
INDEXING = frozenset({"index", "index_put", "index_put_"})
WAYS_OUT = frozenset({"library/training/async_scalars.py", "library/optim/finite.py"})
"""Files that take another way on a GPU, where they do not wait."""
_PROJECT = f"{Path(__file__).resolve().parents[2]}/"


@contextmanager
def watched(run: TrainingRun) -> Iterator[Counter[str]]:
    """Give what counts the times the host waits for the device inside the block, by place in the code; complete at its end.

    Args:
        run: its model, and the batches that are sent to it, lie on the device.
    """
    if run.accelerator.device.type == "cuda":
        with _reported() as found:
            yield found
        return
    step: Any = run.accelerator.unwrap_model(run.step)
    encoders = [encoder for encoder in step.parts.text_encoders if encoder is not None]
    with watching(each for part in (step, step.parts.denoiser, *encoders) for each in part.parameters()) as known:
        send = run.send

        def send_known(batch: Batch) -> Sent:
            known.follow(batch.tensors())
            return send(batch)

        run.send = send_known
        try:
            yield known.found
        finally:
            run.send = send


@contextmanager
def watching(tensors: Iterable[Tensor]) -> Iterator["DeviceValues"]:
    """Watch, on a CPU, who needs the values of some tensors or of what is made of them.

    Args:
        tensors: that lie on the device in thought.
    """
    known = DeviceValues()
    known.follow(tensors)
    with _Calls(known), _Operations(known):
        yield known


@contextmanager
def _reported() -> Iterator[Counter[str]]:
    """Count the warnings of CUDA's debug mode."""
    found: Counter[str] = Counter()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found.update(f"{each.filename}:{each.lineno}" for each in caught if "synchronizing CUDA operation" in str(each.message))


class DeviceValues:
    """Follows what lies on the device, and counts who needs its values."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        """Places, and how often each waited."""
        self._storages: set[int] = set()

    def follow(self, values: Any) -> None:
        """Follow the tensors among some values, and all their views."""
        for storage in _storages(list(values)):
            if storage._cdata not in self._storages:
                self._storages.add(storage._cdata)
                weakref.finalize(storage, self._storages.discard, storage._cdata).atexit = False

    def has(self, values: Any) -> bool:
        """Say whether a tensor among some values lies on the device."""
        return any(storage._cdata in self._storages for storage in _storages(values))

    def waits(self, what: str) -> None:
        """Count a wait at the innermost place of the project."""
        frames = [each for each in traceback.extract_stack() if each.filename != __file__]
        place = next((each for each in reversed(frames) if _is_ours(each.filename)), frames[-1])
        name = place.filename.removeprefix(_PROJECT)
        if name not in WAYS_OUT:
            self.found[f"{name}:{place.lineno} ({what})"] += 1


class _Calls(TorchFunctionMode):
    """Sees methods that bring values to the host; on a CPU most of them are no operation at all."""

    def __init__(self, known: DeviceValues) -> None:
        super().__init__()
        self._known = known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count such a method of what lies on the device."""
        kwargs = kwargs or {}
        brings = func in BRING_BACK or (func is Tensor.to and "cpu" in (*args[1:], *kwargs.values()))
        if brings and self._known.has(args[0]):
            self._known.waits(func.__name__)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Sees operations that need values, and what is made of what lies on the device."""

    def __init__(self, known: DeviceValues) -> None:
        super().__init__()
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count such an operation, and follow what others make."""
        kwargs = kwargs or {}
        is_known = self._known.has((args, kwargs))
        name = func.overloadpacket.__name__
        if is_known and (name in NEED_VALUES or (name in INDEXING and _has_masks(args[1]))):
            self._known.waits(name)
        result = func(*args, **kwargs)
        if is_known:
            self._known.follow([result])
        return result


def _is_ours(file: str) -> bool:
    return file.startswith(_PROJECT) and "site-packages" not in file  # the environment may lie in the project's folder


def _storages(values: Any) -> Iterator[Any]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and not is_traceable_wrapper_subclass(leaf):
            yield leaf.untyped_storage()
        elif isinstance(leaf, Tensor):
            yield from _storages([getattr(leaf, name) for name in cast(Any, leaf).__tensor_flatten__()[0]])


def _has_masks(indices: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(indices))
