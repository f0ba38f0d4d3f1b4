"""What the tools write into metadata files is what training reads from them."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.dataset.metadata_edit import Entries, image_key, images_in, read_entries, write_entries
from library.dataset.metadata_file import caption_of, read_metadata
from library.dataset.metadata_merge import merge_texts
from library.options.errors import UserError
from library.options.metadata_tools import MergeRequest
from tests.dataset.dataset_samples import make_image

SIZES = st.tuples(st.integers(1, 9999), st.integers(1, 9999)).map(list)
ENTRIES = st.dictionaries(
    st.text(min_size=1),
    st.fixed_dictionaries(
        {},
        optional={
            "caption": st.text(),
            "tags": st.text(),
            "train_resolution": SIZES,
            "image_size": SIZES,
            "of others": st.recursive(st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner, max_size=2)),
        },
    ),
    max_size=5,
)


@settings(max_examples=40, derandomize=True)
@given(ENTRIES)
def test_entries_come_back_as_they_were_and_training_reads_their_texts(entries: Entries) -> None:
    with TemporaryDirectory() as folder:
        path = f"{folder}/meta.json"
        write_entries(path, entries)
        content = Path(path).read_bytes()
        read = read_entries(path)
        assert read == entries and list(read) == list(entries)
        write_entries(path, read)
        assert Path(path).read_bytes() == content
        content.decode("ascii")
        texts = {entry.key: (entry.caption, entry.tags) for entry in read_metadata(path)}
    assert texts == {key: (said.get("caption", "").strip(), said.get("tags", "").strip()) for key, said in entries.items()}


@settings(max_examples=50)
@given(ENTRIES)
def test_json_lines_hold_the_same(entries: Entries) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "meta.jsonl"
        lines = [json.dumps({"image_path": key, **said}, ensure_ascii=False) for key, said in entries.items()]
        path.write_text("\n\n".join(lines), encoding="utf-8", newline="")
        assert read_entries(str(path)) == entries


@settings(max_examples=50)
@given(caption=st.text(), tags=st.text(), name=st.text("ab.[]'é 名", min_size=1, max_size=9).filter(lambda name: name[0] != "."))
def test_text_files_arrive_in_training_through_the_merging_tools(caption: str, tags: str, name: str) -> None:
    with TemporaryDirectory() as folder:
        image = make_image(Path(folder) / f"{name}.png", (8, 8))
        image.with_name(f"{name}.caption").write_bytes(caption.encode())
        image.with_name(f"{name}.txt").write_bytes(tags.encode())
        target = f"{folder}/meta.json"
        for field, extension in (("caption", ".caption"), ("tags", ".txt")):
            request = MergeRequest(folder, target, None if field == "caption" else target, extension, False, False, False)
            merge_texts(request, field)
        (entry,) = read_metadata(target)
    assert entry.key == name
    assert (entry.caption, entry.tags) == (_plain(caption), _plain(tags))
    shown = caption_of(entry, ",", multiline=False)
    assert shown == ",".join(text for text in (_plain(caption), _plain(tags)) if text).split("\n")[0]


def _plain(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()


def test_what_training_would_refuse_the_tools_refuse_too(tmp_path: Path) -> None:
    contents: dict[str, Any] = {"not an object": ["a"], "no entry": {"a": "b"}, "no text": {"a": {"caption": ["x"]}}}
    for content in contents.values():
        (tmp_path / "meta.json").write_text(json.dumps(content))
        with pytest.raises(UserError):
            read_entries(str(tmp_path / "meta.json"))


def test_keys_are_names_or_paths_in_one_spelling(tmp_path: Path) -> None:
    make_image(tmp_path / "a.b.png", (8, 8))
    (image,) = images_in(f"{tmp_path}/./", recursive=False)
    assert image_key(image, full_path=False) == "a.b"
    assert image_key(image, full_path=True) == str(tmp_path / "a.b.png")
    assert image_key("./a.png", full_path=True) == "a.png"
