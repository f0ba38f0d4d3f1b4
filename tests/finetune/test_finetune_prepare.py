"""Choosing training sizes and encoding: what is noted, what is cached, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from finetune.prepare_buckets_latents import main
from library.options.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--max_resolution", "128,128", "--min_bucket_reso", "64", "--max_bucket_reso", "256", "--bucket_reso_steps", "32")


def picture(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of three shapes, and metadata of two of them and of one that is elsewhere."""
    for name, size in {"a.png": (128, 128), "b.jpg": (160, 90), "c.png": (60, 100)}.items():
        picture(tmp_path / "data" / name, *size)
    known = {"c": {"tags": "t", "mine": [1]}, "elsewhere": {"caption": "x"}, "a": {"caption": "y", "train_resolution": [8, 8]}}
    (tmp_path / "meta.json").write_text(json.dumps(known))
    return tmp_path / "data"


def prepare(folder: Path, model: Path, *more: str) -> dict[str, dict[str, object]]:
    """Run the tool on the folder with the metadata beside it and return what it wrote."""
    target = folder.parent / "out.json"
    AcceleratorState._reset_state(reset_partial_state=True)  # a process is one run; here there are many
    main([str(folder), str(folder.parent / "meta.json"), str(target), str(model), *SMALL, *more])
    text = target.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2)
    return dict(json.loads(text))


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.npz"))


def test_sizes_are_noted_and_latents_lie_beside_the_images(
    folder: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folder, tiny_checkpoint) == {
        "c": {"tags": "t", "mine": [1], "train_resolution": [96, 160], "image_size": [60, 100]},
        "elsewhere": {"caption": "x"},
        "a": {"caption": "y", "train_resolution": [128, 128], "image_size": [128, 128]},
        "b": {"train_resolution": [160, 96], "image_size": [160, 90]},
    }
    assert caches(folder) == ["a_0128x0128_sdxl.npz", "b_0160x0090_sdxl.npz", "c_0060x0100_sdxl.npz"]
    assert np.load(folder / "c_0060x0100_sdxl.npz")["latents"].shape == (4, 20, 12)
    shown = capsys.readouterr().out
    assert "  128x128: 1\n  160x96: 1\n  96x160: 1\n1 entries of other images stay." in shown


@pytest.mark.parametrize(("size", "bucket"), [((640, 480), [576, 448]), ((1000, 1500), [384, 640])])
def test_sizes_of_sd_scripts_come_out_with_its_defaults(
    tmp_path: Path, tiny_checkpoint: Path, size: tuple[int, int], bucket: list[int]
) -> None:
    picture(tmp_path / "data" / "a.png", *size)
    (tmp_path / "meta.json").write_text("{}")
    main([str(tmp_path / name) for name in ("data", "meta.json", "meta.json")] + [str(tiny_checkpoint)])
    assert json.loads((tmp_path / "meta.json").read_text()) == {"a": {"train_resolution": bucket, "image_size": list(size)}}


def test_sizes_come_from_the_image_when_nothing_is_enlarged(folder: Path, tiny_checkpoint: Path) -> None:
    written = prepare(folder, tiny_checkpoint, "--bucket_no_upscale")
    assert [written[name]["train_resolution"] for name in "abc"] == [[128, 128], [160, 64], [32, 96]]


def test_the_limits_of_sizes_are_those_given(folder: Path, tiny_checkpoint: Path) -> None:
    written = prepare(folder, tiny_checkpoint, "--min_bucket_reso", "128")
    assert [written[name]["train_resolution"] for name in "abc"] == [[128, 128]] * 3
    written = prepare(folder, tiny_checkpoint, "--max_bucket_reso", "128", "--bucket_reso_steps", "64")
    assert [written[name]["train_resolution"] for name in "abc"] == [[128, 128], [128, 64], [64, 128]]


def test_mirrored_latents_and_the_number_type_can_be_asked_for(folder: Path, tiny_checkpoint: Path) -> None:
    prepare(folder, tiny_checkpoint)
    plain = dict(np.load(folder / "a_0128x0128_sdxl.npz"))
    assert "latents_flipped" not in plain
    prepare(folder, tiny_checkpoint, "--flip_aug", "--mixed_precision", "bf16", "--batch_size", "2")
    mirrored = dict(np.load(folder / "a_0128x0128_sdxl.npz"))
    assert mirrored["latents_flipped"].shape == mirrored["latents"].shape
    assert not np.array_equal(mirrored["latents"], plain["latents"])
    prepare(folder, tiny_checkpoint, "--mixed_precision", "bf16", "--no_half_vae")
    assert np.array_equal(np.load(folder / "a_0128x0128_sdxl.npz")["latents"], plain["latents"])


def test_any_text_asks_for_masks(folder: Path, tiny_checkpoint: Path) -> None:
    alpha = np.tile(np.arange(128, dtype=np.uint8), (128, 1))
    with Image.open(folder / "a.png") as image:
        image.putalpha(Image.fromarray(alpha))
        image.save(folder / "a.png")
    prepare(folder, tiny_checkpoint)
    assert "alpha_mask" not in np.load(folder / "a_0128x0128_sdxl.npz")
    prepare(folder, tiny_checkpoint, "--alpha_mask", "no")
    assert np.allclose(np.load(folder / "a_0128x0128_sdxl.npz")["alpha_mask"], alpha / 255)


def test_another_vae_can_be_given(folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    prepare(folder, tiny_checkpoint)
    plain = np.load(folder / "a_0128x0128_sdxl.npz")["latents"]
    weights = {name: tensor * 2 if "quant_conv" in name else tensor for name, tensor in load_file(tiny_checkpoint).items()}
    vae = {name.removeprefix("first_stage_model."): w for name, w in weights.items() if name.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    prepare(folder, tiny_checkpoint, "--vae", str(tmp_path / "vae.safetensors"))
    assert not np.array_equal(np.load(folder / "a_0128x0128_sdxl.npz")["latents"], plain)


def test_the_batch_size_is_that_of_the_vae(folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.models.sdxl.family import SdxlFamily

    encode, sizes = SdxlFamily.encode_images, []

    def watched(family: SdxlFamily, vae: torch.nn.Module, images: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return encode(family, vae, images, *more)

    monkeypatch.setattr(SdxlFamily, "encode_images", watched)
    for name in ("d.png", "e.png"):
        picture(folder / name, 128, 128)
    prepare(folder, tiny_checkpoint, "--batch_size", "2")
    assert sorted(sizes) == [1, 1, 1, 2]


def test_what_is_cached_is_kept_and_trusted_unseen_only_if_asked(
    folder: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    prepare(folder, tiny_checkpoint)
    (folder / "a_0128x0128_sdxl.npz").write_bytes(b"broken")
    prepare(folder, tiny_checkpoint, "--skip_existing")
    assert "Latents: 3 taken from the cache, nothing to encode." in caplog.text
    assert (folder / "a_0128x0128_sdxl.npz").read_bytes() == b"broken"
    prepare(folder, tiny_checkpoint)
    assert "Latents: 2 taken from the cache, 1 encoded (1 damaged)." in caplog.text


def test_sub_folders_and_whole_paths(folder: Path, tiny_checkpoint: Path) -> None:
    picture(folder / "deep" / "er" / "a.png", 100, 100)
    written = prepare(folder, tiny_checkpoint, "--full_path", "--recursive")
    new = {key: value for key, value in written.items() if key.startswith(str(folder))}
    assert list(new) == [str(folder / name) for name in ("a.png", "b.jpg", "c.png", "deep/er/a.png")]
    assert new[str(folder / "deep/er/a.png")] == {"train_resolution": [128, 128], "image_size": [100, 100]}
    assert (folder / "deep" / "er" / "a_0100x0100_sdxl.npz").exists()
    assert len(prepare(folder, tiny_checkpoint, "--full_path")) == 3 + 3


def test_caption_files_are_not_looked_at(folder: Path, tiny_checkpoint: Path) -> None:
    (folder / "a.caption").write_bytes(b"\xff\xff")
    (folder / "b.caption").touch()
    assert "train_resolution" in prepare(folder, tiny_checkpoint)["b"]


def test_options_that_change_nothing_say_so(folder: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    prepare(folder, tiny_checkpoint)
    assert "changes nothing" not in caplog.text
    prepare(folder, tiny_checkpoint, "--v2", "--max_data_loader_n_workers", "2")
    assert "--v2 changes nothing here" in caplog.text
    assert "--max_data_loader_n_workers changes nothing here" in caplog.text


def test_damaged_images_are_named_before_anything_is_written(folder: Path, tiny_checkpoint: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        prepare(folder, tiny_checkpoint)
    assert all(str(folder / name) in str(error.value) for name in ("a.png", "b.jpg"))
    assert not (folder.parent / "out.json").exists()
    assert caches(folder) == []


def test_latents_made_before_an_interruption_stay(folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.models.sdxl.family import SdxlFamily

    encode, calls = SdxlFamily.encode_images, []

    def interrupted(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SdxlFamily, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tiny_checkpoint)
    assert len(caches(folder)) == 2
    assert "train_resolution" in json.loads((folder.parent / "out.json").read_text())["b"]
    monkeypatch.setattr(SdxlFamily, "encode_images", encode)
    prepare(folder, tiny_checkpoint)
    assert len(caches(folder)) == 3


def test_all_wrong_options_are_told_together_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from finetune.prepare_buckets_latents import main\n"
        "from library.options.errors import UsageError\n"
        "try: main(sys.argv[1:])\n"
        "except UsageError as error: print(*error.problems, sep='\\n')\n"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = [
        str(tmp_path / "no"),
        str(tmp_path / "no.json"),
        str(tmp_path),
        "no.safetensors",
        "--recursive",
        "--batch_size",
        "0",
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = ("There is no folder", "There is no file", "is a folder", "no.safetensors", "--recursive needs", "--batch_size must be")
    assert [word in line for word, line in zip(words, done.stdout.splitlines(), strict=True)] == [True] * 6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max_resolution", "big"], "--max_resolution big cannot be used: a size in pixels is one whole number or two"),
        (["--max_resolution", "2048,2048"], "max_bucket_reso 256 is below the resolution 2048x2048"),
        (["--bucket_reso_steps", "8"], "bucket_reso_steps is 8, but it must be a multiple of 32"),
    ],
)
def test_sizes_that_cannot_be_trained_are_refused(folder: Path, tiny_checkpoint: Path, more: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prepare(folder, tiny_checkpoint, *more)


def test_broken_metadata_and_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("<html>")
    with pytest.raises(UserError, match="a web page"):
        prepare(folder, tmp_path / "model.safetensors")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        prepare(folder, tmp_path / "model.safetensors")
