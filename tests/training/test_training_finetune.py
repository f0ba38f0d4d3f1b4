"""Fine-tuning: a step is that of plain PyTorch with diffusers' U-Net, and frozen is frozen."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from library.diffusion.objective import DdpmObjective
from library.diffusion.schedule import NoiseSchedule
from library.models.family import ModelSource
from library.models.sdxl.family import SdxlFamily
from library.models.sdxl.write_folder import diffusers_unet_names, unet_config
from library.options.groups.bench import BenchOptions
from library.options.groups.finetune import FinetuneOptions
from library.options.groups.loss import LossOptions
from library.options.groups.noise import NoiseOptions
from library.training.finetune_recipe import denoiser_groups, text_encoder_parameters
from library.training.full_tensors import Gathered
from library.training.step import ModelParts, TrainStep
from library.training.trainable import ModelTrainable, trained_tensors
from tools.bench_step import make_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tiny_checkpoint: Path) -> SdxlFamily:
    return SdxlFamily.open(ModelSource(str(tiny_checkpoint)))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("v_parameterization", [False, True], ids=["epsilon", "v"])
def test_loss_and_gradients_equal_those_of_diffusers_u_net_in_plain_pytorch(family, v_parameterization, checkpointing) -> None:
    batch = make_batch(BenchOptions(resolution=64, batch_size=3), family.sizes, CPU)
    unet = family.load_denoiser(torch.float32, CPU).requires_grad_(True)
    if checkpointing:
        family.enable_gradient_checkpointing(unet)
    objective = DdpmObjective(NoiseSchedule.make(), v_parameterization, NoiseOptions(), LossOptions())
    trainable = ModelTrainable(family, {"unet": unet}, "safetensors", v_prediction=v_parameterization, zero_terminal_snr=False)
    trainable.on_epoch_start()
    step = TrainStep(trainable.module, ModelParts(family, unet, [None, None], None), objective, train_text=False)
    ours = step(batch).mean()
    ours.backward()

    config = unet_config(family.sizes)
    names = diffusers_unet_names(config)
    reference = UNet2DConditionModel.from_config(config)
    reference.load_state_dict({names[name]: tensor for name, tensor in unet.state_dict().items()})
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents = batch.latents * 0.13025
    sample = objective.sample(latents, batch.draw_seeds)
    cond = batch.text_cond
    time_ids = torch.cat([batch.sizes.original_hw, batch.sizes.crop_top_left, batch.sizes.target_hw], dim=1)
    predicted = reference(
        scheduler.add_noise(latents, sample.noise, sample.timesteps),
        sample.timesteps,
        torch.cat([cond["hidden1"], cond["hidden2"]], dim=-1),
        added_cond_kwargs={"text_embeds": cond["pool2"], "time_ids": time_ids},
    ).sample
    velocity = scheduler.get_velocity(latents, sample.noise, sample.timesteps)
    theirs = torch.nn.functional.mse_loss(predicted, velocity if v_parameterization else sample.noise)
    theirs.backward()

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    expected = dict(reference.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in expected.values())
    for name, parameter in unet.named_parameters():
        grad = expected[names[name]].grad
        scale = max(grad.norm().item(), 1e-3 * largest.item())
        assert (parameter.grad - grad).norm().item() < 1e-5 * scale, name


def test_each_block_is_a_group_and_a_rate_of_0_leaves_it_frozen(family) -> None:
    unet = family.load_denoiser(torch.float32, CPU)
    rates = [0.0 if number in (0, 5) else number * 1e-6 for number in range(23)]
    groups = denoiser_groups(family, unet, 1e-5, rates)
    assert list(groups) == [f"block{number}" for number in range(23) if rates[number]]
    assert groups["block7"]["lr"] == 7e-6
    trained = {id(parameter) for group in groups.values() for parameter in group["params"]}
    left = {name.split(".")[0] + "." + name.split(".")[1] for name, p in unet.named_parameters() if id(p) not in trained}
    assert left == {"time_embed.0", "time_embed.2", "label_emb.0", "input_blocks.4"}
    assert denoiser_groups(family, unet, 0.0, rates) == {}
    (whole,) = denoiser_groups(family, unet, 1e-5, None).values()
    assert len(whole["params"]) == len(list(unet.parameters()))


def test_frozen_tensors_have_no_gradient_and_are_not_saved_from_memory(family) -> None:
    unet = family.load_denoiser(torch.float32, CPU)
    groups = denoiser_groups(family, unet, 1e-5, [0.0] * 22 + [1e-5])
    for parameter in groups["block22"]["params"]:
        parameter.requires_grad_(True)
    batch = make_batch(BenchOptions(resolution=64), family.sizes, CPU)
    objective = DdpmObjective(NoiseSchedule.make(), False, NoiseOptions(), LossOptions())
    TrainStep(unet, ModelParts(family, unet, [None, None], None), objective, train_text=False)(batch).mean().backward()
    with_gradient = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert (
        with_gradient
        == {"out.0.weight", "out.0.bias", "out.2.weight", "out.2.bias"}
        == trained_tensors(family, "unet", unet, Gathered()).keys()
    )


def test_every_trained_parameter_of_the_text_encoders_gets_a_gradient(family) -> None:
    for encoder in (encoders := family.load_text_encoders(torch.float32, CPU)):
        for parameter in text_encoder_parameters(family, encoder):
            parameter.requires_grad_(True)
    cond = family.encode_text(family.tokenize(["a cat"]), encoders)
    sum(value.square().sum() for value in cond.values()).backward()
    for encoder in encoders:
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in encoder.parameters())


def test_rates_of_the_text_encoders_fall_back_to_that_of_the_u_net() -> None:
    assert FinetuneOptions().text_encoder_rates(1e-5) == (0.0, 0.0)
    assert FinetuneOptions(train_text_encoder=True, learning_rate_te2=0.0).text_encoder_rates(1e-5) == (1e-5, 0.0)
    assert FinetuneOptions(train_text_encoder=True, learning_rate_te1=2e-6).text_encoder_rates(1e-5) == (2e-6, 1e-5)
