"""Memory that is full: what is said to have been in it, and what is advised."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.options.errors import UserError
from library.options.groups.cache import CacheOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.ema import EmaOptions
from library.options.scripts import (
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
)
from library.training.out_of_memory import Resident, Sizes, remedies, telling_of_memory, telling_of_memory_while_caching

MIB = 2**20


def fill(resident: Resident) -> None:
    """Put a denoiser of 2 MiB, encoders of 1 MiB and a trained layer of 4 MiB with its state there."""
    trained: Any = nn.Linear(1024, 1024, bias=False)
    trained(torch.ones(1, 1024)).sum().backward()
    optimizer = torch.optim.Adam(trained.parameters())
    optimizer.step()
    denoiser = nn.Linear(512, 1024, bias=False).requires_grad_(False)
    encoder = nn.Linear(512, 512, bias=False).requires_grad_(False)
    parts: Any = SimpleNamespace(denoiser=denoiser, text_encoders=[encoder, None], vae=None)
    saver: Any = SimpleNamespace(
        live=SimpleNamespace(module=trained, optimizer=optimizer, extras={"ema": nn.Linear(512, 1536, bias=False)})
    )
    resident.parts, resident.saver = parts, saver


def run_out(error: Exception) -> None:
    with telling_of_memory(SdxlTrainNetworkOptions()) as resident:
        fill(resident)
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes."),
        MemoryError("no room"),
    ],
)
def test_full_memory_tells_what_was_in_it_and_what_makes_room(error: Exception) -> None:
    with pytest.raises(UserError) as told:
        run_out(error)
    text = str(told.value)
    assert told.value.exit_status == 1 and str(error) in text and "while it trained" in text
    for line in (
        "trained weights: 4.0 MiB", "U-Net: 2.0 MiB", "text encoders: 1.0 MiB", "gradients: 4.0 MiB", "optimizer state: 8.0 MiB",
        "--optimizer_type AdamW8bit: three quarters of the optimizer's state (6.0 MiB)", "--base_quant int8: ", "(1.0 MiB)",
        "moving average of the weights: 3.0 MiB",
    ):  # fmt: skip
        assert line in text
    assert "VAE:" not in text


def test_full_memory_before_training_is_told_so_and_other_errors_pass() -> None:
    with pytest.raises(UserError, match="before training"), telling_of_memory(SdxlTrainNetworkOptions()):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), telling_of_memory(SdxlTrainNetworkOptions()):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("options", "what", "advised"),
    [
        (CacheLatentsOptions(cache=CacheOptions(vae_batch_size=4)), "pictures", "--vae_batch_size 1 instead of 4"),
        (
            CacheLatentsOptions(),
            "pictures",
            "--vae_tiling: pictures with a side above 1024 are encoded in tiles, with slightly other latents",
        ),
        (
            CacheTextEncoderOutputsOptions(dataset=DatasetOptions(train_batch_size=3)),
            "captions",
            "--train_batch_size 1 instead of 3",
        ),
    ],
)
def test_full_memory_of_the_caching_tools_is_told(options: Any, what: str, advised: str) -> None:
    with (
        pytest.raises(UserError, match=f"while {what} were encoded.*goes on there") as told,
        telling_of_memory_while_caching(options),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert f"  - {advised}" in str(told.value).splitlines() and "  - --mixed_precision bf16" in str(told.value)
    with pytest.raises(RuntimeError, match="another"), telling_of_memory_while_caching(options):
        raise RuntimeError("another")


def test_only_what_was_not_given_is_advised_and_each_script_its_own() -> None:
    sizes = Sizes(trained=4 * MIB, peak=100 * MIB)
    network, whole = SdxlTrainNetworkOptions(), SdxlTrainOptions()
    assert "  activations and the rest, at the peak: 96.0 MiB" in sizes.lines()
    assert not any("fused_backward_pass" in each or "full_bf16" in each for each in remedies(network, sizes))
    assert not any("base_quant" in each for each in remedies(whole, sizes))
    on_device = SdxlTrainNetworkOptions(ema=EmaOptions(ema_decay=0.9, ema_device="device"))
    assert next(remedies(on_device, Sizes(average=3 * MIB))) == "--ema_device cpu: the moving average of the weights (3.0 MiB)"
    assert "--fused_backward_pass: nearly all gradients (4.0 MiB)" in remedies(whole, sizes)
    assert any(each.startswith("--cache_latents") for each in remedies(network, sizes))
    lion = network.optimizer.model_copy(update={"use_lion_optimizer": True})
    assert not any("AdamW8bit" in each for each in remedies(SdxlTrainNetworkOptions(optimizer=lion), sizes))
    cached = network.cache.model_copy(update={"cache_latents": True, "cache_text_encoder_outputs": True})
    given = SdxlTrainNetworkOptions(cache=cached)
    assert not any(each.startswith("--cache") for each in remedies(given, sizes))


def test_nothing_is_advised_that_would_be_refused() -> None:
    whole, sizes = SdxlTrainOptions(), Sizes(optimizer=3 * MIB)
    host = "--optimizer_states host: all of the optimizer's state, for transfers in each update (3.0 MiB)"
    assert host in remedies(whole, sizes) and any("fused_backward_pass" in each for each in remedies(whole, sizes))
    halves = replace(whole, precision=whole.precision.model_copy(update={"mixed_precision": "fp16"}))
    grouped = replace(whole, optimizer=whole.optimizer.model_copy(update={"fused_optimizer_groups": 4}))
    adds_up = replace(whole, length=whole.length.model_copy(update={"gradient_accumulation_steps": 2}))
    for options in (halves, grouped, adds_up):
        assert not any(each.startswith("--fused_backward_pass") for each in remedies(options, sizes))
    given = replace(whole, optimizer=whole.optimizer.model_copy(update={"optimizer_states": "host"}))
    for options in (halves, given):
        assert not any("optimizer_states" in each for each in remedies(options, sizes))
