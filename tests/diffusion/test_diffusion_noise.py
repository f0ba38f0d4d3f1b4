import pytest
import torch

from library.diffusion.noise import (
    RandomStream,
    describe_noise,
    draw,
    draw_from,
    draw_timesteps,
    offset_amount,
    shape_noise,
    timestep_range,
)
from library.diffusion.schedule import NoiseSchedule
from library.options.errors import UsageError
from library.options.groups.noise import NoiseOptions

EVERYTHING = NoiseOptions(
    noise_offset=0.1,
    noise_offset_random_strength=True,
    adaptive_noise_scale=0.2,
    multires_noise_iterations=4,
    ip_noise_gamma=0.1,
    ip_noise_gamma_random_strength=True,
)
GOLDENS = [
    "plain",
    "offset",
    "offset_random",
    "offset_adaptive",
    "offset_adaptive_negative",
    "multires",
    "offset_and_multires",
    "ip_gamma",
    "ip_gamma_random",
    "timestep_range",
    "timestep_equal",
]


def golden_latents():
    return (((torch.arange(2 * 4 * 8 * 8) % 17) - 8) / 8).reshape(2, 4, 8, 8)


@pytest.mark.parametrize("name", GOLDENS)
def test_one_stream_for_a_whole_batch_gives_the_reference_noise_timesteps_and_noisy_latents(reference, name):
    """The two images are read as one of eight channels where a statistic of the whole batch enters (the pyramid's deviation)."""
    case = reference["noise_sampling_cpu_seed42"]["cases"][name]
    options, latents = NoiseOptions(**case["options"]), golden_latents()
    draws = draw_from(RandomStream(42), (2, 4, 8, 8), options)
    as_one_image = draw_from(RandomStream(42), (1, 8, 8, 8), options)
    noise = shape_noise(as_one_image, latents.view(1, 8, 8, 8), options).view_as(latents)
    perturbed = noise if draws.perturbation is None else noise + draws.perturbation
    noisy = NoiseSchedule.make().add_noise(latents, perturbed, draws.timesteps)
    assert draws.timesteps.tolist() == case["timesteps"]
    for got, expected in [
        (noise[0, 0, 0, :4], case["noise_0_0_0_first4"]),
        (noise[1, 3, 7, -4:], case["noise_1_3_7_last4"]),
        (noise.mean(), case["noise_mean"]),
        (noise.std(), case["noise_std"]),
        (noisy[0, 0, 0, :4], case["noisy_0_0_0_first4"]),
        (noisy.mean(), case["noisy_mean"]),
    ]:
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_list_of_golden_cases_is_the_reference_list(reference):
    assert set(GOLDENS) == set(reference["noise_sampling_cpu_seed42"]["cases"])


@pytest.mark.parametrize(("key", "scale", "adaptive"), [("offset_0.1_scale_0.5", 0.1, 0.5), ("offset_0.01_scale_-1", 0.01, -1.0)])
def test_adaptive_offset_equals_the_reference(reference, key, scale, adaptive):
    table, latents = reference["adaptive_noise_offset"], golden_latents()
    torch.testing.assert_close(latents.mean(dim=(2, 3)).abs().flatten(), torch.tensor(table["latent_abs_channel_mean"]))
    got = offset_amount(torch.full((1, 1, 1, 1), scale), latents, adaptive)
    torch.testing.assert_close(got.flatten(), torch.tensor(table[key]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("key", "seed", "count", "low", "high"),
    [
        ("seed0_0_1000_b8", 0, 8, 0, 1000),
        ("seed0_200_800_b8", 0, 8, 200, 800),
        ("equal_500_500_b3", 0, 3, 500, 500),
        ("inverted_600_500_b3", 0, 3, 600, 500),
    ],
)
def test_timesteps_equal_the_reference(reference, key, seed, count, low, high):
    options = NoiseOptions(min_timestep=low, max_timestep=high)
    assert draw_timesteps(RandomStream(seed), count, options).tolist() == reference["timesteps"][key]


@pytest.mark.parametrize("shape", [(0.0, 1.0, None, None), (0.8, 0.5, None, None), (-1.5, 2.0, 200, 700), (40.0, 1.0, 100, 900)])
def test_logit_normal_timesteps_have_the_closed_distribution_within_the_range(shape):
    mean, std, low, high = shape
    options = NoiseOptions(
        timestep_distribution="logit_normal", logit_mean=mean, logit_std=std, min_timestep=low, max_timestep=high
    )
    low, high = timestep_range(options)
    count = 100_000
    drawn = draw_timesteps(RandomStream(1), count, options)
    assert low <= drawn.min() and drawn.max() < high
    found = torch.bincount(drawn, minlength=1000)[low:high].cumsum(0) / count
    ends = (torch.arange(low, high, dtype=torch.float64) + 1 - low) / (high - low)
    expected = torch.special.ndtr((torch.logit(ends) - mean) / std)
    expected[-1] = 1  # the last timestep takes what would be rounded up to the end
    assert (found - expected).abs().max() < 1.63 / count**0.5  # Kolmogorov and Smirnov's bound: one sample in a hundred exceeds it


def test_the_distribution_of_timesteps_leaves_the_noise_of_an_image_as_it_is():
    uniform, normal = (
        draw([3, 4], (4, 8, 8), EVERYTHING.model_copy(update={"timestep_distribution": kind, "ip_noise_gamma": None}))
        for kind in ("uniform", "logit_normal")
    )
    assert torch.equal(uniform.gaussian, normal.gaussian) and torch.equal(uniform.offset, normal.offset)
    assert not torch.equal(uniform.timesteps, normal.timesteps)


@pytest.mark.parametrize(
    ("low", "high"), [(-1, None), (None, 1001), (1000, None), (999, 1000 + 1), (1000, 1000), (None, -5)], ids=str
)
def test_timestep_bounds_outside_the_schedule_are_refused_in_a_sentence(low, high):
    with pytest.raises(UsageError, match="leaves the timesteps 0 to 999"):
        timestep_range(NoiseOptions.model_construct(min_timestep=low, max_timestep=high))


def test_timestep_bounds_of_the_whole_schedule_are_the_default():
    assert timestep_range(NoiseOptions()) == (0, 1000)


def test_an_image_draws_the_same_in_any_batch():
    seeds = [3, 2**64 - 1, 17]
    together = vars(draw(seeds, (4, 8, 6), EVERYTHING))
    for position, seed in enumerate(seeds):
        alone = vars(draw([seed], (4, 8, 6), EVERYTHING))
        for name, value in together.items():
            assert torch.equal(value[position : position + 1], alone[name]), name


def test_images_of_one_batch_draw_differently():
    draws = vars(draw([1, 2], (4, 8, 8), EVERYTHING))
    for name, value in draws.items():
        assert not torch.equal(value[0], value[1]), name


def test_the_pyramid_has_unit_deviation_in_every_image():
    options = NoiseOptions(noise_offset=0.5, multires_noise_iterations=5)
    noise = shape_noise(draw([1, 2, 3], (4, 16, 12), options), torch.zeros(3, 4, 16, 12), options)
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(3))


@pytest.mark.parametrize(
    "change",
    [
        {"noise_offset": 0.1},
        {"noise_offset": 0.1, "noise_offset_random_strength": True},
        {"noise_offset": 0.1, "adaptive_noise_scale": 0.3},
        {"multires_noise_iterations": 3},
        {"multires_noise_iterations": 3, "multires_noise_discount": 0.9},
    ],
    ids=str,
)
def test_each_noise_option_changes_the_noise(change):
    latents, options, without = golden_latents(), NoiseOptions(**change), NoiseOptions(**dict(list(change.items())[:-1]))
    noise = [shape_noise(draw([1, 2], (4, 8, 8), o), latents, o) for o in (options, without)]
    assert not torch.allclose(*noise)


def test_zero_turns_every_kind_of_noise_off():
    off = NoiseOptions(noise_offset=0.0, multires_noise_iterations=0, ip_noise_gamma=0.0)
    draws, plain = vars(draw([5], (4, 8, 8), off)), vars(draw([5], (4, 8, 8), NoiseOptions()))
    assert draws["offset"] is None
    assert draws["perturbation"] is None
    assert torch.equal(draws["gaussian"], plain["gaussian"])


def test_the_run_header_names_each_kind_of_noise_that_is_on():
    assert describe_noise(NoiseOptions()) == ["timesteps: 0 to 999, uniform"]
    bell = NoiseOptions(timestep_distribution="logit_normal", logit_std=0.5, min_timestep=10)
    assert describe_noise(bell) == ["timesteps: 10 to 999, logit-normal, mean 0, deviation 0.5"]
    text = "\n".join(describe_noise(EVERYTHING.model_copy(update={"zero_terminal_snr": True})))
    for word in (
        "noise offset: up to 0.1",
        "0.2 × |channel mean|",
        "pyramid noise: 4",
        "input perturbation: up to 0.1",
        "zero terminal SNR",
    ):
        assert word in text
