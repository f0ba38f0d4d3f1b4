import diffusers
import pytest
import torch

from library.diffusion.schedule import NoiseSchedule, rescale_to_zero_terminal_snr, scaled_linear_betas

TABLES = {
    "betas": lambda s: s.betas,
    "alphas_cumprod": lambda s: s.alphas_cumprod,
    "snr": lambda s: s.snr,
    "sigma_over_alpha": lambda s: s.sqrt_one_minus_alphas_cumprod / s.sqrt_alphas_cumprod,
    "sqrt_alphas_cumprod": lambda s: s.sqrt_alphas_cumprod,
    "sqrt_one_minus_alphas_cumprod": lambda s: s.sqrt_one_minus_alphas_cumprod,
}


def at(table, expected):
    return torch.tensor([float(table[int(t)]) for t in expected]), torch.tensor(list(expected.values()))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_the_schedule_equals_the_reference(reference, name):
    got, expected = at(TABLES[name](NoiseSchedule.make()), reference["noise_schedule"][name])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["betas", "alphas_cumprod"])
def test_zero_terminal_snr_tables_equal_the_reference(reference, name):
    got, expected = at(TABLES[name](NoiseSchedule.make(zero_terminal_snr=True)), reference["zero_terminal_snr"][name])
    rounding = 5e-6 if name == "betas" else 1e-12  # a beta is 1 minus a ratio of two nearly equal, at the end tiny, float32 numbers
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=rounding)


def test_zero_terminal_snr_ends_in_pure_noise_exactly():
    assert float(NoiseSchedule.make(zero_terminal_snr=True).alphas_cumprod[-1]) == 0.0


def test_the_snr_of_loss_weights_is_the_unrescaled_one():
    assert torch.equal(NoiseSchedule.make(zero_terminal_snr=True).snr, NoiseSchedule.make().snr)


def test_recomputing_the_snr_after_rescaling_gives_the_reference_values(reference):
    schedule = NoiseSchedule.make(zero_terminal_snr=True)
    got, expected = at(
        schedule.alphas_cumprod / (1 - schedule.alphas_cumprod), reference["zero_terminal_snr"]["snr_if_recomputed_after_rescaling"]
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_schedule_equals_diffusers_ddpm_scheduler_bit_for_bit(zero_terminal_snr):
    theirs = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=zero_terminal_snr,
        clip_sample=False,
    )
    assert torch.equal(NoiseSchedule.make(zero_terminal_snr=zero_terminal_snr).alphas_cumprod, theirs.alphas_cumprod)


def test_schedule_agrees_with_its_float64_formula():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(NoiseSchedule.make().alphas_cumprod.double(), torch.cumprod(1 - betas, 0), rtol=1e-4, atol=0)


def test_rescaling_keeps_the_first_beta():
    betas = scaled_linear_betas()
    torch.testing.assert_close(rescale_to_zero_terminal_snr(betas)[0], betas[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noisy_latents_and_velocity_equal_the_reference(reference, zero_terminal_snr):
    table = reference["add_noise_and_velocity"]
    latents, noise = torch.tensor(table["latents"]), torch.tensor(table["noise"])
    schedule = NoiseSchedule.make(zero_terminal_snr=zero_terminal_snr)
    for key, method in (("noisy", schedule.add_noise), ("velocity", schedule.velocity)):
        for timestep, expected in table[f"zero_terminal_{key}" if zero_terminal_snr else key].items():
            got = method(latents, noise, torch.tensor([int(timestep)])).flatten()
            torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_each_image_is_mixed_at_its_own_timestep():
    schedule, latents, noise = NoiseSchedule.make(), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    both = schedule.add_noise(latents, noise, torch.tensor([10, 900]))
    torch.testing.assert_close(both[1:], schedule.add_noise(latents[1:], noise[1:], torch.tensor([900])))
    assert not torch.allclose(both[:1], schedule.add_noise(latents[:1], noise[:1], torch.tensor([900])))
