"""Cleaning of captions and tags, held against what sd-scripts makes of the same texts."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.clean_captions_and_tags import main
from library.dataset.metadata_clean import clean_caption, clean_tags
from library.options.errors import UsageError, UserError

VALUES = json.loads((Path(__file__).parents[1] / "compat" / "prompt_reference_values.json").read_text(encoding="utf-8"))

FURTHER_TAGS = [
    (
        "2girls, red hair, blue hair, white shirt, shirt, long hair, blue eyes, red eyes, looking_at_viewer",
        "2girls, white shirt, long hair, looking at viewer",
    ),
    ("1girl, long_hair, ^_^, rating:safe", "1girl, long hair, ^_^"),
    ("1boy, 2girls, blue_eyes, red_eyes, long hair, short hair, green hair", "1boy, 2girls, green hair"),
    ("1girl, blue_eyes, red_eyes", "1girl, blue eyes, red eyes"),
    ("rating:safe, 1girl", "rating:safe, 1girl"),
    ("2girls, double_bun, french_braid, solo", "2girls, solo"),
    ("shirt, t-shirt", "shirt, t-shirt"),
]


@pytest.mark.parametrize(("before", "after"), [*VALUES["clean_tags"]["cases"], *FURTHER_TAGS])
def test_tags_come_out_as_from_sd_scripts(before: str, after: str) -> None:
    assert clean_tags(before) == after


@pytest.mark.parametrize(
    ("before", "after"), [*VALUES["clean_caption"]["cases"], ("a young woman and people", "a girl and girls"), ("", "")]
)
def test_captions_come_out_as_from_sd_scripts(before: str, after: str) -> None:
    assert clean_caption(before) == after


@given(st.lists(st.sampled_from(["2girls", "blue eyes", "red_eyes", "^_^", "shirt", "white shirt", "long hair", "x, rating:s"])))
def test_cleaning_adds_no_tag_and_cleaning_twice_changes_nothing_more(tags: list[str]) -> None:
    once = clean_tags(", ".join(tags))
    assert set(once.split(", ")) <= {"red eyes" if tag == "red_eyes" else tag for tag in tags} | {"", "x"}
    assert clean_tags(once) == once


def test_only_captions_and_tags_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "meta.json", tmp_path / "clean.json"
    entries = {
        "b": {"tags": "1girl, long_hair", "caption": "a woman", "train_resolution": [512, 448], "mine": {"é": 1}},
        "a": {"tags": "1girl", "image_size": [640, 480]},
        "c": {"caption": "a girl"},
    }
    source.write_text(json.dumps(entries), encoding="utf-8")
    main([str(source), str(target)])
    entries["b"] |= {"tags": "1girl, long hair", "caption": "a girl"}
    assert target.read_text(encoding="utf-8") == json.dumps(entries, indent=2)
    assert list(json.loads(target.read_text())) == ["b", "a", "c"]
    assert "3 entries; tags changed in 1, missing in 1; caption changed in 1, missing in 1" in capsys.readouterr().out


def test_a_file_can_be_cleaned_in_place_and_changes_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "meta.json"
    source.write_text('{"a": {"tags": "long_hair"}, "b": {"tags": "hat"}}')
    main([str(source), str(source), "--debug"])
    assert json.loads(source.read_text()) == {"a": {"tags": "long hair"}, "b": {"tags": "hat"}}
    shown = capsys.readouterr().out
    assert "a: tags\n  long_hair\n  long hair\n" in shown
    assert "b: tags" not in shown


def test_the_old_form_with_a_folder_in_front_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "meta.json").write_text('{"a": {"tags": "long_hair"}}')
    with caplog.at_level(logging.WARNING):
        main([str(tmp_path), str(tmp_path / "meta.json"), str(tmp_path / "clean.json")])
    assert json.loads((tmp_path / "clean.json").read_text()) == {"a": {"tags": "long hair"}}
    assert f"{tmp_path} is not used" in caplog.text


def test_four_files_or_an_unknown_option_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["c", "d"], ["--verbose"]):
        with pytest.raises(SystemExit) as stop:
            main(["a", "b", *more])
        assert stop.value.code == 2
        assert "unrecognized arguments: " + " ".join(more) in capsys.readouterr().err


def test_all_wrong_paths_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        main([str(tmp_path / "gone.json"), str(tmp_path)])
    assert len(error.value.problems) == 2
    assert "There is no file" in error.value.problems[0]
    assert "is a folder" in error.value.problems[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": {"tags": "x"}', "is not valid JSON"),
        ('["a"]', "must hold one JSON object"),
        ('{"a": {"tags": 5}}', "tags must be a text in quotes"),
        ('{"a": {"tags": "x"}, "a": {"tags": "y"}}', "has two entries 'a'"),
    ],
)
def test_broken_metadata_is_refused_and_the_target_stays(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "meta.json").write_text(content)
    (tmp_path / "clean.json").write_text("before")
    with pytest.raises(UserError, match=words):
        main([str(tmp_path / "meta.json"), str(tmp_path / "clean.json")])
    assert (tmp_path / "clean.json").read_text() == "before"
