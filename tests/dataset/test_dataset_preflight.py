"""What is found out about a dataset before a model is loaded."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_samples import config, make_image, section, subset
from PIL import Image

from library.dataset import preflight
from library.dataset.dataset import Dataset
from library.dataset.findings import Findings, Kind, Severity
from library.dataset.preflight import Checked, Limits, check_dataset
from library.options.dataset_config import SectionConfig
from library.options.errors import UserError


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def check(*sections: SectionConfig, max_tokens: int = 75, num_processes: int = 1, **limits: Any) -> Checked:
    findings = Findings()
    dataset = Dataset(config(*sections), 0, findings)
    return check_dataset(dataset, findings, Limits(count_words, max_tokens, num_processes, **limits))


def told(checked: Checked, severity: Severity = Severity.WARNING) -> dict[Kind, list[str]]:
    return {kind: [problem.sentence for problem in problems] for kind, _, problems in checked.findings.groups(severity)}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two pictures of the training size, with captions."""
    images = tmp_path / "plain"
    images.mkdir()
    for number in range(2):
        make_image(images / f"p{number}.png", (64, 64), seed=number)
        (images / f"p{number}.txt").write_text(f"picture {number}")
    return images


def test_nothing_is_said_of_pictures_that_suit(plain: Path) -> None:
    assert told(check(section(subset(plain)))) == {}


def test_captions_longer_than_the_limit_are_counted_the_longest_first(plain: Path) -> None:
    (plain / "p0.txt").write_text("one two three four")
    (plain / "p1.txt").write_text("one two three four five six")
    checked = check(section(subset(plain)), max_tokens=3)
    assert told(checked) == {
        Kind.LONG_CAPTION: [f"2 of 2 captions of {plain} are longer than 3 tokens: p1.png (6 tokens), p0.png (4 tokens)."]
    }
    assert told(check(section(subset(plain)), max_tokens=6)) == {}


def test_captions_without_the_word_that_is_learned_are_told_and_an_error_where_none_has_it(plain: Path) -> None:
    (plain / "p0.txt").write_text("a Mychar, hat")
    checked = check(section(subset(plain)), new_word="mychar")
    assert told(checked) == {Kind.WITHOUT_WORD: [f"1 of 2 captions of {plain} do not have the word mychar: p1.png."]}
    assert told(check(section(subset(plain, caption_prefix="mychar")), new_word="mychar")) == {}
    (error,) = told(check(section(subset(plain)), new_word="hatter"), Severity.ERROR)[Kind.WITHOUT_WORD]
    assert error.startswith("No caption has the word hatter in it") and told(check(section(subset(plain)))) == {}
    regularised = check(section(subset(plain), subset(plain, is_reg=True, caption_prefix="hatter")), new_word="hatter")
    assert Kind.WITHOUT_WORD in told(regularised, Severity.ERROR), "what regularisation images are called teaches no word"


def test_captions_that_are_there_and_empty_are_told_apart_from_missing_ones(plain: Path) -> None:
    (plain / "p0.txt").write_text("\n")
    make_image(plain / "p2.png", (64, 64), seed=5)
    found = told(check(section(subset(plain))))
    assert list(found) == [Kind.NO_CAPTION, Kind.EMPTY_CAPTION]
    assert found[Kind.EMPTY_CAPTION] == [f"1 of 3 images of {plain} have an empty caption: p0.png."]


def test_captions_that_cannot_be_read_are_not_told_as_empty_too(plain: Path) -> None:
    (plain / "p0.txt").write_bytes(b"caf\xe9")
    checked = check(section(subset(plain)))
    assert list(told(checked, Severity.ERROR)) == [Kind.UNREADABLE_CAPTION]
    assert told(checked) == {}
    (plain / "p1.txt").write_text("\n")
    assert told(check(section(subset(plain)))) == {Kind.EMPTY_CAPTION: [f"1 of 2 images of {plain} have an empty caption: p1.png."]}


def test_brackets_count_as_tokens_unless_they_are_weights(plain: Path) -> None:
    (plain / "p0.txt").write_text("one (two ) three")
    assert check(section(subset(plain))).survey.tokens.tolist() == [4, 2]
    assert check(section(subset(plain)), weighted_captions=True).survey.tokens.tolist() == [3, 2]


def test_prefix_suffix_and_the_longest_choice_count_as_part_of_the_caption(plain: Path) -> None:
    (plain / "p0.txt").write_text("short\n{a|b c d} long line")
    rules = {"caption_prefix": "my style", "caption_suffix": "good", "enable_wildcard": True}
    checked = check(section(subset(plain, **rules)))
    assert checked.survey.tokens.tolist() == [8, 5]


def test_what_is_dropped_by_chance_counts_as_there(plain: Path) -> None:
    (plain / "p0.txt").write_text("a, b, c, d")
    rules = {"caption_tag_dropout_rate": 0.9, "caption_dropout_rate": 0.9, "token_warmup_step": 100.0}
    assert check(section(subset(plain, **rules))).survey.tokens.tolist() == [4, 2]


def test_enlarged_and_heavily_cropped_images_are_counted_with_the_worst_first(plain: Path) -> None:
    make_image(plain / "small.png", (32, 32))
    make_image(plain / "smaller.png", (16, 16))
    make_image(plain / "wide.png", (256, 64))
    found = told(check(section(subset(plain, class_tokens=""))))
    assert found == {
        Kind.UPSCALED: ["2 of 5 images of dataset 1 (64x64) are enlarged: smaller.png (4.0 times), small.png (2.0 times)."],
        Kind.CROPPED: ["1 of 5 images of dataset 1 (64x64) lose more than 20% of their area: wide.png (75%)."],
    }


def test_buckets_that_do_not_fill_a_batch_are_told_with_what_all_processes_need(folder: Path) -> None:
    assert Kind.SMALL_BUCKET not in told(check(section(subset(folder), batch_size=5)))
    found = told(check(section(subset(folder), batch_size=3), num_processes=2))
    assert found[Kind.SMALL_BUCKET] == ["dataset 1 (64x64): the bucket 64x64 has 5 of the 6 images of a batch."]
    filled = check(section(subset(folder, num_repeats=2), batch_size=3), num_processes=2)
    assert Kind.SMALL_BUCKET not in told(filled)


def test_copies_are_found_whatever_their_names(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(plain / "p0.png", other / "copy.png")
    (other / "link.png").symlink_to(plain / "p1.png")
    checked = check(section(subset(plain), subset(other, class_tokens="x")))
    assert told(checked) == {
        Kind.DUPLICATE_PATH: [f"{other / 'link.png'} is the same file as {plain / 'p1.png'}."],
        Kind.SAME_CONTENT: [f"{other / 'copy.png'} has the same content as {plain / 'p0.png'}."],
    }


def test_groups_of_copies_are_not_compared_with_each_other(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand groups would take two hundred million comparisons."""

    class Group(list[str]):
        compared = 0
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            Group.compared += 1
            return list(self) == other

    groups = [Group([f"{number}.png", f"{number} again.png"]) for number in range(50)]
    monkeypatch.setattr(preflight, "_check_copies", lambda *_: groups)
    checked = check(section(subset(plain)), section(subset(plain)))
    assert [list(group) for group in checked.copies] == [list(group) for group in groups]
    Group.compared = 0
    check(section(subset(plain)), section(subset(plain)))
    assert Group.compared == 0


def test_files_of_one_size_that_differ_anywhere_are_no_copies(plain: Path) -> None:
    for number, place in enumerate([60, -60]):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels.reshape(-1)[place] = 255
        Image.fromarray(pixels).save(plain / f"b{number}.bmp")
    assert (plain / "b0.bmp").stat().st_size == (plain / "b1.bmp").stat().st_size
    assert told(check(section(subset(plain, class_tokens="")), compares_all=True)) == {}


def test_one_folder_at_two_resolutions_is_no_duplicate(plain: Path) -> None:
    found = told(check(section(subset(plain)), section(subset(plain), resolution=(32, 32))))
    assert Kind.DUPLICATE_PATH not in found and Kind.SAME_CONTENT not in found


def test_names_that_differ_in_the_ending_alone_are_told(plain: Path) -> None:
    make_image(plain / "p0.webp", (64, 64), seed=5)
    assert told(check(section(subset(plain)))) == {
        Kind.SAME_STEM: ["1 of 3 images of dataset 1 (64x64) have the name of another image, but for the ending: p0.webp."]
    }


def test_many_files_of_one_size_are_compared_only_where_that_is_asked_for(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.dataset.preflight._MOST_COMPARED", 1)
    shutil.copy(plain / "p0.png", plain / "copy.png")
    checked = section(subset(plain, class_tokens=""))
    assert Kind.SAME_CONTENT not in told(check(checked))
    assert Kind.SAME_CONTENT in told(check(checked, compares_all=True))


def test_everything_wrong_is_found_at_once(plain: Path, tmp_path: Path) -> None:
    (plain / "p0.png").write_bytes((plain / "p0.png").read_bytes()[:-30])
    (plain / "p1.txt").write_bytes(b"")
    make_image(plain / "latin.png", (64, 64), seed=7)
    (plain / "latin.txt").write_bytes("Käfer".encode("latin-1"))
    make_image(plain / "tiny.png", (20, 20))
    (plain / "tiny.txt").write_text("a caption that is a good deal too long")
    (plain / "nothing.png").write_bytes(b"")
    (tmp_path / "meta.json").write_text('{"missing": {"caption": "a"}}')
    masked, masks = tmp_path / "masked", tmp_path / "masks"
    for path, size in ((masked, (64, 64)), (masks, (32, 64))):
        path.mkdir()
        make_image(path / "m.png", size)
    make_image(masked / "alone.png", (64, 64), seed=3)
    make_image(plain / "good.png", (64, 64), seed=9)
    (plain / "good.txt").write_text("a caption that is too long")
    checked = check(
        section(subset(plain), enable_bucket=True, bucket_no_upscale=True),
        section(subset(plain, metadata_file=str(tmp_path / "meta.json"))),
        section(subset(masked, conditioning_data_dir=str(masks), class_tokens="x"), enable_bucket=True),
        max_tokens=3,
    )
    found = told(checked, Severity.ERROR)
    assert list(found) == [Kind.UNRESOLVED, Kind.UNREADABLE_IMAGE, Kind.TOO_SMALL, Kind.CONDITIONING, Kind.UNREADABLE_CAPTION]
    assert checked.findings.total(Severity.ERROR) == 8
    assert Kind.LONG_CAPTION in told(checked)
    with pytest.raises(UserError) as error:
        checked.findings.raise_errors()
    for name in ["p0.png", "p1.txt", "latin.txt", "tiny.png", "nothing.png", "missing", "m.png", "alone.png"]:
        assert name in str(error.value)
