"""Every option of the objective at once, in both training scripts: each is told in the head of the run, and the model learns."""

from pathlib import Path

import pytest

from tests.cli.training_commands import FINETUNE, SCRIPT, arguments, finetune_arguments, run_command, weights, write_dataset

EVERYTHING = {
    "--v_parameterization": "target: velocity",
    "--loss_type huber --huber_schedule exponential --huber_c 0.2": "loss: huber, c 0.2 by the exponential schedule",
    "--min_snr_gamma 5": "min-SNR weight, gamma 5.0",
    "--scale_v_pred_loss_like_noise_pred": "v loss scaled like a noise loss",
    "--debiased_estimation_loss": "debiased estimation weight",
    "--min_timestep 10 --max_timestep 900": "timesteps: 10 to 899, logit-normal, mean 0.5, deviation 1",
    "--timestep_distribution logit_normal --logit_mean 0.5": "logit-normal",
    "--noise_offset 0.05 --noise_offset_random_strength": "noise offset: up to 0.05",
    "--adaptive_noise_scale 0.01": "plus 0.01 × |channel mean|",
    "--multires_noise_iterations 3 --multires_noise_discount 0.2": "pyramid noise: 3 levels, discount 0.2",
    "--ip_noise_gamma 0.1": "input perturbation: 0.1",
    "--zero_terminal_snr": "zero terminal SNR",
}


@pytest.mark.parametrize("script", [SCRIPT, FINETUNE], ids=["network", "model"])
def test_the_whole_objective_is_that_of_both_scripts(script: str, tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    of_script, name = (arguments, "net") if script == SCRIPT else (finetune_arguments, "model")
    more = [*" ".join(EVERYTHING).split(), "--max_train_steps", "1", "--optimizer_type", "torch.optim.RMSprop"]
    dataset = write_dataset(tmp_path, photos, batch_size=2, count=2)
    done = run_command(of_script(tiny_checkpoint, dataset, tmp_path / "out", *more), script=script)
    assert done.returncode == 0, done.stderr
    for told in EVERYTHING.values():
        assert told in done.stderr
    learned, before = weights(tmp_path / "out" / f"{name}.safetensors"), weights(tiny_checkpoint)
    assert all(tensor.isfinite().all() for tensor in learned.values())
    trained = [tensor for key, tensor in learned.items() if "lora_up" in key or not tensor.equal(before.get(key, tensor))]
    assert any(tensor.any() for tensor in trained)
