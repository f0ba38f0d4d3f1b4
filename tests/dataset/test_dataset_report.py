"""The report: the same facts for people and for programs, whatever names and captions hold."""

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_samples import config, make_image, section, subset
from PIL import Image, ImageFile

from library.dataset.dataset import Dataset
from library.dataset.findings import Findings
from library.dataset.markup import bar, element, join, table
from library.dataset.preflight import Limits, check_dataset
from library.dataset.report import write_report
from library.dataset.thumbnails import thumbnails
from library.options.dataset_config import SectionConfig

LENGTHS = {"batches_per_epoch": 3, "updates_per_epoch": 3, "epochs": 2, "total_updates": 6}


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def report(folder: Path, *sections: SectionConfig, max_tokens: int = 75) -> tuple[Page, dict[str, Any]]:
    findings = Findings()
    dataset = Dataset(config(*sections), 0, findings)
    path = write_report(folder, check_dataset(dataset, findings, Limits(count_words, max_tokens)), LENGTHS)
    page = path.read_text(encoding="utf-8")
    return Page(page), json.loads(path.with_suffix(".json").read_text())


def test_page_and_data_hold_the_facts(folder: Path, tmp_path: Path) -> None:
    page, facts = report(tmp_path / "new" / "report", section(subset(folder, num_repeats=3), enable_bucket=True, batch_size=4))
    assert facts["images"] == 5 and facts["uses_per_epoch"] == 15 and facts["total_updates"] == 6
    (dataset,) = facts["datasets"]
    assert sum(bucket["uses"] for bucket in dataset["buckets"]) == 15
    square = next(bucket for bucket in dataset["buckets"] if bucket["width"] == bucket["height"])
    assert square == {"width": 64, "height": 64, "images": 4, "uses": 12, "batches": 3, "last_batch": 4}
    assert ["tag a", 5] in facts["tags"]["most"]
    for words in ["64x64", "uses in an epoch", "updates in all", "tag a", str(folder)]:
        assert words in page.text
    assert page.open == []


def test_findings_are_all_in_it_errors_first(folder: Path, tmp_path: Path) -> None:
    (folder / "im0.png").write_bytes(b"")
    (folder / "im1.txt").write_text("one two three four")
    page, facts = report(tmp_path, section(subset(folder)), max_tokens=3)
    assert [finding["severity"] for finding in facts["findings"]][:2] == ["error", "warning"]
    assert facts["findings"][0]["problems"][0]["sentence"].endswith("im0.png is empty (0 bytes).")
    assert "It cannot be trained on as it is." in page.text
    assert page.text.index("im0.png is empty") < page.text.index("longer than 3 tokens")


def test_a_report_can_be_written_of_nothing_usable(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no picture")
    page, facts = report(tmp_path, section(subset(images)))
    assert facts["images"] == 0 and facts["errors"] == 1
    assert "a.png is not a picture" in page.text


@pytest.mark.parametrize(
    "name", ["<script>alert(1)<", 'it\'s "quoted" & more', "emoji 🐱 猫", "n" * 180, "</style></body>".replace("/", "∕")]
)
def test_names_and_captions_are_text_and_never_markup(name: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    make_image(images / f"{name}.png", (16, 32))
    (images / f"{name}.txt").write_text('<img src=x onerror=alert(1)>, "tag", </table><script>', encoding="utf-8")
    page, facts = report(tmp_path, section(subset(images)), max_tokens=2)
    assert page.open == []
    assert not page.all("script")
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert name in page.text
    assert "</table><script>" in page.text
    assert facts["enlarged"]["listed"][0]["name"] == f"{name}.png"


def test_a_name_that_is_not_utf_8_does_not_stop_the_report(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    picture = make_image(tmp_path / "a.png", (16, 16))
    with open(bytes(images) + b"/caf\xe9.png", "wb") as file:
        file.write(picture.read_bytes())
    page, _ = report(tmp_path, section(subset(images, class_tokens="x")))
    assert "caf\\udce9.png" in page.text


def test_the_page_fetches_nothing(folder: Path, tmp_path: Path) -> None:
    write = report(tmp_path, section(subset(folder, caption_extension=".none"), resolution=(128, 128)))[0]
    for _, attributes in write.tags:
        for name in ("src", "href"):
            assert str(attributes.get(name) or "data:").startswith(("data:", "#"))
    page = (tmp_path / "dataset_report.html").read_text()
    assert not re.search(r"https?:|@import|url\(", page)


def test_links_lead_to_headings_and_pictures_have_words(folder: Path, tmp_path: Path) -> None:
    page, _ = report(tmp_path, section(subset(folder), resolution=(128, 128)))
    headings = {attributes.get("id") for attributes in page.all("h2")}
    links = [str(attributes["href"]) for attributes in page.all("a")]
    assert {"#findings", "#buckets", "#enlarged", "#captions", "#tags"} <= set(links)
    assert {link.removeprefix("#") for link in links} == headings
    assert len(page.all("img")) == 5 + 4  # all are enlarged, all but the square one are cropped
    assert all(image["alt"] for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"
    assert all("scope" in cell for cell in page.all("th"))


def test_pictures_are_bounded_and_the_worst_shown(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(30):
        make_image(images / f"{number}.png", (20 + number, 20 + number))
    page, facts = report(tmp_path, section(subset(images, class_tokens="")))
    assert facts["enlarged"]["images"] == 30
    assert len(page.all("img")) == 24
    assert facts["enlarged"]["listed"][0]["name"] == "0.png"
    assert "and 6 more" in page.text


def test_small_pictures_show_what_is_cut_off_and_stand_upright(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (64, 256), "white").save(images / "a.png", exif=turned)
    dataset = Dataset(config(section(subset(images, class_tokens=""))), 0)
    for shows_crop, left, middle in ((False, 255, 255), (True, 76, 255)):
        (source,) = thumbnails(dataset.items, shows_crop=shows_crop)
        assert source is not None
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.size == (224, 56)
            grey = picture.convert("L")
            assert grey.getpixel((20, 28)) == pytest.approx(left, abs=6)
            assert grey.getpixel((112, 28)) == pytest.approx(middle, abs=6)


def shown(folder: Path) -> Image.Image | None:
    """Return the small copy of the only picture of a folder."""
    (source,) = thumbnails(Dataset(config(section(subset(folder, class_tokens=""))), 0).items, shows_crop=False)
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) if source else None


def test_small_pictures_look_as_what_is_trained(tmp_path: Path) -> None:
    pictures = {
        "deep": Image.fromarray(np.full((64, 64), 128 * 257, np.uint16)),
        "clear": Image.new("RGBA", (64, 64), (0, 0, 0, 0)),
    }
    for name, level in (("deep", 128), ("clear", 255)):
        (tmp_path / name).mkdir()
        pictures[name].save(tmp_path / name / "a.png")
        small = shown(tmp_path / name)
        assert small is not None
        assert small.convert("L").getextrema() == pytest.approx((level, level), abs=2)


def test_a_picture_that_a_plug_in_cannot_decode_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(image: Image.Image) -> None:
        raise RuntimeError("Generic Error. Please build the library from source.")

    make_image(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    assert shown(tmp_path) is None


def test_attributes_are_escaped_and_elements_nest() -> None:
    assert element("p", "a < b", element("b", "&"), title='"x"') == '<p title="&quot;x&quot;">a &lt; b<b>&amp;</b></p>'
    assert join(["<", element("br")]) == "&lt;<br>"
    assert 'style="width:50.0%"' in bar(0.5)
    assert "width:100.0%" in bar(3) and "width:0.0%" in bar(-1)
    assert table("c", ["a", "b"], [["x", 1]]).count("<tr>") == 2
