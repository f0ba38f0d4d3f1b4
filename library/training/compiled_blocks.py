"""Blocks of a model that run compiled, and each as it is where it cannot be.

PyTorch keeps what it compiled of a function in one list, and before each call looks through all that a graph was made from, for one
graph after the other until one fits: for a transformer block with LoRA over a thousand comparisons each time. Here each graph has a
function of its own; which one is for which block and which inputs is found once, and remembered.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Forward = Callable[..., Any]
Key = tuple[Hashable, ...]

HOPELESS = 3
"""When so many graphs of one kind of block failed and none was made, no more are tried; where this is so of every kind, the
compiler is at fault: there is none, or it does not work here."""


class CompiledBlocks:
    """Blocks that run compiled where gradients are recorded; sample images and validation, with shapes of their own, run eager.

    Only `forward` of each block is replaced: its parameters keep their names and places. Each block becomes one graph, which blocks
    of its kind share, or runs as it is.

    Args:
        blocks: of few kinds, by name; each takes tensors.
        backend: the compiler.
        state: gives what may change from batch to batch and decides what the blocks compute, beside their inputs and weights.
        is_all: whether `state` is all of that. Else PyTorch looks for changes itself, and runs eager what was changed.
    """

    def __init__(
        self, blocks: Mapping[str, nn.Module], backend: str | Forward, state: Callable[[], Hashable], *, is_all: bool
    ) -> None:
        self._backend = backend
        self._state = state
        self._stance: dict[str, Any] = {"skip_guard_eval_unsafe": True} if is_all else {"stance": "eager_on_recompile"}
        self._graphs: dict[Key, list[Forward]] = defaultdict(list)
        self._failures: set[tuple[str, str]] = set()
        self._num_failed: Counter[str] = Counter()
        self._blocks = dict(blocks)
        self._kinds = {name: type(block).__name__ for name, block in blocks.items()}
        self._eager: dict[str, Forward] = {name: block.forward for name, block in blocks.items()}
        self._chosen: dict[str, dict[Key, Forward]] = {name: {} for name in blocks}
        for name, block in blocks.items():
            block.forward = self._forward_of(name)

    @property
    def num_graphs(self) -> int:
        """How many were compiled."""
        return sum(map(len, self._graphs.values()))

    @property
    def num_compiled(self) -> int:
        """How many blocks run compiled for some of the inputs that they were given."""
        return sum(any(run is not self._eager[name] for run in chosen.values()) for name, chosen in self._chosen.items())

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing can be compiled."""
        return all(map(self._is_hopeless, self._kinds.values()))

    def _is_hopeless(self, kind: str) -> bool:
        return self._num_failed[kind] >= HOPELESS and not any(made for (own, *_), made in self._graphs.items() if own == kind)

    def __len__(self) -> int:
        return len(self._blocks)

    def give_up(self, error: Exception) -> None:
        """Say that everything runs without."""
        log.warning(
            "--torch_compile: %s cannot compile the model (%s); training goes on without it.", self._backend, first_line(error)
        )

    def undo(self) -> None:
        """Run as before."""
        for name, block in self._blocks.items():
            block.forward = self._eager[name]

    def _forward_of(self, name: str) -> Forward:
        eager, chosen, stance = self._eager[name], self._chosen[name], self._stance

        def forward(*inputs: Tensor) -> Any:
            if not torch.is_grad_enabled():
                return eager(*inputs)
            key = self._key(inputs)
            run = chosen.get(key)
            if run is None:
                return self._first(name, key, inputs)
            if run is eager:
                return eager(*inputs)
            with torch.compiler.set_stance(**stance):
                return run(eager, *inputs)

        return forward

    def _key(self, inputs: tuple[Tensor, ...]) -> Key:
        """Return everything beside its weights by which a block may have to be compiled again."""
        autocast = torch.is_autocast_enabled(inputs[0].device.type)
        return self._state(), autocast, *((x.shape, x.stride(), x.dtype, x.requires_grad) for x in inputs)

    def _first(self, name: str, key: Key, inputs: tuple[Tensor, ...]) -> Any:
        """Find or make the graph of a block for inputs it is given for the first time, and run it."""
        eager, chosen = self._eager[name], self._chosen[name]
        kind = self._kinds[name]
        graphs = self._graphs[kind, *key]
        for graph in graphs:  # of another block, which may be of other sizes or have other adapters: PyTorch compares everything
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    out = graph(eager, *inputs)
            except RuntimeError as error:
                if "fail_on_recompile" not in str(error):
                    raise
                continue
            chosen[key] = graph
            return out
        if self._is_hopeless(kind):
            chosen[key] = eager
            return eager(*inputs)
        graph = self._compiled()
        try:
            with self._settings():
                out = graph(eager, *inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise exceptions of all kinds
            out = eager(*inputs)  # what is not the compiler's fault comes again
            chosen[key] = eager
            self._tell(name, inputs, error)
            return out
        graphs.append(graph)
        chosen[key] = graph
        return out

    def _compiled(self) -> Forward:
        """Return a function that runs a block compiled: (the block's own forward, its inputs)."""
        # Random numbers come from PyTorch's generators then, as they do without a compiler.
        options: dict[str, Any] | None = {"fallback_random": True} if self._backend == "inductor" else None
        code = _call.__code__.replace(co_name=f"block_{self.num_graphs + self._num_failed.total()}")
        return torch.compile(
            FunctionType(code, _call.__globals__), backend=self._backend, dynamic=False, fullgraph=True, options=options
        )

    def _settings(self) -> Any:
        """Return the context in which a graph's backward pass is compiled with it, so that what fails fails at its block."""
        import torch._functorch.config as settings  # not before it is needed: it takes a second

        return settings.patch(force_non_lazy_backward_lowering=True)

    def _tell(self, name: str, inputs: tuple[Tensor, ...], error: Exception) -> None:
        """Say once for each kind of block and reason that it cannot be compiled."""
        kind, reason = self._kinds[name], first_line(error)
        self._num_failed[kind] += 1
        if self.is_hopeless:
            self.give_up(error)
        if self.is_hopeless or (kind, reason) in self._failures:
            return
        self._failures.add((kind, reason))
        shape = "x".join(map(str, inputs[0].shape))
        log.warning(
            "--torch_compile: the block %s (%s) cannot be compiled by %s for inputs of %s (%s). It runs without, and so does every "
            "block of its kind that fails for this reason.",
            name,
            kind,
            self._backend,
            shape,
            reason,
        )


def first_line(error: Exception) -> str:
    """Return what an exception says, or is called; PyTorch wraps those of compilers."""
    inner = getattr(error, "inner_exception", error)
    return (str(inner).strip() or type(inner).__name__).splitlines()[0]


def _call(forward: Forward, *inputs: Tensor) -> Any:
    """Run a block; a function of its own, as compiled forms are kept by function."""
    return forward(*inputs)
