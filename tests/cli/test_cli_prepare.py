"""From captions beside images to training, command by command as a person types them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.cli.training_commands import FINETUNE, ROOT, arguments, finetune_arguments, run_command, write_dataset

SIZES = ("--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32")


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """Four small pictures, each with a caption and with tags."""
    write_dataset(tmp_path, photos, count=4)
    for path in (tmp_path / "images").glob("*.txt"):
        path.with_suffix(".caption").write_text("a young woman\n", encoding="utf-8")
        path.write_text("1girl, long_hair, rating:safe\n", encoding="utf-8")
    return tmp_path / "images"


def run_tool(script: str, *words: object) -> str:
    done = run_command([str(word) for word in words], script=str(ROOT / script))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_captions_become_metadata_sizes_and_a_trained_model(tiny_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    meta, clean, ready = (tmp_path / name for name in ("meta.json", "clean.json", "ready.json"))
    run_tool("finetune/merge_captions_to_metadata.py", images, meta)
    run_tool("finetune/merge_dd_tags_to_metadata.py", images, meta)
    run_tool("finetune/clean_captions_and_tags.py", meta, clean)
    resolution = ("--max_resolution", "64,64", *SIZES)
    run_tool("finetune/prepare_buckets_latents.py", images, clean, ready, tiny_checkpoint, *resolution, "--flip_aug")
    entries = json.loads(ready.read_text(encoding="utf-8"))
    assert {(entry["caption"], entry["tags"]) for entry in entries.values()} == {("a girl", "1girl, long hair")}
    for name, entry in entries.items():
        (cache,) = images.glob(f"{name}_*_sdxl.npz")
        width, height = entry["train_resolution"]
        assert np.load(cache)["latents"].shape == (4, height // 8, width // 8)

    sources = ["--in_json", str(ready), "--train_data_dir", str(images)]
    settings = ["--resolution", "64", "--enable_bucket", *SIZES, "--flip_aug"]
    model = finetune_arguments(tiny_checkpoint, tmp_path, tmp_path / "out", "--max_train_steps", "2", "--cache_latents_to_disk")
    at = model.index("--dataset_config")
    trained = run_command([*model[:at], *model[at + 2 :], *sources, *settings], script=FINETUNE)
    assert trained.returncode == 0, trained.stderr
    assert "Latents: 4 taken from the cache, nothing to encode." in trained.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_two_processes_share_the_encoding(tiny_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    paths = [str(path) for path in (images, tmp_path / "meta.json", tmp_path / "ready.json", tiny_checkpoint)]
    script = str(ROOT / "finetune" / "prepare_buckets_latents.py")
    done = run_command([*paths, "--max_resolution", "64,64", *SIZES], launcher, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    assert len(json.loads((tmp_path / "ready.json").read_text())) == 4
    assert len(list(images.glob("*_sdxl.npz"))) == 4


def test_a_lora_says_how_it_was_trained(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, count=2)
    trained = run_command(arguments(tiny_checkpoint, dataset, tmp_path, "--max_train_steps", "1"))
    assert trained.returncode == 0, trained.stderr
    file = tmp_path / "net.safetensors"
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    assert json.loads(run_tool("tools/show_metadata.py", "--model", file, "--raw")) == metadata
    shown = json.loads(run_tool("tools/show_metadata.py", "--model", file))
    assert shown.keys() == metadata.keys()
    assert (shown["ss_network_dim"], shown["ss_seed"]) == ("4", "11")
    assert shown["ss_tag_frequency"] == json.loads(metadata["ss_tag_frequency"])
    assert shown["ss_tag_frequency"]["images"]["bright"] == 2
    assert shown["ss_datasets"][0]["subsets"][0]["img_count"] == 2
