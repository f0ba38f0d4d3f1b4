"""From options and prompt lines to the pictures of a run, against what sd-scripts makes of them."""

import json
from pathlib import Path

import pytest

from library.generation.plan import (
    PictureSettings,
    batches,
    locate_prompt,
    log_notes,
    plan_pictures,
    read_prompts,
    resolve_checkpoint,
)
from library.generation.request import ImageRequest
from library.generation.seeds import SeedSeries
from library.options.errors import UsageError, UserError
from library.options.groups.generation import PictureOptions, PromptOptions, SizeConditioningOptions

VALUES = json.loads((Path(__file__).parents[1] / "compat" / "prompt_reference_values.json").read_text(encoding="utf-8"))
REFUSED = ("--dsd1", "--dsr", "--dsd2", "--glt", "--glr", "--glus", "{e$$")
LINES = [case for case in VALUES["prompt_options"]["sdxl_gen_img"] if not any(name in case["line"] for name in REFUSED)]


def settings(size: dict[str, int] | None = None, prompt: dict[str, object] | None = None, **picture: object) -> PictureSettings:
    return PictureSettings(PromptOptions(**(prompt or {})), PictureOptions(**picture), SizeConditioningOptions(**(size or {})))


def plan(*lines: str, **options: object) -> list[ImageRequest]:
    return plan_pictures([locate_prompt(line, "line 1") for line in lines], settings(**options))


@pytest.mark.parametrize("case", LINES, ids=lambda case: case["line"])
def test_a_line_asks_for_what_it_asks_of_sd_scripts(case):
    requests = plan(case["line"], W=64, H=64, steps=3, sampler="euler_a", seed=11, prompt={"images_per_prompt": 2})
    assert len(requests) == case["calls"]
    for request in requests:
        assert request.prompt == case["prompt"][0]
        assert request.negative_prompt == case["negative_prompt"]
        assert (request.width, request.height) == (case["width"], case["height"])
        assert (request.steps, request.cfg_scale) == (case["steps"], case["scale"])
        assert request.raw_prompt == case["saved"][0]["raw"]
    names = {saved["seed"] for saved in case["saved"]}
    assert {str(request.seed) for request in requests} == names


def test_the_sizes_the_model_is_told_come_from_the_line():
    line = "a cat --ow 512 --oh 768 --nw 256 --nh 320 --ct 16 --cl 24"
    request = plan(line, W=64, H=64)[0]
    assert request.original_wh == (512, 768)
    assert request.negative_original_wh == (256, 320)
    assert request.crop_top_left == (16, 24)


def test_the_line_wins_over_the_command_line_and_one_side_alone_takes_the_picture_for_the_other():
    request = plan("a --oh 768", W=128, H=64, size={"original_height": 1, "crop_left": 8})[0]
    assert request.original_wh == (128, 768)
    assert request.negative_original_wh is None
    assert request.crop_top_left == (0, 8)


@pytest.mark.parametrize("seed", ["1", "42", "123456789"])
def test_seeds_are_the_series_sd_scripts_draws(seed):
    expected = VALUES["seeds"]["sdxl_gen_img"][seed]
    assert [request.seed for request in plan("a", "b", "c", seed=int(seed), prompt={"images_per_prompt": 2})] == expected
    rounds = plan("a", "b", "c", seed=int(seed), prompt={"n_iter": 2})
    assert [request.seed for request in rounds] == expected


def test_a_single_picture_has_the_seed_itself():
    assert plan("a", seed=5)[0].seed == 5


def test_without_a_seed_pictures_differ():
    assert len({request.seed for request in plan("a", "b", "c")}) == 3


def test_the_same_seeds_in_every_round_when_asked_for():
    seeds = [request.seed for request in plan("a", "b", seed=1, iter_same_seed=True, prompt={"n_iter": 3})]
    assert seeds == VALUES["seeds"]["sdxl_gen_img"]["1"][:2] * 3


def test_seeds_of_a_prompt_leave_the_series_to_the_others():
    assert [request.seed for request in plan("a --d 7,8", "b", seed=1, prompt={"images_per_prompt": 3})] == [
        7, 8, 8, *VALUES["seeds"]["sdxl_gen_img"]["1"][:3],
    ]  # fmt: skip


def test_prompts_typed_one_by_one_draw_from_the_same_series():
    series = SeedSeries(42, 0)
    assert [series.next() for _ in range(3)] == VALUES["seeds"]["sdxl_gen_img"]["42"][:3]


def test_sides_are_rounded_down_to_a_multiple_of_8_and_told(caplog):
    request = plan("a --w 515 --h 20", seed=1)[0]
    assert (request.width, request.height) == (512, 64)
    log_notes([locate_prompt("a --w 515 --h 20", "line 1")], settings())
    assert "line 1: 515x20 is drawn as 512x64" in caplog.text


def test_a_prompt_file_skips_empty_lines_and_comments_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa cat\n\n   \n# note\n #not a note\nein Müller --w 64\n".encode())
    prompts = read_prompts(PromptOptions(from_file=str(path), prompt="unused"))
    assert [prompt.line.prompt for prompt in prompts] == ["a cat", "#not a note", "ein Müller"]
    assert prompts[2].where == f"{path}, line 6"


def test_all_lines_that_cannot_be_drawn_are_told_together(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a --dsd1 3\nb\nc {red|blue} --glt 700\n", encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        read_prompts(PromptOptions(from_file=str(path)))
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        f"{path}, line 1",
        f"{path}, line 3",
        f"{path}, line 3",
    ]
    assert "dynamic prompts" in raised.value.problems[2]


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.txt: there is no such file"):
        read_prompts(PromptOptions(from_file=str(tmp_path / "nowhere.txt")))


def test_a_prompt_file_in_another_encoding_is_told(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("Müller".encode("cp1252"))
    with pytest.raises(UserError, match="not a UTF-8 text"):
        read_prompts(PromptOptions(from_file=str(path)))


def test_a_file_without_a_prompt_is_told(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("# nothing\n\n", encoding="utf-8")
    with pytest.raises(UsageError, match="there is no prompt in this file"):
        read_prompts(PromptOptions(from_file=str(path)))


def test_batches_hold_neighbours_that_can_be_drawn_together():
    requests = plan("a", "b", "c --w 128", "d --w 128", "e", seed=1, W=64, H=64)
    assert [[r.prompt for r in batch] for batch in batches(requests, 2)] == [["a", "b"], ["c", "d"], ["e"]]
    assert [[r.prompt for r in batch] for batch in batches(requests[:2] + requests[4:], 2)] == [["a", "b"], ["e"]]


def test_the_checkpoint_may_be_a_pattern_that_matches_one_path(tmp_path):
    (tmp_path / "a-1.safetensors").touch()
    assert resolve_checkpoint(str(tmp_path / "a-*.safetensors")) == str(tmp_path / "a-1.safetensors")
    (tmp_path / "a-2.safetensors").touch()
    with pytest.raises(UserError, match="matches 2 paths"):
        resolve_checkpoint(str(tmp_path / "a-*.safetensors"))
    with pytest.raises(UserError, match="no such file or folder"):
        resolve_checkpoint(str(tmp_path / "b.safetensors"))
