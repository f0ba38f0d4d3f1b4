"""Blocks that run compiled: what they share, what is compiled again, and what runs as it is."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.memory.codecs import CODECS
from library.memory.packed import PackedTensor, pack_layers
from library.models.sdxl.layers import BasicTransformerBlock, run_block
from library.training.compiled_blocks import HOPELESS, CompiledBlocks
from networks.lora_module import LoRAModule
from networks.lora_together import LoRABlock


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu() * self.factor


class Other(Block):
    pass


class Odd(Block):
    """Cannot become one graph."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Compiler:
    """Counts graphs, and how often they run; refuses some."""

    def __init__(self, refuses: Callable[[Tensor], bool] = lambda x: False) -> None:
        self.graphs = self.runs = 0
        self._refuses = refuses

    def __call__(self, graph: Any, inputs: Any) -> Any:
        if self._refuses(next(value for value in inputs if not isinstance(value, nn.Parameter))):
            raise NotImplementedError("too odd\nfor me")
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


def compiled(
    model: nn.Sequential, compiler: Compiler, *, is_all: bool = True, state: Callable[[], Any] = lambda: None
) -> CompiledBlocks:
    return CompiledBlocks({f"block{number}": block for number, block in enumerate(model)}, compiler, state, is_all=is_all)


def train_on(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    out: Tensor = model(x.clone().requires_grad_())
    out.sum().backward()
    return torch.cat([out.detach().flatten(), *(parameter.grad.flatten() for parameter in model.parameters())])  # type: ignore[union-attr]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("library.")]


@pytest.mark.parametrize("is_all", [True, False])
def test_blocks_of_one_kind_share_a_graph_and_run_it_where_gradients_are_recorded(is_all: bool) -> None:
    model, compiler, x = nn.Sequential(Block(), Block(), Block()), Compiler(), torch.randn(2, 4)
    names, expected = list(model.state_dict()), train_on(model, x)
    blocks = compiled(model, compiler, is_all=is_all)
    with torch.no_grad():
        model(x)
    assert not compiler.runs
    for _ in range(2):
        assert torch.equal(train_on(model, x), expected)
    assert (compiler.graphs, compiler.runs, blocks.num_graphs, blocks.num_compiled, len(blocks)) == (1, 6, 1, 3, 3)
    assert list(model.state_dict()) == names
    blocks.undo()
    assert torch.equal(train_on(model, x), expected) and compiler.runs == 6


def test_what_differs_has_a_graph_of_its_own_and_nothing_is_compiled_twice() -> None:
    model, compiler, strength = nn.Sequential(Block(), Block(), Other()), Compiler(), 1.0
    model[1].factor = 0.5
    compiled(model, compiler, state=lambda: strength)
    inputs = [torch.randn(2, 4), torch.randn(3, 4), torch.randn(4, 3).t()]
    for found in (7, 7):  # three kinds of blocks for three kinds of inputs; the last kind is the second's behind the first block
        for x in inputs:
            train_on(model, x)
        assert compiler.graphs == found
    strength = model[0].factor = 3.0
    plain = nn.Sequential(Block(), Block(), Other())
    plain.load_state_dict(model.state_dict())
    for block, mine in zip(plain, model, strict=True):
        block.factor = mine.factor  # type: ignore[assignment]
    assert torch.equal(train_on(model, inputs[0]), train_on(plain, inputs[0])) and compiler.graphs == 10


def test_a_change_that_nobody_told_of_runs_eager() -> None:
    model, compiler, x = nn.Sequential(Block()), Compiler(), torch.randn(2, 4)
    compiled(model, compiler, is_all=False)
    train_on(model, x)
    model[0].factor = 2.0
    doubled = train_on(model, x)
    assert compiler.runs == 1
    model[0].factor = 1.0
    assert torch.equal(doubled, 2 * train_on(model, x)) and compiler.runs == 2


def test_a_kind_or_a_shape_that_cannot_be_compiled_runs_as_it_is_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(Block(), Other(), Other()), torch.randn(2, 4)
    compiler = Compiler(lambda x: x.shape[0] == 5)
    blocks = compiled(model, compiler)
    train_on(model, x)
    graphs, runs = compiler.graphs, compiler.runs
    odd = torch.randn(5, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = train_on(model, odd)
    told = said(caplog)
    assert [message.split(" (")[0] for message in told] == [
        "--torch_compile: the block block0",
        "--torch_compile: the block block1",
    ]
    assert "(Block)" in told[0] and "inputs of 5x4" in told[0] and "too odd" in told[0] and "for me" not in told[0]
    assert (compiler.graphs, compiler.runs) == (graphs, runs)
    train_on(model, x)
    assert compiler.runs == 2 * runs and blocks.num_compiled == 3
    blocks.undo()
    assert torch.equal(train_on(model, odd), found)


def test_a_compiler_that_makes_nothing_is_not_asked_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    model, asked = nn.Sequential(Block()), []
    blocks = compiled(model, Compiler(lambda x: not asked.append(1)))  # type: ignore[func-returns-value]
    for rows in range(1, HOPELESS + 3):
        train_on(model, torch.randn(rows, 4))
    assert len(asked) == HOPELESS and blocks.is_hopeless and not blocks.num_compiled
    assert "cannot compile the model" in said(caplog)[-1] and "goes on without" in said(caplog)[-1]


def test_a_kind_that_cannot_be_compiled_is_not_tried_for_ever_and_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tries, compile_it = [], torch.compile
    monkeypatch.setattr("torch.compile", lambda *given, **more: tries.append(1) or compile_it(*given, **more))
    model, compiler, x = nn.Sequential(*(Odd() for _ in range(HOPELESS + 2)), Other()), Compiler(), torch.randn(2, 4)
    expected = train_on(model, x)
    blocks = compiled(model, compiler)
    assert torch.equal(train_on(model, x), expected)
    assert len(tries) == HOPELESS + 1 and (compiler.graphs, blocks.num_compiled, blocks.is_hopeless) == (1, 1, False)


def test_what_is_not_the_compilers_fault_is_raised() -> None:
    model = nn.Sequential(Block())
    compiled(model, Compiler())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_on(model, torch.randn(2, 3))


def test_a_lora_beside_packed_weights_is_one_graph_that_learns_the_same_and_keeps_no_plain_weight() -> None:
    torch.manual_seed(1)
    block = BasicTransformerBlock(64, 64, 32, 256).requires_grad_(False).bfloat16()
    adapters = {id(layer): LoRAModule(layer, 4, 2.0) for layer in block.modules() if isinstance(layer, nn.Linear)}
    parts = nn.ModuleList(adapters.values())
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_up.weight, std=0.3)
        adapter.apply_to()
    LoRABlock(block, adapters).apply_to()
    pack_layers(block, CODECS["fp8"])
    x, context = torch.randn(1, 6, 64).bfloat16(), torch.randn(1, 5, 64).bfloat16()
    weights = {tuple(weight.shape) for weight in block.parameters() if weight.ndim > 1}

    def learned(*, recompute: bool) -> tuple[list[Tensor], set[tuple[int, ...]]]:
        block.recompute, kept = recompute, []
        parts.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
            out = run_block(block, x.clone().requires_grad_(), context)
        out.float().square().mean().backward()
        plain = {tuple(each.shape) for each in kept if each.dtype == torch.bfloat16 and not isinstance(each, PackedTensor)}
        return [parameter.grad for parameter in parts.parameters()], plain & weights  # type: ignore[misc]

    expected, _ = learned(recompute=False)
    blocks = CompiledBlocks({"block": block}, "aot_eager", lambda: 1.0, is_all=True)
    for recompute in (False, True):
        gradients, plain = learned(recompute=recompute)
        assert not plain and blocks.num_graphs == blocks.num_compiled == 1
        for found, true in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, true, rtol=0.02, atol=0.02 * float(true.abs().max()))
