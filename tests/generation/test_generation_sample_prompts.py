"""Sample prompt files of training: text, TOML, JSON."""

import json
import textwrap

import pytest

from library.generation.request import ImageRequest
from library.generation.sample_prompts import SampleDefaults, read_sample_prompts
from library.options.errors import UsageError, UserError

DEFAULTS = SampleDefaults(width=768, height=640, sampler="euler")


def read(tmp_path, name: str, content: str) -> list[ImageRequest]:
    path = tmp_path / name
    path.write_text(textwrap.dedent(content), encoding="utf-8")
    return read_sample_prompts(str(path), DEFAULTS)


def problems(tmp_path, name: str, content: str) -> list[str]:
    with pytest.raises(UsageError) as raised:
        read(tmp_path, name, content)
    return [problem.replace(f"{tmp_path}/", "") for problem in raised.value.problems]


FULL = ImageRequest(
    "a cat", "bad", width=512, height=256, steps=12, cfg_scale=4.5, seed=3, sampler="euler_a", raw_prompt="a cat"
)  # fmt: skip


def test_a_text_file_has_one_prompt_per_line(tmp_path):
    requests = read(tmp_path, "p.txt", "# note\n\na cat --n bad --w 512 --h 256 --s 12 --l 4.5 --d 3 --ss euler_a\na dog\n")
    assert requests[0] == FULL
    assert requests[1] == ImageRequest("a dog", width=768, height=640, steps=30, cfg_scale=7.5, sampler="euler", raw_prompt="a dog")


def test_toml_subsets_take_shared_values_and_override_them(tmp_path):
    requests = read(
        tmp_path,
        "p.toml",
        """\
        [prompt]
        width = 512
        height = 256
        sample_steps = 99
        negative_prompt = "bad"
        [[prompt.subset]]
        prompt = "a cat"
        sample_steps = 12
        scale = 4.5
        seed = 3
        sample_sampler = "euler_a"
        [[prompt.subset]]
        prompt = "a dog"
        """,
    )
    assert requests[0] == FULL
    assert (requests[1].prompt, requests[1].steps, requests[1].width) == ("a dog", 99, 512)


def test_json_lists_hold_objects_and_lines(tmp_path):
    one = {"prompt": "a cat", "negative_prompt": "bad", "width": 512, "height": 256, "sample_steps": 12, "scale": 4.5, "seed": 3}
    requests = read(tmp_path, "p.json", json.dumps([one | {"sample_sampler": "euler_a"}, "a dog --w 64"]))
    assert requests[0] == FULL
    assert (requests[1].prompt, requests[1].width) == ("a dog", 64)


def test_sizes_are_rounded_down_to_a_multiple_of_8_and_at_least_64(tmp_path):
    assert [(r.width, r.height) for r in read(tmp_path, "p.txt", "a --w 519 --h 20\n")] == [(512, 64)]


def test_steps_are_brought_into_1_to_1000(tmp_path):
    assert [r.steps for r in read(tmp_path, "p.json", '[{"prompt": "a", "sample_steps": 0}, "a --s 5000"]')] == [1, 1000]


def test_everything_wrong_in_a_file_is_told_together(tmp_path):
    content = """\
        [prompt]
        widht = 512
        [[prompt.subset]]
        prompt = "a"
        width = "wide"
        sample_sampler = "oiler"
        [[prompt.subset]]
        negative_prompt = "b"
        seed = -1
        """
    told = problems(tmp_path, "p.toml", content)
    assert 'p.toml, prompt 1: "widht" is not a key of a prompt; did you mean width?' in told
    assert "p.toml, prompt 1: width is 'wide'; it must be a whole number, not negative." in told
    assert any('prompt 1: there is no sampler "oiler"; there are ddim, ' in problem for problem in told)
    assert "p.toml, prompt 2: there is no key prompt." in told
    assert "p.toml, prompt 2: seed is -1; it must be a whole number, not negative." in told


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.toml", "[prompt\n", "p.toml: not a TOML file"),
        ("p.toml", "prompt = 3\n", "p.toml: a table [prompt] with [[prompt.subset]] entries is expected"),
        ("p.json", "[1,\n", "p.json, line 2: not a JSON file"),
        ("p.json", '{"prompt": "a"}', "p.json: a list of prompts is expected"),
        ("p.json", "[3]", "p.json, prompt 1: a text or a table of keys is expected, not 3"),
        ("p.txt", "# nothing\n", "p.txt: there is no prompt in this file"),
    ],
)
def test_a_file_of_another_shape_is_told(tmp_path, name, content, told):
    assert problems(tmp_path, name, content)[0].startswith(told)


def test_a_missing_file_and_another_ending_are_told(tmp_path):
    with pytest.raises(UserError, match=r"--sample_prompts .*p\.txt: there is no such file"):
        read_sample_prompts(str(tmp_path / "p.txt"), DEFAULTS)
    with pytest.raises(UserError, match=r"read from .txt, .toml or .json files"):
        read_sample_prompts(str(tmp_path / "p.yaml"), DEFAULTS)


def test_options_without_effect_are_noted(tmp_path, caplog):
    read(tmp_path, "p.txt", "a --cn hint.png --x 1\n")
    read(tmp_path, "p.json", '[{"prompt": "a", "controlnet_image": "hint.png"}]')
    assert "--cn changes nothing: a hint image is only used when a ControlNet is trained" in caplog.text
    assert "--x is not an option of a prompt" in caplog.text
    assert "controlnet_image change nothing here" in caplog.text
