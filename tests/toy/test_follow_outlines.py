"""The demonstration of control networks: its pictures, its outlines, and what it reads from the pictures it draws."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "toy"))

import follow_outlines  # noqa: E402
from drawing import draw, draw_inside  # noqa: E402
from follow_outlines import figures, placed_scenes, training_command, write_training_pictures  # noqa: E402
from reading import overlap, read_picture  # noqa: E402

from library.models.family import ModelSource  # noqa: E402
from library.models.sdxl.family import SdxlFamily  # noqa: E402
from library.options.parse import parse  # noqa: E402
from library.options.scripts import SdxlTrainControlNetLLLiteOptions  # noqa: E402
from library.training.inputs import dataset_definition  # noqa: E402
from networks.control_net_lllite import ControlNetLLLite, Widths  # noqa: E402


def intersection_over_union(said: str) -> float:
    found = re.search(r"inside (\d\.\d\d);", said)
    assert found, said
    return float(found[1])


def test_pictures_that_follow_their_outlines_are_told_from_those_that_do_not() -> None:
    placed = placed_scenes(24, seed=3, held_out=True)
    along = figures([draw_inside(each.scene, each.mask) for each in placed], placed)
    assert intersection_over_union(along) >= 0.95
    assert "ground colour 100%, object colour 100%, shape 100%" in along
    in_the_middle = figures([draw(each.scene) for each in placed], placed)
    assert intersection_over_union(in_the_middle) < 0.3
    assert "ground colour 100%, object colour 100%, shape 100%" in in_the_middle
    of_others = figures([draw_inside(each.scene, each.mask) for each in [*placed[1:], placed[0]]], placed)
    assert intersection_over_union(of_others) < 0.3 and "100%" not in of_others


def test_an_outline_is_hollow_and_its_outer_rim_is_the_shape_s() -> None:
    for each in placed_scenes(24, seed=4):
        line = (np.asarray(each.outline)[:, :, 0] > 0).astype(np.uint8)
        assert line.sum() < 0.97 * each.inside.sum()
        rims, _ = cv2.findContours(line, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        assert overlap(cv2.drawContours(np.zeros_like(line), rims, -1, 1, cv2.FILLED), each.inside) == 1


def test_no_training_picture_has_a_combination_that_is_drawn() -> None:
    trained, drawn = placed_scenes(200, seed=0), placed_scenes(50, seed=1, held_out=True)
    assert not {each.scene for each in trained} & {each.scene for each in drawn}
    assert not any(word in each.scene.caption for each in trained + drawn for word in ("left", "right", "small", "large"))


def test_the_training_command_takes_the_pictures_and_their_outlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_outlines, "TRAINED", 4)
    write_training_pictures(tmp_path)
    interpreter, script, *arguments = training_command(tmp_path, 7)
    options = parse(SdxlTrainControlNetLLLiteOptions, arguments)
    assert (interpreter, script) == (sys.executable, "sdxl_train_control_net_lllite.py")
    (subset,) = dataset_definition(options).sections[0].subsets
    pictures, outlines = (Path(folder or "") for folder in (subset.image_dir, subset.conditioning_data_dir))
    names = ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert sorted(path.name for path in outlines.iterdir()) == sorted(path.name for path in pictures.glob("*.png")) == names


def test_the_network_draws_along_the_outlines_and_the_model_alone_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = SdxlFamily.open(ModelSource(str(follow_outlines.CHECKPOINT))).load_denoiser(torch.float32, torch.device("cpu"))
    network = ControlNetLLLite(unet, Widths(4, 4))
    torch.manual_seed(0)
    for adapter in network.adapters.values():
        torch.nn.init.normal_(adapter.up[0].weight)
    network.save_weights(str(tmp_path / "random.safetensors"), None, None)
    drawn: list[list[Image.Image]] = []
    monkeypatch.setattr(follow_outlines, "DRAWN", 2)
    monkeypatch.setattr(follow_outlines, "train", lambda output, steps: output / "random.safetensors")
    monkeypatch.setattr(follow_outlines, "figures", lambda pictures, placed: drawn.append(pictures) or str(len(placed)))
    follow_outlines.main(["--output_dir", str(tmp_path)])
    assert capsys.readouterr().out == "2 captions, with the outline: 2\n2 captions, without: 2\n"
    (along, alone), placed = drawn, placed_scenes(2, seed=1, held_out=True)
    assert all(one.tobytes() != other.tobytes() for one, other in zip(along, alone, strict=True))
    assert [read_picture(picture).ground for picture in alone] == [each.scene.ground for each in placed]
