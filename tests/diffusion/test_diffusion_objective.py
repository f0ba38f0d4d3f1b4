import pytest
import torch

from library.diffusion.objective import DdpmObjective
from library.diffusion.schedule import NoiseSchedule
from library.options.errors import UsageError
from library.options.groups.loss import LossOptions
from library.options.groups.noise import NoiseOptions


def objective(v=False, noise=None, **loss):
    noise = noise or NoiseOptions()
    return DdpmObjective(NoiseSchedule.make(zero_terminal_snr=noise.zero_terminal_snr), v, noise, LossOptions(**loss))


COMBINED = {
    "l2_plain": (False, {}, False),
    "l2_mask_weights_minsnr5_eps": (False, {"min_snr_gamma": 5.0}, True),
    "l2_minsnr5_v_scale_v": (True, {"min_snr_gamma": 5.0, "scale_v_pred_loss_like_noise_pred": True}, False),
    "l2_eps_minsnr5_vpredlike0.5_debiased": (
        False,
        {"min_snr_gamma": 5.0, "v_pred_like_loss": 0.5, "debiased_estimation_loss": True},
        False,
    ),
    "smooth_l1_snr_debiased_v": (True, {"loss_type": "smooth_l1", "huber_schedule": "snr", "debiased_estimation_loss": True}, True),
    "huber_snr_minsnr1_eps": (False, {"loss_type": "huber", "huber_schedule": "snr", "min_snr_gamma": 1.0}, False),
}


@pytest.mark.parametrize("name", COMBINED)
def test_combined_losses_equal_the_reference(reference, name):
    table, (v, options, masked) = reference["combined_loss"], COMBINED[name]
    weights = torch.ones(3) if name == "l2_plain" else torch.tensor(table["loss_weights"])
    masks = torch.tensor(table["alpha_masks"]).unsqueeze(1) if masked else None
    prediction, target, timesteps = torch.tensor(table["pred"]), torch.tensor(table["target"]), torch.tensor(table["timesteps"])
    loss = objective(v, **options).weighted(prediction, target, timesteps, weights, masks)
    torch.testing.assert_close(loss, torch.tensor(table["cases"][name]["per_sample"]), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loss.mean(), torch.tensor(table["cases"][name]["mean"]), rtol=1e-5, atol=1e-8)


def test_every_combined_case_of_the_reference_is_tested(reference):
    assert set(COMBINED) == set(reference["combined_loss"]["cases"])


def test_an_image_has_the_same_noise_and_loss_in_any_batch():
    noise = NoiseOptions(noise_offset=0.1, adaptive_noise_scale=0.1, multires_noise_iterations=3, ip_noise_gamma=0.1)
    goal, latents, prediction = objective(noise=noise, min_snr_gamma=5.0), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    together = goal.sample(latents, [7, 8, 9])
    losses = goal.loss(prediction, together, latents, torch.ones(3))
    for i in range(3):
        alone = goal.sample(latents[i : i + 1], [7 + i])
        assert torch.equal(alone.noisy, together.noisy[i : i + 1])
        assert torch.equal(alone.timesteps, together.timesteps[i : i + 1])
        assert torch.equal(goal.loss(prediction[i : i + 1], alone, latents[i : i + 1], torch.ones(1)), losses[i : i + 1])


def test_the_epsilon_target_is_the_noise_without_the_perturbation():
    latents = torch.randn(2, 4, 8, 8)
    plain = objective().sample(latents, [1, 2])
    goal = objective(noise=NoiseOptions(ip_noise_gamma=0.5))
    perturbed = goal.sample(latents, [1, 2])
    assert torch.equal(goal.target(perturbed, latents), plain.noise)
    assert not torch.allclose(perturbed.noisy, plain.noisy)


def test_the_velocity_target_recovers_the_image_and_the_noise():
    goal, latents = objective(v=True), torch.randn(2, 4, 8, 8)
    sample = goal.sample(latents, [1, 2])
    velocity = goal.target(sample, latents)
    acp = goal.schedule.alphas_cumprod[sample.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(acp.sqrt() * sample.noisy - (1 - acp).sqrt() * velocity, latents, rtol=1e-4, atol=1e-5)


def test_the_last_timestep_of_zero_terminal_snr_is_pure_noise_and_gives_a_finite_loss():
    goal = objective(
        True,
        NoiseOptions(zero_terminal_snr=True, min_timestep=999, max_timestep=1000),
        min_snr_gamma=5.0,
        debiased_estimation_loss=True,
    )
    latents = torch.randn(2, 4, 8, 8)
    sample = goal.sample(latents, [1, 2])
    assert torch.equal(sample.noisy, sample.noise)
    assert torch.isfinite(goal.loss(torch.zeros_like(latents), sample, latents, torch.ones(2))).all()


HUBER = {"loss_type": "huber"}
EFFECTS = {
    "noise_offset": (0.1, {}),
    "noise_offset_random_strength": (True, {"noise_offset": 0.1}),
    "adaptive_noise_scale": (0.3, {"noise_offset": 0.1}),
    "multires_noise_iterations": (4, {}),
    "multires_noise_discount": (0.9, {"multires_noise_iterations": 4}),
    "ip_noise_gamma": (0.2, {}),
    "ip_noise_gamma_random_strength": (True, {"ip_noise_gamma": 0.2}),
    "zero_terminal_snr": (True, {}),
    "min_timestep": (900, {}),
    "max_timestep": (100, {}),
    "timestep_distribution": ("logit_normal", {}),
    "logit_mean": (2.0, {"timestep_distribution": "logit_normal"}),
    "logit_std": (0.1, {"timestep_distribution": "logit_normal"}),
    "loss_type": ("l1", {}),
    "huber_schedule": ("exponential", HUBER),
    "huber_c": (0.5, HUBER),
    "huber_scale": (2.0, HUBER | {"huber_schedule": "constant"}),
    "masked_loss_normalize": (True, {}),
    "min_snr_gamma": (5.0, {"max_timestep": 100}),
    "debiased_estimation_loss": (True, {}),
    "scale_v_pred_loss_like_noise_pred": (True, {}),
    "v_pred_like_loss": (0.5, {}),
}
"""Of every option of noise and loss a value, and what else has to be on for it to have an effect."""


@pytest.mark.parametrize("v", [False, True], ids=["epsilon", "v"])
@pytest.mark.parametrize("name", EFFECTS)
def test_every_option_of_noise_and_loss_changes_the_loss(name, v):
    value, others = EFFECTS[name]
    draw = torch.Generator().manual_seed(0)
    latents, prediction = 1 + torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 4, 8, 8, generator=draw)
    masks = torch.rand(2, 1, 64, 64, generator=draw)
    losses = []
    for given in (others, others | {name: value}):
        of_noise = {key: each for key, each in given.items() if key in NoiseOptions.model_fields}
        goal = objective(v, NoiseOptions(**of_noise), **{key: each for key, each in given.items() if key not in of_noise})
        sample = goal.sample(latents, [5, 6])
        losses.append(goal.loss(prediction + sample.noisy, sample, latents, torch.ones(2), masks))
    assert not torch.isclose(*losses).any()


def test_no_option_of_noise_and_loss_is_left_out():
    assert {*NoiseOptions.model_fields, *LossOptions.model_fields} - {"masked_loss"} == set(EFFECTS)


def test_noise_and_loss_are_float32_whatever_the_dtype_of_latents_and_prediction():
    goal, latents = objective(), torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    sample = goal.sample(latents, [1])
    loss = goal.loss(torch.randn(1, 4, 8, 8, dtype=torch.bfloat16), sample, latents, torch.ones(1))
    assert sample.noisy.dtype == sample.noise.dtype == loss.dtype == torch.float32


def test_an_adaptive_offset_is_measured_in_float32():
    goal, latents = (
        objective(noise=NoiseOptions(noise_offset=0.1, adaptive_noise_scale=0.5)),
        torch.randn(1, 4, 8, 8, dtype=torch.bfloat16),
    )
    assert torch.equal(goal.sample(latents, [1]).noise, goal.sample(latents.float(), [1]).noise)


def test_the_loss_of_an_image_is_multiplied_by_its_weight():
    goal, latents, prediction = objective(), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    sample = goal.sample(latents, [1, 2])
    full = goal.loss(prediction, sample, latents, torch.ones(2))
    weighted = goal.loss(prediction, sample, latents, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(weighted, full * torch.tensor([1.0, 0.25]))


def test_bad_timestep_bounds_are_refused_when_the_objective_is_built():
    with pytest.raises(UsageError, match="--min_timestep 1000"):
        objective(noise=NoiseOptions.model_construct(**NoiseOptions().model_dump() | {"min_timestep": 1000}))


def test_the_run_header_names_target_loss_and_every_term():
    lines = objective(True, loss_type="huber", min_snr_gamma=5.0, debiased_estimation_loss=True).describe()
    assert lines[0] == "target: velocity"
    assert lines[1] == "loss: huber, c 0.1 by the snr schedule"
    assert "min-SNR weight, gamma 5.0" in lines
    assert "debiased estimation weight" in lines
    assert "min-SNR" not in "\n".join(objective().describe())


@pytest.mark.gpu
def test_a_step_of_the_objective_never_waits_for_the_device():
    device = torch.device("cuda")
    noise = NoiseOptions(noise_offset=0.1, adaptive_noise_scale=0.1, multires_noise_iterations=3, ip_noise_gamma=0.1)
    goal = DdpmObjective(NoiseSchedule.make(device=device), False, noise, LossOptions(loss_type="huber", min_snr_gamma=5.0))
    latents, weights = torch.randn(2, 4, 8, 8, device=device), torch.ones(2, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample = goal.sample(latents, [1, 2])
        loss = goal.loss(torch.zeros_like(latents), sample, latents, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = DdpmObjective(NoiseSchedule.make(), False, noise, LossOptions(loss_type="huber", min_snr_gamma=5.0))
    same = on_cpu.sample(latents.cpu(), [1, 2])
    torch.testing.assert_close(sample.noisy.cpu(), same.noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        loss.cpu(), on_cpu.loss(torch.zeros(2, 4, 8, 8), same, latents.cpu(), torch.ones(2)), rtol=1e-5, atol=1e-6
    )
