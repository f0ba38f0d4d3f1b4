"""Swapped blocks: which ones, in which order they come and go, and that nothing but memory and time is different."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory.block_swap import FROZEN_PLACES, TRAINED_PLACES, Pass, kept_in_main_memory, swap_blocks, upcoming
from library.memory.host_activations import keep_on_host
from library.memory.swap_choice import check_count, choose, count_for_share
from library.memory.transfers import InTurn
from library.models.sdxl.layers import BasicTransformerBlock
from library.optim.parameter_steps import ParameterSteps, move_state
from library.optim.updates import UpdateInBackward
from library.options.errors import UserError
from networks.lora_module import LoRAModule
from tests.memory.test_memory_packed import unet_and_lora

CPU = torch.device("cpu")


def test_a_few_very_large_blocks_stay_where_smaller_places_are_worth_more() -> None:
    sizes = [10, 30, 30, 30, 70, 30, 30, 30, 10]
    assert choose(sizes, 6, places=2) == [1, 2, 3, 5, 6, 7]  # 180 less 2 · 30, not 220 less 2 · 70
    assert choose(sizes, 3, places=2) == [2, 5, 7]  # evenly among those of one size
    assert choose(sizes, 9, places=2) == list(range(9))
    assert choose([10, 31, 30, 70], 2, places=1) == [1, 2]  # 61 less 31, which is nearly 101 less 70, for 40 fewer to move
    assert choose([10, 31, 30, 80], 2, places=1) == [1, 2]  # 61 less 31, and not 111 less 80
    assert choose([10, 10, 90, 90], 2, places=1) == [2, 3]
    assert count_for_share(sizes, 300, 0.6, places=2) == 6
    with pytest.raises(UserError, match=r"only 0\.9 of the weights"):
        count_for_share(sizes, 300, 0.95, places=2)
    with pytest.raises(UserError, match="has 9 blocks that can be swapped"):
        check_count(10, 9, places=2)
    with pytest.raises(UserError, match="--blocks_to_swap 3 or more"):
        check_count(2, 9, places=2)


def test_what_comes_next_turns_round_at_the_ends() -> None:
    assert upcoming(2, Pass.FORWARD, 5, 3) == [2, 3, 4]
    assert upcoming(4, Pass.FORWARD, 5, 3) == upcoming(4, Pass.BACKWARD, 5, 3) == [4, 3, 2]
    assert upcoming(3, Pass.FORWARD, 5, 3) == [3, 4, 2]
    assert upcoming(4, Pass.LOOK, 5, 3) == [4, 0, 1]
    assert upcoming(0, Pass.BACKWARD, 5, 3) == upcoming(0, Pass.LOOK, 5, 3) == [0, 1, 2]
    assert upcoming(1, Pass.BACKWARD, 5, 3) == [1, 0, 2]


class Recorded(InTurn):
    """Copies, and notes which blocks come and go; a block's first weight is its number."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def bring(self, target: Tensor, source: Tensor, after: Any) -> None:
        super().bring(target, source, after)
        self.notes.append(f"+{int(source.view(torch.float32)[0])}")

    def take_away(self, target: Tensor, source: Tensor, after: Any) -> None:
        super().take_away(target, source, after)
        self.notes.append(f"-{int(source.view(torch.float32)[0])}")

    def take(self) -> str:
        taken, self.notes = " ".join(self.notes), []
        return taken


class Stack:
    """Five linear layers, of which each is a block; swapped where there are places."""

    def __init__(
        self, places: int | None, transfers: InTurn, monkeypatch: pytest.MonkeyPatch, *, is_trained: bool, recompute: bool
    ):
        self.recompute = recompute
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5)).requires_grad_(is_trained)
        for number, layer in enumerate(self.layers):
            layer.weight.data[0, 0] = number
        monkeypatch.setattr("library.memory.block_swap.transfers_of", lambda device: transfers)
        self.swap = None if places is None else swap_blocks(self.layers, list(self.layers), places, CPU)
        self.places = places

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            assert self.swap is None or len(self.swap.on_device) == self.places
        return x.sum()


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_blocks_are_brought_one_ahead_and_never_taken_back(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    forward = Stack(FROZEN_PLACES, recorded, monkeypatch, is_trained=False, recompute=recompute)
    loss = forward(torch.ones(1, 4, requires_grad=True))
    assert recorded.take() == "+0 +1 +2 +3 +4"
    loss.backward()
    assert recorded.take() == "+2 +1 +0"  # 4 and 3 were still there
    with torch.no_grad():
        forward(torch.ones(1, 4))
    assert recorded.take() == "+2 +3 +4 +0"  # and the next pass begins with 0
    assert sorted(forward.swap.on_device) == [0, 4]


@pytest.mark.parametrize("recompute", [False, True])
def test_trained_blocks_go_back_after_the_backward_pass_alone(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    forward = Stack(TRAINED_PLACES, recorded, monkeypatch, is_trained=True, recompute=recompute)
    loss = forward(torch.ones(1, 4))
    assert recorded.take() == "+0 +1 +2 +3 +4"
    loss.backward()
    assert recorded.take() == "-4 +1 -3 +0"
    forward(torch.ones(1, 4))
    assert recorded.take() == "-0 +3 -1 +4"
    forward.swap.bring_home()
    assert recorded.take() == "-2" and forward.swap.on_device == []


MODES = {
    "kept": (False, {}),
    "computed again": (True, {}),
    "in 8 bits, computed again, activations on the host": (True, {"is_packed": True, "on_host": True}),
    "autocast": (False, {"autocast": True}),
}


def gradients(
    number: int | None, recompute: bool, *, is_packed: bool = False, on_host: bool = False, autocast: bool = False
) -> Any:
    """The loss and the network's gradients of two steps, and the prediction between them."""
    unet, network = unet_and_lora(is_packed, autocast)
    unet.enable_gradient_checkpointing(recompute)
    if on_host:
        keep_on_host(unet, [network], smallest=0)
    if number is not None:
        blocks = list(unet.blocks().values())
        swap_blocks(unet, [blocks[each] for each in choose([1] * len(blocks), number, FROZEN_PLACES)], FROZEN_PLACES, CPU)
        assert len(kept_in_main_memory(unet)) == number
    generator = torch.Generator().manual_seed(1)
    latents, context, vector = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 96), (2, 112)))
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = unet(latents, torch.tensor([10, 700]), context, vector).float().square().mean()
            with torch.no_grad():
                found.append(unet(latents, torch.tensor([10, 700]), context, vector))
        loss.backward()
        found.append(loss.detach())
    return [*found, *(weight.grad for weight in network.parameters())]


@pytest.mark.parametrize("mode", MODES)
def test_predictions_and_gradients_are_the_same_to_the_last_bit(mode: str) -> None:
    recompute, others = MODES[mode]
    plain, swapped = (gradients(number, recompute, **others) for number in (None, 12))
    assert all(torch.equal(*pair) for pair in zip(plain, swapped, strict=True))


def steps_at_full_width(places: int | None, is_trained: bool) -> list[Tensor]:
    """Losses and gradients of two steps of a block as wide as SDXL's between smaller ones, and the weights that are left.

    Trained weights are stepped in the backward pass; beside frozen ones, adapters in all layers get gradients.
    """
    torch.manual_seed(0)
    widths = [(32, 32), (2048, 2560), (32, 32), (32, 32)]
    blocks = nn.ModuleList(BasicTransformerBlock(640, context, 64, inner) for context, inner in widths)
    blocks.bfloat16().requires_grad_(is_trained)
    layers = [] if is_trained else [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)]
    adapters = nn.ModuleList(LoRAModule(layer, rank=4, alpha=4) for layer in layers)
    for adapter in adapters:
        nn.init.normal_(adapter.lora_up.weight, std=0.1)
        adapter.apply_to()
    weights = list((blocks if is_trained else adapters).parameters())
    found: list[Tensor] = []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda parameter: found.append(parameter.grad.clone()))
    if places is not None:
        swap_blocks(blocks, list(blocks), places, CPU)
    updater = UpdateInBackward(ParameterSteps(torch.optim.SGD(weights, lr=0.1)), [[weight] for weight in weights], 0.0)
    x, context = torch.randn(1, 6, 640).bfloat16().requires_grad_(), torch.randn(1, 5, 2048).bfloat16()
    for seed in range(2):
        updater.begin(seed)
        h = x
        for block, (width, _) in zip(blocks, widths, strict=True):
            h = torch.utils.checkpoint.checkpoint(block, h, context[..., :width], use_reentrant=False)
        loss = h.float().square().mean()
        loss.backward()
        found.append(loss.detach())
    return [*found, *(weight.detach() for weight in weights)]


@pytest.mark.parametrize(("is_trained", "places"), [(False, FROZEN_PLACES), (True, TRAINED_PLACES)], ids=["frozen", "trained"])
def test_blocks_of_full_width_train_the_same_to_the_last_bit(is_trained: bool, places: int) -> None:
    plain, swapped = (steps_at_full_width(number, is_trained) for number in (None, places))
    assert len(plain) == len(swapped) > 200 and all(torch.equal(*pair) for pair in zip(plain, swapped, strict=True))
    losses = [each for each in plain if each.ndim == 0]
    assert losses[0] != losses[1], "the first step changed something"


class Late(InTurn):
    """Copies at the last moment: when somebody waits for one, or for one that comes after it on the same lane."""

    def __init__(self) -> None:
        self.lanes: dict[str, list[tuple[Tensor, Tensor, Any]]] = {"in": [], "out": []}

    def bring(self, target: Tensor, source: Tensor, after: Any) -> Any:
        return self._note("in", target, source, after)

    def take_away(self, target: Tensor, source: Tensor, after: Any) -> Any:
        return self._note("out", target, source, after)

    def compute_after(self, mark: Any) -> None:
        self._run(mark)

    def wait(self, mark: Any) -> None:
        self._run(mark)

    def _note(self, lane: str, target: Tensor, source: Tensor, after: Any) -> Any:
        self.lanes[lane].append((target, source, after))
        return lane, len(self.lanes[lane])

    def _run(self, mark: Any) -> None:
        if mark is None:
            return
        lane, end = mark
        for number in range(end):
            target, source, after = self.lanes[lane][number]
            self.lanes[lane][number] = (target, target, None)
            self._run(after)
            if source is not target:
                target.copy_(source)


def trained_states(layers: nn.ModuleList, forward: Any) -> list[Tensor]:
    """The weights while a stack is trained in its backward pass, saved and loaded in between."""
    for weight in layers.parameters():

        def step(parameter: Tensor) -> None:
            parameter.data.sub_(parameter.grad, alpha=1e-4)
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(step)
    found = []
    for number in range(4):
        x = torch.linspace(-1, 1, 12).view(3, 4)
        with torch.no_grad():
            found.append(forward(x))
        forward(x).square().backward()
        saved = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
        found += saved.values()
        if number == 1:
            layers.load_state_dict({name: tensor / 2 for name, tensor in saved.items()})
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_copies_that_are_made_as_late_as_can_be_are_in_time(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(places: int | None, transfers: InTurn) -> list[Tensor]:
        forward = Stack(places, transfers, monkeypatch, is_trained=True, recompute=recompute)
        return trained_states(forward.layers, forward)

    plain = run(None, InTurn())
    for places in (2, 3, 4):
        assert all(torch.equal(*pair) for pair in zip(plain, run(places, Late()), strict=True))
    assert all(not torch.equal(plain[number], plain[number + 11]) for number in range(11))  # something is learned


def test_swapped_weights_are_placed_by_nobody_else_and_the_state_of_their_optimizer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Stack(TRAINED_PLACES, InTurn(), monkeypatch, is_trained=True, recompute=False)
    optimizer = torch.optim.Adam(forward.layers.parameters())
    forward(torch.ones(1, 4)).backward()
    optimizer.step()
    forward.layers.to("meta")
    assert {weight.device.type for weight in forward.layers.parameters()} == {"cpu"} and len(forward.swap.in_main_memory) == 5
    move_state(optimizer, torch.device("meta"))
    of_weight = optimizer.state[forward.layers[0].weight]
    assert of_weight["exp_avg"].device.type == "meta" and of_weight["step"].device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("is_trained", [False, True])
def test_on_a_gpu_nothing_changes_and_nothing_is_waited_for(recompute: bool, is_trained: bool) -> None:
    def run(places: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(8)).requires_grad_(is_trained)
        if places is None:
            layers.to("cuda")
        else:
            swap_blocks(layers, list(layers), places, torch.device("cuda"))
        for weight in layers.parameters():
            if is_trained:
                weight.register_post_accumulate_grad_hook(lambda p: (p.data.sub_(p.grad, alpha=1e-3), setattr(p, "grad", None)))
        x = torch.randn(64, 2048, device="cuda", requires_grad=True)
        found = []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                h = x
                for layer in layers:
                    h = torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False) if recompute else layer(h)
                h.square().mean().backward()
                found.append(h.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [*(each.cpu() for each in [*found, x.grad]), *(tensor.cpu() for tensor in layers.state_dict().values())]

    plain, swapped = run(None), run(TRAINED_PLACES if is_trained else FROZEN_PLACES)
    assert all(torch.equal(*pair) for pair in zip(plain, swapped, strict=True))
