import pytest
import torch

from library.diffusion.losses import ELEMENT_LOSSES, HUBER_SCHEDULES, apply_mask, timestep_weights
from library.diffusion.schedule import NoiseSchedule
from library.options.groups.loss import LossOptions


def weight(options, v_parameterization, **schedule):
    (term,) = timestep_weights(NoiseSchedule.make(**schedule), options, v_parameterization)
    return term.table


def assert_table(table, expected):
    got = torch.tensor([float(table[int(t)]) for t in expected])
    torch.testing.assert_close(got, torch.tensor(list(expected.values())), rtol=1e-5, atol=0)


FORMS = pytest.mark.parametrize(("form", "v"), [("epsilon", False), ("v", True)])


@FORMS
@pytest.mark.parametrize("gamma", ["1.0", "5.0", "20.0"])
def test_min_snr_weight_equals_the_reference(reference, gamma, form, v):
    assert_table(weight(LossOptions(min_snr_gamma=float(gamma)), v), reference["loss_weights"]["min_snr"][gamma][form])


def test_scaled_v_weight_equals_the_reference(reference):
    options = LossOptions(scale_v_pred_loss_like_noise_pred=True)
    assert_table(weight(options, True), reference["loss_weights"]["scale_v_pred_loss_like_noise_pred"])


@pytest.mark.parametrize("share", ["0.5", "1.0"])
def test_v_like_weight_equals_the_reference(reference, share):
    assert_table(weight(LossOptions(v_pred_like_loss=float(share)), False), reference["loss_weights"]["v_pred_like_loss"][share])


@FORMS
def test_debiased_weight_equals_the_reference(reference, form, v):
    assert_table(weight(LossOptions(debiased_estimation_loss=True), v), reference["loss_weights"]["debiased_estimation"][form])


@FORMS
def test_weights_with_zero_terminal_snr_are_those_of_the_unrescaled_schedule(reference, form, v):
    expected = reference["loss_weights"]["min_snr_gamma5_with_zero_terminal_snr_sd_scripts"][form]
    assert_table(weight(LossOptions(min_snr_gamma=5), v, zero_terminal_snr=True), expected)


@pytest.mark.parametrize("v", [False, True])
def test_no_weight_and_no_huber_c_divides_by_zero_with_zero_terminal_snr(v):
    schedule = NoiseSchedule.make(zero_terminal_snr=True)
    options = LossOptions.model_construct(
        min_snr_gamma=5.0, scale_v_pred_loss_like_noise_pred=True, v_pred_like_loss=0.5, debiased_estimation_loss=True
    )
    tables = [term.table for term in timestep_weights(schedule, options, v)]
    assert len(tables) == 4
    for table in tables + [c(schedule, 0.1, 1.0) for c in HUBER_SCHEDULES.values()]:
        assert torch.isfinite(table).all()
        assert (table > 0).all()


def huber_cases(reference):
    for name, variants in reference["huber_c"].items():
        if isinstance(variants, dict):
            yield from ((name, settings, values) for settings, values in variants.items())


def test_huber_c_equals_the_reference_for_every_schedule(reference):
    cases = list(huber_cases(reference))
    assert {name for name, _, _ in cases} == set(HUBER_SCHEDULES)
    for name, settings, values in cases:
        words = dict(part.split("=") if "=" in part else (part, True) for part in settings.split(","))
        schedule = NoiseSchedule.make(zero_terminal_snr="zero_terminal_snr" in words)
        assert_table(HUBER_SCHEDULES[name](schedule, float(words["c"]), float(words["scale"])), values)


@pytest.mark.parametrize("name", ["l1", "l2", "huber", "smooth_l1"])
def test_element_losses_equal_the_reference(reference, name):
    table = reference["conditional_loss"]
    c = torch.tensor(table["huber_c_per_sample"]).view(-1, 1, 1, 1)
    loss = ELEMENT_LOSSES[name](torch.tensor(table["pred"]), torch.tensor(table["target"]), c)
    torch.testing.assert_close(loss, torch.tensor(table[name]["none"]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.mean(dim=(1, 2, 3)), torch.tensor(table[name]["per_sample_mean"]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.mean(), torch.tensor(table[name]["mean"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["l1", "l2", "huber", "smooth_l1"])
def test_element_losses_agree_with_their_float64_formulas(name):
    prediction, target, c = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5), torch.tensor([0.1, 0.7]).view(2, 1, 1, 1)
    d, k = prediction.double() - target.double(), c.double()
    root = torch.sqrt(d * d + k * k) - k
    expected = {"l1": d.abs(), "l2": d * d, "huber": 2 * k * root, "smooth_l1": 2 * root}[name]
    torch.testing.assert_close(ELEMENT_LOSSES[name](prediction, target, c).double(), expected, rtol=1e-4, atol=1e-6)


def test_masks_equal_the_reference(reference):
    table = reference["masked_loss"]
    loss = torch.tensor(table["loss"])
    control = (torch.tensor(table["conditioning_image_channel0"]).view(1, 1, 4, 4) + 1) / 2
    torch.testing.assert_close(apply_mask(loss, control), torch.tensor(table["result_conditioning"]))
    masked = apply_mask(loss, torch.tensor(table["alpha_mask"]).view(1, 1, 4, 4))
    torch.testing.assert_close(masked, torch.tensor(table["result_alpha"]))
    torch.testing.assert_close(masked.mean(), torch.tensor(table["mean_over_chw_after_mask"]))
    mask_alone = apply_mask(torch.ones(1, 1, 2, 2), torch.tensor(table["alpha_mask"]).view(1, 1, 4, 4))
    torch.testing.assert_close(mask_alone[0, 0], torch.tensor(table["downscaled_mask"]))


def test_weights_that_are_zero_or_unset_are_off():
    assert timestep_weights(NoiseSchedule.make(), LossOptions(min_snr_gamma=0.0, v_pred_like_loss=0.0), False) == []


def test_a_normalised_mask_gives_the_mean_over_what_it_shows():
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(3, 4, 6, 5, generator=generator)
    masks = torch.rand(3, 1, 48, 40, generator=generator)
    masks[1] = 0.0
    masks[2] = (masks[2] > 0.5).float()
    small = masks.double().view(3, 1, 6, 8, 5, 8).mean((3, 5))
    expected = (loss.double() * small).sum((1, 2, 3)) / (4 * small.sum((1, 2, 3))).clamp(min=1e-30)
    found = apply_mask(loss, masks, normalize=True).mean((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert found[1] == 0
    plain = apply_mask(loss, masks).mean((1, 2, 3)).double()
    torch.testing.assert_close(plain, (loss.double() * small).mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_half_a_mask_halves_the_loss_and_grey_dims_it():
    loss = torch.full((2, 4, 8, 8), 3.0)
    masks = torch.ones(2, 1, 64, 64)
    masks[0, :, :, 32:] = 0
    masks[1] = 127 / 255
    assert apply_mask(loss, masks).mean((1, 2, 3)).tolist() == pytest.approx([1.5, 3 * 0.498], rel=1e-4)
    cell = torch.zeros(1, 1, 8, 8)
    cell[..., :4] = 1  # 4 of 8 pixels of one latent
    assert apply_mask(torch.ones(1, 1, 1, 1), cell).item() == 0.5
