"""Messages about a dataset file say in which line the key or the table stands."""

import json
import tomllib
from pathlib import Path

import pytest
import toml
from dataset_files import SOURCES, TABLE, load, problems_with_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from library.options.dataset_lines import HEADER, json_table_lines, table_lines

FILE = '''\
# a dataset
[general]
resolution = 512  # pixels
caption_prefix = """
[[datasets]]
keep_tokens = 9
"""

  [[ datasets ]]
batchsize = 2

[[datasets.subsets]]
image_dir = "images"
"keep_tokens" = true
face_crop_aug_range = [
  1.0,
  0.5,
]

[datasets.subsets.custom_attributes]
diff_output_preservation = true

[[datasets.subsets]]
num_repeats = 2

[[datasets]]
resolution = 513

[[datasets.subsets]]
image_dir = "nowhere"
is_reg = 1
'''


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "data.toml").write_text(FILE)
    return problems_with_lines(Path("data.toml"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (10, "[[datasets]] 1: unknown key batchsize."),
        (14, "[[datasets]] 1, subset 1: keep_tokens must be"),
        (15, "[[datasets]] 1, subset 1: face_crop_aug_range "),
        (23, "[[datasets]] 1, subset 2: image_dir is missing."),
        (26, "[[datasets]] 2: resolution 513x513 must consist of multiples"),
        (30, "[[datasets]] 2, subset 1: image_dir nowhere is not a folder."),
        (31, "[[datasets]] 2, subset 1: is_reg must be true or false"),
    ],
)
def test_a_problem_is_told_with_its_line(told: list[str], line: int, words: str) -> None:
    assert [problem for problem in told if problem.startswith(f"data.toml, line {line}: {words}")], told


def test_every_key_of_a_table_has_its_line() -> None:
    lines = table_lines(FILE)
    assert lines["[general]"] == {HEADER: 2, "resolution": 3, "caption_prefix": 4}
    assert lines["[[datasets]] 1, subset 1"]["custom_attributes"] == 20
    assert lines.keys() == {
        "[general]", "[[datasets]] 1", "[[datasets]] 1, subset 1", "[[datasets]] 1, subset 2", "[[datasets]] 2",
        "[[datasets]] 2, subset 1",
    }  # fmt: skip


def test_where_tables_are_written_in_one_line_no_line_is_told(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    path.write_text('general = { batchsize = 2 }\ndatasets = [{ resolution = 512, subsets = [{ image_dir = "gone" }] }]\n')
    assert all(problem.startswith(f"{path}: [") for problem in problems_with_lines(path))


def test_where_a_line_is_not_certain_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    path.write_text('[general]\nflip_aug = true # """\nbatchsize = 2\n# """\n[[datasets]]\nsubsets = [{ image_dir = "gone" }]\n')
    told = problems_with_lines(path)
    assert [problem for problem in told if problem.startswith(f"{path}: [general]: unknown key batchsize.")]
    assert [problem for problem in told if problem.startswith(f"{path}, line 5: [[datasets]] 1: resolution is missing.")]


JSON_FILE = """{
  "general": {"caption_prefix": "[{\\", ", "resolution": 512},
  "datasets": [
    {
      "batchsize": 2, "subsets": [
        {"image_dir": "images",
         "custom_attributes": {"image_dir": [1, {}], "": 2},
         "keep_tokens": true},
        {"num_repeats": 2}
      ]},
    { "resolution": 513,
      "subsets": [
        {
          "image_dir":
            "nowhere"
        }
      ]
    }
  ]
}"""


def test_a_problem_of_a_json_file_is_told_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(JSON_FILE)
    told = " ".join(problems_with_lines(Path("data.json")))
    for line, words in (
        (5, "[[datasets]] 1: unknown key batchsize."),
        (8, "[[datasets]] 1, subset 1: keep_tokens must be"),
        (9, "[[datasets]] 1, subset 2: image_dir is missing."),
        (11, "[[datasets]] 2: resolution 513x513 must consist of multiples"),
        (14, "[[datasets]] 2, subset 1: image_dir nowhere is not a folder."),
    ):
        assert f"data.json, line {line}: {words}" in told


TABLES = st.lists(st.sampled_from([(row[0], row[1]) for row in TABLE]), max_size=4).map(dict)


@given(TABLES, st.lists(st.tuples(TABLES, st.lists(TABLES, min_size=1, max_size=3)), min_size=1, max_size=3))
@settings(max_examples=50)
def test_the_line_of_a_key_holds_the_key(
    general: dict[str, object], datasets: list[tuple[dict[str, object], list[object]]]
) -> None:
    content = {"general": general, "datasets": [{**own, "subsets": subsets} for own, subsets in datasets]}
    text = toml.dumps(content)
    assert tomllib.loads(text)["datasets"]
    rows = text.split("\n")
    for where, keys in table_lines(text).items():
        for key, line in keys.items():
            assert key in rows[line - 1], (where, key)
            assert "[" in rows[line - 1] or " = " in rows[line - 1]
    text = json.dumps(content, indent=1)
    rows, lines = text.split("\n"), json_table_lines(text)
    assert len(lines) == 1 + len(datasets) + sum(len(subsets) for _, subsets in datasets)
    for where, keys in lines.items():
        for key, line in keys.items():
            assert f'"{key}": ' in rows[line - 1] if key else rows[line - 1].endswith(("{", "{}", "{},")), (where, key)


def test_a_sound_file_is_not_hurt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "data.toml").write_text(toml.dumps({"datasets": [{"resolution": 512, "subsets": [SOURCES["folder"]]}]}))
    assert load(Path("data.toml")).sections[0].resolution == (512, 512)
