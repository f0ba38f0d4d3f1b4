"""The JSON schema of dataset files takes and refuses what the reader takes and refuses."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from dataset_files import SOURCES, TABLE, load
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from library.options import dataset_file
from library.options.dataset_keys import DATASET, GENERAL, KEYS, SUBSET
from library.options.dataset_schema import dataset_schema
from library.options.dataset_values import NotThatType
from library.options.errors import UsageError

ROOT = Path(__file__).parents[2]
SCHEMA = dataset_schema()
VALIDATOR = Draft7Validator(SCHEMA)
DATASET_SCHEMA = SCHEMA["properties"]["datasets"]["items"]
TABLES = {
    GENERAL: SCHEMA["properties"]["general"],
    DATASET: DATASET_SCHEMA,
    SUBSET: DATASET_SCHEMA["properties"]["subsets"]["items"],
}
SAMPLES = {row[0]: row[1] for row in TABLE}
PROBES: list[Any] = [
    True, False, 0, 1, -1, 2, 1024, 0.5, 1.0, 1.5, -0.5, "", "x", ".txt", "lanczos", "box", "512", "512,768", "0,768", "1,2,3",
    "true", [], [0], [1], [1, 2], [2.5, 3], [0, 1], [512, 512, 3], ["1", "2"], [True, True], {}, {"a": 1},
]  # fmt: skip


def test_the_schema_is_one() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("level", TABLES)
def test_every_key_is_described_at_its_levels_and_no_other_is_allowed(level: str) -> None:
    table = TABLES[level]
    assert table["additionalProperties"] is False
    assert table["properties"].keys() - {"subsets"} == {key.name for key in KEYS.values() if level in key.levels}
    assert all(len(schema["description"]) > 10 for schema in table["properties"].values())


@pytest.mark.parametrize("name", KEYS)
def test_a_value_is_right_for_an_editor_when_it_is_for_the_reader_but_for_quotes(name: str) -> None:
    key = KEYS[name]
    schema = Draft7Validator(TABLES[key.levels[-1]]["properties"][name])
    for value in PROBES:
        try:
            key.type.read(value)
            is_read = True
        except NotThatType:
            is_read = False
        quoted = isinstance(value, str) or (isinstance(value, list) and any(isinstance(item, str) for item in value))
        if schema.is_valid(value):
            assert is_read, value
        else:
            assert not is_read or quoted, value


def test_defaults_are_values_the_schema_takes() -> None:
    described = [schema for table in TABLES.values() for schema in table["properties"].values() if "default" in schema]
    assert len(described) > 20
    for schema in described:
        Draft7Validator(schema).validate(schema["default"])


def file_of(general: Mapping[str, Any], *datasets: tuple[Mapping[str, Any], list[Mapping[str, Any]]]) -> dict[str, Any]:
    return {"general": dict(general), "datasets": [{**own, "subsets": subsets} for own, subsets in datasets]}


def keys_of_a_table() -> st.SearchStrategy[dict[str, Any]]:
    wrong = st.tuples(st.sampled_from(["keep_tokens", "flip_aug", "shufle_caption", "batch_size"]), st.just(None))
    right = st.sampled_from(list(SAMPLES.items()))
    pairs = st.lists(st.one_of(right, right, right, wrong), max_size=3)
    return pairs.map(lambda given: {name: "wrong" if value is None else value for name, value in given})


SUBSETS = st.tuples(st.sampled_from(list(SOURCES.values())), keys_of_a_table()).map(lambda parts: {**parts[0], **parts[1]})
DATASETS = st.tuples(keys_of_a_table(), st.lists(SUBSETS, min_size=0, max_size=2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    (folder / "meta.json").write_text("{}")
    return folder


@given(keys_of_a_table(), st.lists(DATASETS, min_size=0, max_size=2))
@settings(max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example({}, [({"class_tokens": "x"}, [SOURCES["metadata"]])])
@example({"class_tokens": "x"}, [({}, [SOURCES["metadata"]])])
@example({}, [({}, [SOURCES["folder"], SOURCES["control"]])])
@example({}, [({}, [SOURCES["metadata"], {**SOURCES["metadata"], "conditioning_data_dir": "masks"}])])
@example({}, [({}, [{"num_repeats": 1}])])
@example({}, [({}, [{"metadata_file": "meta.json"}])])
def test_a_file_is_right_for_an_editor_when_it_is_for_the_reader(
    place: Path, monkeypatch: pytest.MonkeyPatch, general: dict[str, Any], datasets: list[Any]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(dataset_file, "NOT_BUILT_DATASET_KEYS", {})
    content = file_of(general, *datasets)
    path = Path("data.json")
    path.write_text(json.dumps(content))
    masked = any("conditioning_data_dir" in subset for _, subsets in datasets for subset in subsets)
    try:
        load(path, resolution="1024", masked_loss=masked)
        told: list[str] = []
    except UsageError as error:
        told = list(error.problems)
    wrong = [error.message for error in VALIDATOR.iter_errors(content)]
    assert bool(told) == bool(wrong), (told, wrong)


def test_an_editor_points_at_the_key_that_is_wrong() -> None:
    content = file_of({"shufle_caption": True}, ({"batch_size": 0}, [{**SOURCES["metadata"], "class_tokens": "a cat"}]))
    told = {error.message for error in VALIDATOR.iter_errors(content)}
    assert told == {
        "Additional properties are not allowed ('shufle_caption' was unexpected)",
        "0 is less than the minimum of 1",
        "False schema does not allow 'a cat'",
    }


def documented_files() -> list[str]:
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    whole = [block for block in blocks if re.search(r"^\[\[datasets\]\]", block, re.MULTILINE)]
    return whole + [
        path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.toml") if "[[datasets]]" in path.read_text()
    ]


def test_the_files_of_the_documentation_and_the_examples_are_right() -> None:
    assert documented_files()
    for text in documented_files():
        VALIDATOR.validate(tomllib.loads(text))


def test_a_json_file_may_name_its_schema(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    content = {"$schema": "docs/schemas/dataset.schema.json", **file_of({}, ({"resolution": 512}, [SOURCES["folder"]]))}
    VALIDATOR.validate(content)
    Path("named.json").write_text(json.dumps(content))
    assert load(Path("named.json")).sections[0].resolution == (512, 512)
