"""What there is to say about a checked dataset, as values that `json.dumps` can write."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from library.dataset.buckets import Size
from library.dataset.facts import tag_frequency
from library.dataset.findings import Findings, Severity
from library.dataset.index import Section
from library.dataset.preflight import NOTABLE_CUT, NOTABLE_ENLARGEMENT, Checked, largest, section_label

Facts = dict[str, Any]

FORMAT = 1
_MOST_LISTED = 1000
_TOKEN_STEP = 15


def report_facts(checked: Checked, lengths: Mapping[str, int]) -> Facts:
    """Gather everything the report shows.

    Args:
        checked: the dataset.
        lengths: of the run: epochs, updates and the like, by name.
    """
    dataset = checked.dataset
    return {
        "format": FORMAT,
        "images": dataset.num_images,
        "held_out_images": len(dataset.held_out),
        "uses_per_epoch": dataset.num_uses,
        **lengths,
        "errors": checked.findings.total(Severity.ERROR),
        "warnings": checked.findings.total(Severity.WARNING),
        "findings": finding_facts(checked.findings),
        "datasets": [_section_facts(section, number) for number, section in enumerate(dataset.sections)],
        "captions": _caption_facts(checked),
        "tags": _tag_facts(dataset.sections),
        "enlarged": _item_facts(checked, checked.survey.enlargement, NOTABLE_ENLARGEMENT, "times"),
        "cropped": _item_facts(checked, checked.survey.cut_off, NOTABLE_CUT, "share"),
        "copies": checked.copies[:_MOST_LISTED],
    }


def finding_facts(findings: Findings) -> list[Facts]:
    """Return all findings, errors before warnings, the worst kind first."""
    return [
        {
            "severity": severity.value,
            "kind": kind.key,
            "heading": kind.heading,
            "advice": kind.advice,
            "count": count,
            "problems": [
                {"where": problem.where, "sentence": problem.sentence, "count": problem.count, "files": list(problem.files)}
                for problem in problems
            ],
        }
        for severity in (Severity.ERROR, Severity.WARNING)
        for kind, count, problems in findings.groups(severity)
    ]


def _section_facts(section: Section, number: int) -> Facts:
    config = section.config
    images: Counter[Size] = Counter()
    uses: Counter[Size] = Counter()
    for item in section.items:
        images[item.geometry.bucket] += 1
        uses[item.geometry.bucket] += item.repeats
    return {
        "label": section_label(section, number),
        "resolution": list(config.resolution),
        "batch_size": config.batch_size,
        "enable_bucket": config.enable_bucket,
        "bucket_no_upscale": config.bucket_no_upscale,
        "train_uses": section.num_train_uses,
        "regularisation_uses_found": section.num_reg_images,
        "subsets": [
            {"source": subset.source, "images": count, "num_repeats": subset.num_repeats, "is_reg": subset.is_reg}
            for subset, count in zip(config.subsets, section.image_counts, strict=True)
        ],
        "buckets": [
            {
                "width": size[0],
                "height": size[1],
                "images": images[size],
                "uses": uses[size],
                "batches": -(-uses[size] // config.batch_size),
                "last_batch": uses[size] % config.batch_size or config.batch_size,
            }
            for size in sorted(images)
        ],
    }


def _caption_facts(checked: Checked) -> Facts:
    tokens, limit = checked.survey.tokens, checked.limits.max_tokens
    numbers = [int(number) for number in largest(tokens, tokens > limit)[:_MOST_LISTED]]
    top = int(tokens.max(initial=0))
    edges = list(range(0, max(top, limit) + _TOKEN_STEP, _TOKEN_STEP))
    counts = np.histogram(tokens, bins=[edge + 0.5 if edge else -0.5 for edge in edges])[0].tolist()
    return {
        "limit": limit,
        "median": float(np.median(tokens)) if len(tokens) else 0.0,
        "longest": top,
        "empty": int(checked.survey.is_empty.sum()),
        "too_long": int((tokens > limit).sum()),
        "histogram": [
            {"from": low + 1 if low else 0, "to": high, "images": count}
            for low, high, count in zip(edges, edges[1:], counts, strict=False)
        ],
        "longest_captions": [{"image": checked.dataset.items[number].path, "tokens": int(tokens[number])} for number in numbers],
    }


def _tag_facts(sections: Sequence[Section]) -> Facts:
    total: Counter[str] = Counter()
    for section in sections:
        for counts in tag_frequency(section).values():
            total.update(counts)
    return {"different": len(total), "once": sum(count == 1 for count in total.values()), "most": total.most_common(_MOST_LISTED)}


def _item_facts(checked: Checked, values: "np.ndarray[Any, Any]", notable: float, name: str) -> Facts:
    numbers = largest(values, values > notable)
    listed = []
    for number in numbers[:_MOST_LISTED]:
        item = checked.dataset.items[number]
        listed.append(
            {
                "number": number,
                "image": item.path,
                "name": os.path.basename(item.path),
                "size": list(item.size),
                "bucket": list(item.geometry.bucket),
                name: round(float(values[number]), 3),
            }
        )
    return {"images": len(numbers), "above": notable, "listed": listed}
