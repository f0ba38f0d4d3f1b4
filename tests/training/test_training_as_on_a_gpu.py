"""What a step does on a GPU, seen without one: its forward pass on tensors that have a device and no data."""

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.pretend import PretendAccelerator, fake_tensors
from library.models.sdxl.layers import Attention
from library.options.groups.bench import BenchOptions
from library.options.groups.optimizer import OptimizerOptions
from library.options.groups.precision import StepPrecisionOptions
from library.training.feeding import Sent
from tools.bench_step import make_run

GPU = torch.device("cuda", 0)


class Upcasts(TorchDispatchMode):
    """Notes where tensors of the U-Net become float32: what autocast does for some operations on a GPU, and not on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16 and result.dtype == torch.float32:
            frame = next(each for each in reversed(traceback.extract_stack()) if "/library/" in each.filename)
            self.found.append(f"{frame.filename}:{frame.lineno}")
        return result


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let autocast believe in a GPU, and leave out what only a real one can do: streams and the backward pass."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    monkeypatch.setattr("library.training.loop.sender", lambda device: lambda batch: Sent(batch, batch.to(device)))


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stand for the kernels of a GPU; without one PyTorch would trace two products and a softmax in float32."""
    return q * k.mean() * v.mean()


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize(("mode", "weights"), [("lora", {"base_quant": "nf4"}), ("finetune", {})])
def test_everything_of_a_step_is_on_the_gpu_and_the_unet_computes_in_bfloat16(mode: Any, weights: dict[str, Any]) -> None:
    upcasts = Upcasts()
    with fake_tensors():
        accelerator = PretendAccelerator(GPU, torch.bfloat16)
        bench = BenchOptions(mode=mode, size="tiny", resolution=256, network_dim=4)
        precision = StepPrecisionOptions(mixed_precision="bf16", **weights)
        run, batch = make_run(bench, precision, OptimizerOptions(), accelerator, torch.device("meta"))
        for module in run.step.parts.denoiser.modules():  # type: ignore[union-attr]
            if isinstance(module, Attention):
                module.attend = fused_attention
        with upcasts:
            losses = run.step(run.send(batch).arrive())  # tensors on two devices would be an error
    assert losses.device == GPU and losses.dtype == torch.float32
    assert not [place for place in upcasts.found if "/diffusion/" not in place], "the loss alone is computed in float32"
