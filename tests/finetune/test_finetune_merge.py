"""Merging of captions and tags into metadata files."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from finetune import merge_captions_to_metadata, merge_dd_tags_to_metadata
from library.options.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parents[2]
VALUES = json.loads((Path(__file__).parents[1] / "compat" / "prompt_reference_values.json").read_text(encoding="utf-8"))


def merge_captions(*arguments: str | Path) -> None:
    merge_captions_to_metadata.main([str(argument) for argument in arguments])


def merge_tags(*arguments: str | Path) -> None:
    merge_dd_tags_to_metadata.main([str(argument) for argument in arguments])


def picture(path: Path, **texts: str) -> Path:
    """Write a picture, and a text file beside it for each ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    for ending, text in texts.items():
        path.with_suffix(f".{ending}").write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The two pictures of the reference values."""
    picture(tmp_path / "data" / "a.png", caption="hello é\nline2\n", txt="t1, t2\n")
    picture(tmp_path / "data" / "b.png", caption=" b cap \n", txt="t3")
    return tmp_path / "data"


def test_the_file_is_that_of_sd_scripts_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    merge_captions(folder, tmp_path / "meta.json")
    merge_tags(folder, tmp_path / "meta.json")
    assert (tmp_path / "meta.json").read_bytes() == VALUES["metadata_json"]["content"].encode()


def test_what_the_output_file_has_already_is_kept(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {"z": {"caption": "gone from the folder"}, "a": {"caption": "old", "train_resolution": [64, 64]}}
    (tmp_path / "meta.json").write_text(json.dumps(before))
    merge_captions(folder, tmp_path / "meta.json")
    assert json.loads((tmp_path / "meta.json").read_text()) == {
        "z": {"caption": "gone from the folder"},
        "a": {"caption": "hello é\nline2", "train_resolution": [64, 64]},
        "b": {"caption": "b cap"},
    }
    assert "caption of 2 images, 1 entries new; 1 entries of other images stay" in capsys.readouterr().out


def test_in_json_is_read_in_place_of_the_output_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"left": {"tags": "behind"}}')
    (tmp_path / "first.json").write_text('{"a": {"caption": "kept"}}')
    merge_tags(folder, tmp_path / "meta.json", "--in_json", tmp_path / "first.json")
    assert json.loads((tmp_path / "meta.json").read_text()) == {"a": {"caption": "kept", "tags": "t1, t2"}, "b": {"tags": "t3"}}
    assert json.loads((tmp_path / "first.json").read_text()) == {"a": {"caption": "kept"}}


def test_json_lines_can_be_the_start(folder: Path, tmp_path: Path) -> None:
    lines = ['{"image_path": "a", "tags": "x", "image_size": [8, 8]}', "", '{"image_path": "q", "tags": "y"}']
    (tmp_path / "tagged.jsonl").write_text("\n".join(lines))
    merge_captions(folder, tmp_path / "meta.json", "--in_json", tmp_path / "tagged.jsonl")
    assert json.loads((tmp_path / "meta.json").read_text()) == {
        "a": {"tags": "x", "image_size": [8, 8], "caption": "hello é\nline2"},
        "q": {"tags": "y"},
        "b": {"caption": "b cap"},
    }


def test_the_ending_can_be_chosen_and_the_misspelt_option_wins(folder: Path, tmp_path: Path) -> None:
    merge_captions(folder, tmp_path / "one.json", "--caption_extension", ".txt")
    assert json.loads((tmp_path / "one.json").read_text())["a"] == {"caption": "t1, t2"}
    merge_captions(folder, tmp_path / "two.json", "--caption_extension", ".no", "--caption_extention", "txt")
    assert json.loads((tmp_path / "two.json").read_text())["a"] == {"caption": "t1, t2"}
    merge_tags(folder, tmp_path / "three.json", "--caption_extension", "caption")
    assert json.loads((tmp_path / "three.json").read_text())["b"] == {"tags": "b cap"}


def test_full_paths_are_those_that_were_typed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    merge_tags("./data/", "meta.json", "--full_path")
    assert list(json.loads(Path("meta.json").read_text())) == [os.path.join("data", "a.png"), os.path.join("data", "b.png")]
    merge_tags(folder, "whole.json", "--full_path")
    assert list(json.loads(Path("whole.json").read_text())) == [str(folder / "a.png"), str(folder / "b.png")]


def test_sub_folders_are_searched_when_asked_and_hidden_ones_never(folder: Path, tmp_path: Path) -> None:
    picture(folder / "deep" / "er" / "a.JPG", txt="d")
    picture(folder / ".hidden" / "a.png", txt="h")
    merge_tags(folder, tmp_path / "flat.json", "--full_path")
    assert len(json.loads((tmp_path / "flat.json").read_text())) == 2
    merge_tags(folder, tmp_path / "meta.json", "--full_path", "--recursive")
    found = json.loads((tmp_path / "meta.json").read_text())
    assert list(found) == [str(folder / "a.png"), str(folder / "b.png"), str(folder / "deep" / "er" / "a.JPG")]
    assert found[str(folder / "deep" / "er" / "a.JPG")] == {"tags": "d"}


def test_all_that_is_wrong_with_the_paths_is_told_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        merge_tags(tmp_path / "no", tmp_path, "--in_json", tmp_path / "gone.json", "--recursive")
    told = error.value.problems
    assert [words in problem for words, problem in zip(("no folder", "no file", "is a folder", "--full_path"), told, strict=True)]
    with pytest.raises(UsageError, match=r"should end in .json"):
        merge_tags(tmp_path, tmp_path / "meta.jsonl")


def test_every_image_without_a_text_is_named_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    picture(folder / "c.png")
    picture(folder / "d.png")
    picture(folder / "e.png", caption="x").with_suffix(".caption").write_bytes(b"caf\xe9")
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError) as error:
        merge_captions(folder, tmp_path / "meta.json")
    lines = str(error.value).splitlines()
    assert lines[0] == "3 of 5 images have no text that can be read:"
    assert lines[1:3] == [f"  {folder / name} has no .caption file." for name in ("c.png", "d.png")]
    assert f"{folder / 'e.caption'} is not UTF-8" in lines[3]
    assert (tmp_path / "meta.json").read_text() == "{}"


def test_where_no_image_has_a_text_the_endings_there_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"None of the 2 images has a \.tags file.*end in \.caption, \.txt") as error:
        merge_tags(folder, tmp_path / "meta.json", "--caption_extension", ".tags")
    assert "--caption_extension names their ending" in str(error.value)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "sub" / "a.png", txt="x")
    with pytest.raises(UserError, match=r"There are no images .* --recursive"):
        merge_tags(tmp_path, tmp_path / "meta.json")
    assert not (tmp_path / "meta.json").exists()


def test_texts_are_read_with_any_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".caption").write_bytes("\ufeff one \r\n\r\ntwo\r".encode())
    merge_captions(tmp_path, tmp_path / "meta.json")
    assert json.loads((tmp_path / "meta.json").read_text()) == {"a": {"caption": "one \n\ntwo"}}


def test_shared_entries_and_empty_texts_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png", txt="")
    picture(tmp_path / "a.jpg")
    with caplog.at_level(logging.WARNING):
        merge_tags(tmp_path, tmp_path / "meta.json")
    assert json.loads((tmp_path / "meta.json").read_text()) == {"a": {"tags": ""}}
    assert f"{tmp_path / 'a.jpg'} and {tmp_path / 'a.png'}" in caplog.text
    assert "2 .txt files are empty" in caplog.text
    caplog.clear()
    merge_tags(tmp_path, tmp_path / "whole.json", "--full_path")
    assert "several images" not in caplog.text


def test_debug_prints_every_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_tags(folder, tmp_path / "meta.json")
    assert "t1, t2" not in capsys.readouterr().out
    merge_tags(folder, tmp_path / "meta.json", "--debug")
    assert "a: t1, t2\nb: t3\n" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_file_is_written_whatever_becomes_of_the_output(folder: Path, tmp_path: Path, encoding: str) -> None:
    command = [sys.executable, str(ROOT / "finetune" / "merge_captions_to_metadata.py"), str(folder), "meta.json", "--debug"]
    setting = os.environ | {"PYTHONIOENCODING": encoding}
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, env=setting, check=False)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert {"ascii": b"hello \\xe9", "utf-8": "hello é".encode()}[encoding] in shown.stdout
    (tmp_path / "meta.json").unlink()
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert len(json.loads((tmp_path / "meta.json").read_text())) == 2


def test_a_full_disk_leaves_the_old_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meta.json").write_text('{"a": {"tags": "before"}}')

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        merge_tags(folder, tmp_path / "meta.json")
    assert (tmp_path / "meta.json").read_text() == '{"a": {"tags": "before"}}'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "meta.json"]
