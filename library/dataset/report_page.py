"""The report as one HTML page: nothing is fetched, so that it works offline, on a phone and on paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.dataset.markup import Html, bar, element, join, table
from library.dataset.report_facts import Facts

Pictures = Mapping[int, str | None]
"""The `src` of a small picture by the number of its item; None for one that cannot be read."""

_PROBLEMS_SHOWN = 5
_TAGS_SHOWN = 100
_STYLE = Path(__file__).with_name("report.css")


def report_page(facts: Facts, enlarged: Pictures, cropped: Pictures) -> str:
    """Return the page.

    Args:
        facts: as `report_facts` gathers them.
        enlarged: small pictures of images that are enlarged.
        cropped: small pictures of images of which much is cut off.
    """
    sections = {
        "findings": ("What is wrong or odd", _findings(facts["findings"])),
        "buckets": ("Sizes", join(_dataset(dataset) for dataset in facts["datasets"])),
        "enlarged": ("Enlarged images", _gallery(facts["enlarged"], enlarged, _enlarged_words)),
        "cropped": ("Images of which much is cut off", _gallery(facts["cropped"], cropped, _cropped_words)),
        "captions": ("Captions", _captions(facts["captions"])),
        "tags": ("Tags", _tags(facts["tags"])),
        "copies": ("Same content", _copies(facts["copies"])),
        "caches": ("Caches", _caches(facts.get("caches", []))),
    }
    links = (element("li", element("a", heading, href=f"#{name}")) for name, (heading, content) in sections.items() if content)
    body = element(
        "body",
        element("header", element("h1", "The dataset, before training"), _verdict(facts), _figures(facts)),
        element("nav", element("ul", *links), aria_label="Sections"),
        element("main", *(_part(name, heading, content) for name, (heading, content) in sections.items() if content)),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", "The dataset, before training"),
        element("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def _part(name: str, heading: str, content: Html) -> Html:
    return element("section", element("h2", heading, id=name), content, aria_labelledby=name)


def _verdict(facts: Facts) -> Html:
    errors, warnings = facts["errors"], facts["warnings"]
    if errors:
        return element(
            "p", element("span", "It cannot be trained on as it is. ", class_="word"), _counts(errors, warnings), class_="error"
        )
    if warnings:
        return element("p", element("span", "It can be trained on. ", class_="good"), _counts(errors, warnings))
    return element("p", element("span", "It can be trained on, and nothing looks odd.", class_="good"))


def _counts(errors: int, warnings: int) -> str:
    return f"Errors: {errors}. Warnings: {warnings}."


def _figures(facts: Facts) -> Html:
    names = {
        "images": "images",
        "held_out_images": "held out for validation",
        "uses_per_epoch": "uses in an epoch",
        "batches_per_epoch": "batches in an epoch",
        "updates_per_epoch": "updates in an epoch",
        "epochs": "epochs",
        "total_updates": "updates in all",
    }
    shown = {label: facts[name] for name, label in names.items() if facts.get(name) is not None}
    return element(
        "dl",
        *(element("div", element("dt", label), element("dd", f"{value:,}".replace(",", " "))) for label, value in shown.items()),
        class_="figures",
    )


def _findings(findings: Sequence[Facts]) -> Html:
    if not findings:
        return element("p", "Nothing.", class_="good")
    return join(_finding(finding) for finding in findings)


def _finding(finding: Facts) -> Html:
    is_error = finding["severity"] == "error"
    problems = finding["problems"]
    sentences = [_problem(problem) for problem in problems]
    shown = element("ul", *sentences[:_PROBLEMS_SHOWN])
    rest = sentences[_PROBLEMS_SHOWN:]
    more = element("details", element("summary", f"{len(rest)} more"), element("ul", *rest)) if rest else ""
    return element(
        "div",
        element(
            "h3",
            element("span", "Error: " if is_error else "Warning: ", class_="word"),
            f"{finding['heading']} ({finding['count']})",
        ),
        element("p", finding["advice"]) if finding["advice"] else "",
        shown,
        more,
        class_="finding error" if is_error else "finding",
    )


def _problem(problem: Facts) -> Html:
    files = problem["files"]
    if len(files) < _PROBLEMS_SHOWN:
        return element("li", problem["sentence"])
    listed = element("ul", *(element("li", file) for file in files))
    return element("li", problem["sentence"], element("details", element("summary", f"The files ({len(files)})"), listed))


def _dataset(dataset: Facts) -> Html:
    label = dataset["label"].capitalize()
    most = max((bucket["uses"] for bucket in dataset["buckets"]), default=1)
    batch_size = dataset["batch_size"]
    rows = [
        (
            f"{bucket['width']}x{bucket['height']}", bucket["uses"], bar(bucket["uses"] / most, marked=bucket["uses"] < batch_size),
            bucket["images"], bucket["batches"], f"{bucket['last_batch']} of {batch_size}",
            f"{bucket['width'] / bucket['height']:.2f}",
        )
        for bucket in dataset["buckets"]
    ]  # fmt: skip
    heads = ("Size", "Uses in an epoch", "Share", "Images", "Batches", "Images in the last", "Width / height")
    folders = [
        (subset["source"], "regularisation" if subset["is_reg"] else "training", subset["images"], subset["num_repeats"])
        for subset in dataset["subsets"]
    ]
    return join(
        [
            element("h3", label),
            table(f"Folders of {dataset['label']}", ("Folder or file", "Kind", "Images", "Repeats"), folders, texts=2),
            table(f"Buckets of {dataset['label']}, batch size {batch_size}", heads, rows),
        ]
    )


def _gallery(group: Facts, pictures: Pictures, words: Any) -> Html:
    """Show the worst images; nothing where there are none."""
    entries = [entry for entry in group["listed"] if entry["number"] in pictures]
    if not entries:
        return Html("")
    left = group["images"] - len(entries)
    shown = element("ul", *(_picture(entry, pictures[entry["number"]], words(entry)) for entry in entries), class_="pictures")
    return join(
        [shown, element("p", f"and {left} more; the JSON file beside this page names them.", class_="soft") if left else ""]
    )


def _picture(entry: Facts, source: str | None, words: str) -> Html:
    image = element("img", src=source, alt=f"{entry['name']}, small", loading="lazy") if source else element("p", "cannot be shown")
    return element(
        "li", element("figure", image, element("figcaption", element("strong", entry["name"], title=entry["name"]), words))
    )


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _enlarged_words(entry: Facts) -> str:
    return f"{_size(entry['size'])} becomes {_size(entry['bucket'])}: enlarged {entry['times']:.1f} times"


def _cropped_words(entry: Facts) -> str:
    return f"{_size(entry['size'])} becomes {_size(entry['bucket'])}: {entry['share']:.0%} cut off (dark)"


def _captions(captions: Facts) -> Html:
    limit = captions["limit"]
    most = max((step["images"] for step in captions["histogram"]), default=0) or 1
    rows = [
        (
            f"{step['from']} to {step['to']}" + (" (beyond the limit)" if step["from"] > limit else ""), step["images"],
            bar(step["images"] / most, marked=step["from"] > limit),
        )
        for step in captions["histogram"]
    ]  # fmt: skip
    told = (
        f"The text encoders read {limit} tokens of a caption. Half of the captions have at most {captions['median']:g}, "
        f"the longest has {captions['longest']}. Too long: {captions['too_long']}. Empty: {captions['empty']}."
    )
    return join([element("p", told), table("Captions by their number of tokens", ("Tokens", "Images", "Share"), rows)])


def _tags(tags: Facts) -> Html:
    if not tags["most"]:
        return Html("")
    most = tags["most"][0][1]
    rows = [(tag, count, bar(count / most)) for tag, count in tags["most"][:_TAGS_SHOWN]]
    told = f"Captions cut at their commas have {tags['different']} different tags, {tags['once']} of which occur once."
    return join([element("p", told), table("The most frequent tags", ("Tag", "Times", "Share"), rows)])


def _copies(copies: Sequence[Sequence[str]]) -> Html:
    if not copies:
        return Html("")
    return element("ul", *(element("li", *(part for path in group for part in (path, element("br")))) for group in copies))


def _caches(caches: Sequence[Facts]) -> Html:
    if not caches:
        return Html("")
    return element("ul", *(element("li", cache["sentence"]) for cache in caches))
