"""`--weighted_captions` from the command line to the trained weights: live, cached, and by the caching tool."""

from pathlib import Path

import torch

from tests.cli.training_commands import ROOT, arguments, run_command, weights, write_dataset

STEPS = ["--max_train_steps", "2", "--network_train_unet_only", "--network_dropout", "0"]
WEIGHTED, DISK = "--weighted_captions", "--cache_text_encoder_outputs_to_disk"


def test_brackets_weigh_captions_live_and_cached_alike(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, batch_size=1, count=3)
    fixed = dataset.read_text().replace("shuffle_caption = true\n", "").replace("caption_tag_dropout_rate = 0.2\n", "")
    dataset.write_text(fixed, encoding="utf-8")
    for path in (tmp_path / "images").glob("*.txt"):
        path.write_text(f"({path.read_text()}:3)", encoding="utf-8")

    tool = str(ROOT / "tools" / "cache_text_encoder_outputs.py")
    done = run_command(
        ["--pretrained_model_name_or_path", str(tiny_checkpoint), "--dataset_config", str(dataset), WEIGHTED], script=tool
    )
    assert done.returncode == 0, done.stderr
    learned = {}
    for name, more in {"plain": [], "live": [WEIGHTED], "cached": [WEIGHTED, DISK]}.items():
        done = run_command(arguments(tiny_checkpoint, dataset, tmp_path / name, *STEPS, *more))
        assert done.returncode == 0, done.stderr
        assert ("3 taken from the cache, nothing to encode" in done.stderr) is (name == "cached")
        learned[name] = weights(tmp_path / name / "net.safetensors")
    ups = [name for name in learned["live"] if "lora_up" in name]
    for name in ups:
        torch.testing.assert_close(learned["cached"][name], learned["live"][name], rtol=1e-2, atol=1e-5)
    assert any(not torch.allclose(learned["plain"][name], learned["live"][name], rtol=1e-2, atol=1e-5) for name in ups)
