import json
from pathlib import Path

import diffusers
import pytest
import torch

from library.diffusion.samplers import SAMPLERS, image_generators, lms_coefficient, make_sampler, sampler_step, start_noise
from library.options.errors import UsageError

TIMESTEP_TABLE = json.loads((Path(__file__).parents[1] / "compat" / "prompt_reference_values.json").read_text(encoding="utf-8"))[
    "schedulers"
]["cases"]
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def walk(scheduler, seeds, steps=6, shape=(4, 8, 8)):
    """Draw with a stand-in for a model whose prediction depends on input and timestep."""
    scheduler.set_timesteps(steps)
    generators = image_generators(seeds)
    latents = start_noise(generators, shape) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = torch.tanh(scheduler.scale_model_input(latents, timestep) + float(timestep) / 1000)
        latents = sampler_step(scheduler, prediction, timestep, latents, generators)
    return latents


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_name_makes_the_reference_class_and_settings(reference, prediction_type):
    """Previews differ on purpose: nothing is clipped, timesteps are offset by 1 as in image generation, lms and dpmsolver work."""
    ours_on_purpose = {"clip_sample", "steps_offset", "class"}
    for name in SAMPLERS:
        expected = reference["samplers"][name + ("|v" if prediction_type == "v_prediction" else "")]
        scheduler = make_sampler(name, prediction_type)
        assert scheduler.config.prediction_type == prediction_type
        if "error" in expected:
            assert name in ("lms", "k_lms", "dpmsolver")
            continue
        assert type(scheduler).__name__ == expected["class"]
        for key in expected.keys() - ours_on_purpose:
            assert scheduler.config[key] == expected[key], (name, key)


def test_no_sampler_clips_latents():
    assert not any(make_sampler(name).config.get("clip_sample", False) for name in SAMPLERS)


def test_every_sampler_of_both_command_lines_exists():
    options = json.loads((Path(__file__).parents[1] / "compat" / "cli_options.json").read_text(encoding="utf-8"))
    for script, flag in (("sdxl_train_network.py", "sample_sampler"), ("sdxl_gen_img.py", "sampler")):
        (choices,) = [o["choices"] for o in options[script] if o["dest"] == flag]
        assert set(choices) == set(SAMPLERS)


@pytest.mark.parametrize("name", [name for name in TIMESTEP_TABLE if not name.startswith("x_") and name != "dpmsolver_sigma_min"])
def test_timesteps_sigmas_and_starting_scale_equal_the_reference(name):
    expected = TIMESTEP_TABLE["dpmsolver_sigma_min" if name == "dpmsolver" else "euler" if name == "lms" else name]
    scheduler = make_sampler(name)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.timesteps.double(), torch.tensor(expected["timesteps"]).double(), rtol=1e-4, atol=1e-3)
    assert float(scheduler.init_noise_sigma) == pytest.approx(expected["init_noise_sigma"], rel=1e-5)
    if "sigmas" in expected:
        torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(expected["sigmas"]).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {n for n in SAMPLERS if n.startswith("k_")}))
def test_a_picture_does_not_depend_on_its_batch(name):
    together = walk(make_sampler(name), [11, 12, 13])
    for i, seed in enumerate((11, 12, 13)):
        torch.testing.assert_close(together[i : i + 1], walk(make_sampler(name), [seed]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler_a", "dpm_2_a"])
def test_ancestral_samplers_draw_from_the_generators_they_are_given(name):
    torch.manual_seed(0)
    first = walk(make_sampler(name), [11])
    torch.manual_seed(1)
    assert torch.equal(first, walk(make_sampler(name), [11]))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_recovers_the_image_of_a_perfect_model(name, prediction_type):
    """With all images at 0.5 the best prediction is known in closed form and every sampler must arrive there."""
    scheduler = make_sampler(name, prediction_type)
    scheduler.set_timesteps(20)
    generators, clean = image_generators([1]), torch.full((1, 4, 4, 4), 0.5)
    latents = start_noise(generators, (4, 4, 4)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        acp = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
        low = int(timestep)
        share = acp[low].log().lerp(acp[min(low + 1, 999)].log(), float(timestep) - low).exp()
        noise = (scheduler.scale_model_input(latents, timestep) - share.sqrt() * clean) / (1 - share).sqrt()
        velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
        prediction = noise if prediction_type == "epsilon" else velocity
        latents = sampler_step(scheduler, prediction, timestep, latents, generators)
    ends_above_zero_noise = name in ("dpmsolver", "pndm")
    assert float((latents - clean).abs().max()) < (0.15 if ends_above_zero_noise else 1e-4)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("ddim", diffusers.DDIMScheduler),
        ("euler", diffusers.EulerDiscreteScheduler),
        ("dpmsolver++", diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_zero_terminal_snr_samplers_equal_diffusers_with_rescaled_betas_and_trailing_timesteps(name, cls):
    extra = {"clip_sample": False} if name == "ddim" else {}
    theirs = cls(
        **BASE, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1, **extra
    )
    assert torch.equal(walk(make_sampler(name, "v_prediction", zero_terminal_snr=True), [3]), walk(theirs, [3]))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_starts_at_the_last_timestep_and_stays_finite_with_zero_terminal_snr(name):
    scheduler = make_sampler(name, "v_prediction", zero_terminal_snr=True)
    assert torch.isfinite(walk(scheduler, [3])).all()
    assert int(scheduler.timesteps[0]) == 999
    assert float(scheduler.alphas_cumprod[-1]) < 1e-7


def test_lms_coefficients_equal_numerical_integration():
    sigmas = [14.6, 7.8, 4.6, 2.9, 1.9, 1.3]
    for order in (1, 2, 3, 4):
        for current in range(order):

            def basis(tau, order=order, current=current):
                product = torch.ones_like(tau)
                for k in range(order):
                    if k != current:
                        product = product * (tau - sigmas[4 - k]) / (sigmas[4 - current] - sigmas[4 - k])
                return product

            tau = torch.linspace(sigmas[4], sigmas[5], 20001, dtype=torch.float64)
            assert lms_coefficient(sigmas, order, 4, current) == pytest.approx(float(torch.trapezoid(basis(tau), tau)), rel=1e-6)


def test_euler_equals_diffusers_called_directly():
    theirs = diffusers.EulerDiscreteScheduler(**BASE, steps_offset=1)
    assert torch.equal(walk(make_sampler("k_euler"), [5]), walk(theirs, [5]))


def test_an_unknown_sampler_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"no sampler 'euler_b'.*Did you mean euler"):
        make_sampler("euler_b")
