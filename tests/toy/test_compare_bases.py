"""The comparison of two bases: what it trains, what it draws, and its figures."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "toy"))

import compare_bases  # noqa: E402
from drawing import Scene, draw  # noqa: E402

from library.options.parse import parse  # noqa: E402
from library.options.scripts import SdxlTrainNetworkOptions  # noqa: E402


def test_both_bases_are_trained_from_each_seed_and_their_pictures_compared_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    drawn: list[tuple[str, list[str], int]] = []
    star, circle = (draw(Scene(shape, "striped", "red", "large")) for shape in ("star", "circle"))

    def train(command: list[str]) -> int:
        commands.append(command)
        (tmp_path / f"{command[command.index('--output_name') + 1]}.safetensors").touch()
        return 0

    def pictures(checkpoint: str, additions: list[str], captions: list[str], seed: int, scale: float) -> list[Image.Image]:
        lora = Path(additions[-1]).stem
        drawn.append((lora, captions, seed))
        missed = {"bf16_7_1": 0, "bf16_7_2": 1, "nf4_7_1": 2, "nf4_7_2": 1}[lora]
        return [circle] * missed + [star] * (len(captions) - missed)

    monkeypatch.setattr(compare_bases, "run", train)
    monkeypatch.setattr(compare_bases, "draw_captions", pictures)
    (tmp_path / "bf16_7_2.safetensors").touch()  # from an earlier call
    words = ["--seeds", "1", "2", "--steps", "7", "--number", "20", "--output_dir", str(tmp_path)]
    compare_bases.main([*words, "--json", str(tmp_path / "figures.json")])

    options = [parse(SdxlTrainNetworkOptions, command[2:]) for command in commands]
    assert [each.precision.base_quant for each in options] == [None, "nf4", "nf4"]
    assert [each.length.seed for each in options] == [1, 1, 2] and {each.precision.mixed_precision for each in options} == {"bf16"}
    assert [name for name, _, _ in drawn] == ["bf16_7_1", "nf4_7_1", "bf16_7_2", "nf4_7_2"]
    assert len({str(rest) for _, *rest in drawn}) == 1, "the same captions and noise"
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["share that shows the word"] == pytest.approx({"bf16": 0.975, "nf4": 0.925})
    assert found["pictures of each base"] == 40 and found["difference in points"] == pytest.approx(-5)
    # Of 40 differences two are -100: a standard deviation of 22.07, over the root of 40; of the seeds, -10 and 0.
    assert found["its standard error"] == pytest.approx({"of pictures": 3.490, "of trainings": 5}, abs=1e-3)


def test_the_page_of_the_toy_says_what_was_found() -> None:
    found = json.loads((ROOT / "benchmarks/results/toy_nf4.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/toy.md").read_text(encoding="utf-8")
    for title, name in (("bfloat16", "bf16"), ("nf4", "nf4")):
        shares = [*found["share that shows the word, by seed"][name].values(), found["share that shows the word"][name]]
        assert f"| {title} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |" in page
    error = found["its standard error"]
    assert f"difference is −{-found['difference in points']:.1f} points" in page
    assert f"standard error of {error['of pictures']:.1f} over" in page and f"of {error['of trainings']:.1f} over the three" in page
