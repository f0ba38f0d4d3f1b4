"""The JSON schema of dataset files, which lets an editor complete and check them. It follows from the table of keys.

It says of single keys and of their company what the reader says. What needs a look at the disk, at the command line or at two
numbers together (folders, bucket limits, multiples of 32) only the reader can say. Values are stricter: no quoted numbers.
"""

import json
from typing import Any

from library.options.dataset_keys import DATASET, GENERAL, KEYS, SUBSET, DatasetKind, Key

Schema = dict[str, Any]

_HAS_CONDITIONING: Schema = {"required": ["conditioning_data_dir"]}
_HAS_METADATA: Schema = {"required": ["metadata_file"], "not": _HAS_CONDITIONING}
_HAS_ONLY_IMAGES: Schema = {"not": {"anyOf": [{"required": ["conditioning_data_dir"]}, {"required": ["metadata_file"]}]}}
_SIGNS = {
    DatasetKind.CONTROL: _HAS_CONDITIONING,
    DatasetKind.METADATA: _HAS_METADATA,
    DatasetKind.FOLDER: _HAS_ONLY_IMAGES,
}
"""What a subset has that makes its dataset one of the kind."""


def dataset_schema() -> Schema:
    """Return the schema of `.toml` and `.json` dataset files."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Dataset definition",
        "description": "Which images are trained on and how; the innermost table that has a key wins, then the command line.",
        "type": "object",
        "properties": {
            "$schema": {"type": "string", "description": "Where this schema is, for editors of JSON files."},
            "general": _table(GENERAL, "Holds for all datasets."),
            "datasets": {"type": "array", "minItems": 1, "items": _dataset(), "description": "Images that share size and batches."},
        },
        "required": ["datasets"],
        "additionalProperties": False,
    }


def dataset_schema_text() -> str:
    """Return the text of `docs/schemas/dataset.schema.json`."""
    return json.dumps(dataset_schema(), indent=1, ensure_ascii=False) + "\n"


def _dataset() -> Schema:
    table = _table(DATASET, "Images that share resolution, batch size and buckets.")
    table["properties"]["subsets"] = {"type": "array", "minItems": 1, "items": _subset(), "description": "Where images are."}
    table["required"] = ["subsets"]
    table["allOf"] = [
        {
            "if": {"properties": {"subsets": {"contains": _SIGNS[kind]}}},
            "then": {"properties": {"subsets": {"items": _SIGNS[kind]}, **_without_foreign_keys(DATASET, kind)}},
        }
        for kind in DatasetKind
    ]
    return table


def _subset() -> Schema:
    table = _table(SUBSET, "Images of one folder, or those that a metadata file names.")
    table["allOf"] = [
        {"if": _SIGNS[kind], "then": {"properties": _without_foreign_keys(SUBSET, kind), "required": _needed(kind)}}
        for kind in DatasetKind
    ]
    return table


def _needed(kind: DatasetKind) -> list[str]:
    return [] if kind is DatasetKind.METADATA else ["image_dir"]


def _without_foreign_keys(level: str, kind: DatasetKind) -> Schema:
    return {key.name: False for key in KEYS.values() if level in key.levels and kind not in key.kinds}


def _table(level: str, description: str) -> Schema:
    properties = {key.name: _property(key) for key in KEYS.values() if level in key.levels}
    return {"type": "object", "description": description, "properties": properties, "additionalProperties": False}


def _property(key: Key) -> Schema:
    described: Schema = {"description": key.summary}
    if key.default not in (None, "", {}):
        described["default"] = key.default
    return described | dict(key.type.schema)
