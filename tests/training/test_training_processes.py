"""What several processes are told of each other, as far as one process shows it."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.options.errors import UsageError
from library.options.groups.distributed import ProcessGroupOptions
from library.options.groups.network import NetworkOptions
from library.options.groups.precision import WorkingPrecisionOptions
from library.training import accelerator
from library.training.network_recipe import freeze_unused, make_network


def test_fp16_without_a_gpu_is_a_mistake_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        accelerator.make_accelerator(WorkingPrecisionOptions(mixed_precision="fp16"), ProcessGroupOptions())


@pytest.mark.parametrize("given", [{}, {"ddp_timeout": 7, "ddp_gradient_as_bucket_view": True, "ddp_static_graph": True}], ids=str)
def test_the_options_of_several_processes_reach_accelerate(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(accelerator, "Accelerator", lambda **arguments: made.update(arguments))
    accelerator.make_accelerator(WorkingPrecisionOptions(), ProcessGroupOptions(**given))
    handlers = {type(handler): handler for handler in made["kwargs_handlers"]}
    ddp = handlers[DistributedDataParallelKwargs]
    assert (ddp.gradient_as_bucket_view, ddp.static_graph, ddp.find_unused_parameters) == (bool(given), bool(given), False)
    group = handlers.get(InitProcessGroupKwargs)
    assert (group and group.timeout) == (timedelta(minutes=7) if given else None)


@pytest.mark.parametrize(("more", "reaches_all"), [([], True), (["module_dropout=0.1"], False)], ids=str)
def test_only_networks_that_drop_modules_let_processes_look_for_unused_parameters(
    more: list[str], reaches_all: bool, tiny_checkpoint: Any
) -> None:
    family = SdxlFamily.open(ModelSource(str(tiny_checkpoint)))
    encoders = family.load_text_encoders(torch.float32, torch.device("cpu"))
    options = NetworkOptions(network_module="networks.lora", network_dim=1, network_args=more)
    network = make_network(options, None, encoders, family.load_denoiser(torch.float32, torch.device("cpu")))
    network.apply_to(encoders, None, True, False)
    assert freeze_unused(network, family, encoders) == reaches_all
    frozen = {name for name, adapter in network.adapters.items() if not adapter.lora_up.weight.requires_grad}
    assert frozen and all(name.startswith("lora_te1_text_model_encoder_layers_2_") for name in frozen)
    assert not freeze_unused(torch.nn.Linear(1, 1), family, encoders)  # a network of others does not say
