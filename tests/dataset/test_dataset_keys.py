"""Every key of a dataset file, in every kind of dataset, at every level: where it is taken and where it is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import toml
from dataset_files import KINDS, READ, SOURCES, TABLE, effective, load, problems

from library.options import dataset_file
from library.options.dataset_config import DatasetConfig
from library.options.dataset_keys import KEYS
from library.options.parse import parse
from library.options.scripts import (
    CacheLatentsOptions,
    CacheTextEncoderOutputsOptions,
    ScriptOptions,
    SdxlTrainNetworkOptions,
    SdxlTrainOptions,
    TrainingOptions,
)
from library.training import inputs
from tools import cache_latents, cache_text_encoder_outputs

LEVELS = ("general", "dataset", "subset")


@pytest.fixture(autouse=True)
def _a_place_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset_file, "NOT_BUILT_DATASET_KEYS", {})
    for folder in ("images", "masks", "other_masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "meta.json").write_text("{}")


def write(*subsets: Mapping[str, Any], general: Mapping[str, Any] | None = None, **dataset: Any) -> Path:
    path = Path("data.toml")
    tables = {"general": {"resolution": 1024} | dict(general or {}), "datasets": [{**dataset, "subsets": list(subsets)}]}
    path.write_text(toml.dumps(tables), encoding="utf-8")
    return path


def with_key(kind: str, level: str, key: str, value: Any) -> Path:
    tables: dict[str, dict[str, Any]] = {"general": {}, "dataset": {}, "subset": dict(SOURCES[kind])}
    tables[level][key] = value
    return write(tables["subset"], general=tables["general"], **tables["dataset"])


def test_the_table_has_every_key() -> None:
    assert [row[0] for row in TABLE if row[0] not in KEYS] == []
    assert KEYS.keys() - {row[0] for row in TABLE} == set()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_a_key_works_where_it_is_taken_and_is_refused_by_name_elsewhere(
    row: tuple[str, Any, Any, str, str, str], kind: str, level: str
) -> None:
    key, sample, default = row[:3]
    taken = row[3 + KINDS.index(kind)]
    if level == "subset" and {kind, key} in ({"control", "metadata_file"}, {"metadata", "conditioning_data_dir"}):
        return  # both sources in one subset have a test of their own
    path = with_key(kind, level, key, sample)
    letter = level[0]
    masked = kind == "control" or (key == "conditioning_data_dir" and level == "subset")
    if letter.upper() in taken:
        assert effective(load(path, masked_loss=masked), key) == READ.get(key, sample)
    elif letter == "g" and letter in taken:
        assert effective(load(path, masked_loss=masked), key) == default
    elif key in ("metadata_file", "conditioning_data_dir") and level == "subset":
        load(path, masked_loss=masked)  # the key makes it a dataset of the other kind
    else:
        (problem,) = problems(path, masked_loss=masked)
        assert problem.startswith(f"{path}: ")
        assert {"general": "[general]: ", "dataset": "[[datasets]] 1: ", "subset": "[[datasets]] 1, subset 1: "}[level] in problem
        assert f": {key} " in problem


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [row for row in TABLE if row[0] not in ("resolution", "image_dir")], ids=lambda row: row[0])
def test_a_key_that_is_nowhere_has_its_default(row: tuple[str, Any, Any, str, str, str], kind: str) -> None:
    key, default = row[0], row[2]
    if key not in SOURCES[kind]:
        assert effective(load(write(SOURCES[kind]), masked_loss=kind == "control"), key) == default


def test_datasets_of_different_kinds_may_stand_in_one_file() -> None:
    path = Path("data.toml")
    datasets = [{"resolution": 512, "subsets": [dict(SOURCES[kind])]} for kind in KINDS]
    path.write_text(toml.dumps({"general": {"class_tokens": "dog", "alpha_mask": True}, "datasets": datasets}))
    folder, metadata, control = (section.subsets[0] for section in load(path, masked_loss=True).sections)
    assert (folder.class_tokens, metadata.class_tokens, control.class_tokens) == ("dog", None, None)
    assert (folder.alpha_mask, metadata.alpha_mask, control.alpha_mask) == (True, True, False)
    assert (metadata.source, metadata.image_dir, control.conditioning_data_dir) == ("meta.json", "images", "masks")


def test_subsets_of_different_kinds_may_not_stand_in_one_dataset() -> None:
    (problem,) = problems(write(SOURCES["folder"], SOURCES["metadata"], SOURCES["metadata"]))
    assert problem == (
        "data.toml: [[datasets]] 1 mixes subsets, 2 with a metadata_file and 1 with an image_dir alone. "
        "Give each kind a [[datasets]] of its own."
    )


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        ("metadata", "class_tokens", "class_tokens is for subsets with an image_dir alone; these have a metadata_file."),
        (
            "control",
            "alpha_mask",
            "alpha_mask is for subsets with a metadata_file or an image_dir alone; these have a conditioning",
        ),
        (
            "control",
            "metadata_file",
            "metadata_file is for subsets with a metadata_file; these have a conditioning_data_dir. Remove",
        ),
    ],
)
def test_a_key_that_says_nothing_about_such_images_is_refused_with_what_it_is_for(kind: str, key: str, words: str) -> None:
    sample = next(row[1] for row in TABLE if row[0] == key)
    (problem,) = problems(with_key(kind, "subset", key, sample), masked_loss=True)
    assert problem.startswith(f"data.toml: [[datasets]] 1, subset 1: {words}")


@pytest.mark.parametrize("kind", ["folder", "control"])
def test_a_dataset_without_caption_file_names_needs_a_folder(kind: str) -> None:
    subset = {name: value for name, value in SOURCES[kind].items() if name != "image_dir"} | {"num_repeats": 1}
    told = problems(write(subset), masked_loss=True)
    assert "data.toml: [[datasets]] 1, subset 1: image_dir is missing. Name the folder of the images." in told


def test_a_metadata_file_with_whole_paths_needs_no_folder() -> None:
    assert load(write({"metadata_file": "meta.json"})).sections[0].subsets[0].image_dir == ""


@pytest.mark.parametrize(
    ("kind", "key"), [("control", "conditioning_data_dir"), ("folder", "image_dir"), ("metadata", "image_dir")]
)
def test_a_folder_that_does_not_exist_is_named_with_the_key(kind: str, key: str) -> None:
    told = problems(write({**SOURCES[kind], key: "nowhere"}), masked_loss=True)
    assert any(told_one.startswith(f"data.toml: [[datasets]] 1, subset 1: {key} nowhere is not a folder.") for told_one in told)


def test_conditioning_images_need_the_masked_loss_and_the_masked_loss_needs_masks() -> None:
    (problem,) = problems(write(SOURCES["control"]))
    assert "conditioning_data_dir of images holds masks, which are used with --masked_loss only" in problem
    (problem,) = problems(write(SOURCES["folder"]), masked_loss=True)
    assert problem.startswith("--masked_loss has no masks in data.toml. Name a conditioning_data_dir")
    assert load(write(SOURCES["folder"], general={"alpha_mask": True}), masked_loss=True)
    assert load(write(SOURCES["folder"]), masked_loss=True, alpha_mask=True)


def test_an_alpha_mask_on_the_command_line_does_not_concern_subsets_with_masks_of_their_own() -> None:
    config = load(write(SOURCES["control"]), masked_loss=True, alpha_mask=True)
    assert not config.sections[0].subsets[0].alpha_mask
    assert "--alpha_mask is not used for images with a conditioning_data_dir, whose images are the masks." in config.warnings


@pytest.mark.parametrize("spelling", ["images", "./images", "images/", "images/../images", "link"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_named_twice_by_whatever_path_are_used_once(kind: str, spelling: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("images")
    again = {**SOURCES[kind], "image_dir": spelling}
    config = load(write(SOURCES[kind], again), masked_loss=kind == "control")
    assert len(config.sections[0].subsets) == 1
    assert any("is listed twice in one dataset; the second time is skipped." in warning for warning in config.warnings)


def test_one_metadata_file_may_name_images_of_two_folders() -> None:
    config = load(write(SOURCES["metadata"], {"metadata_file": "meta.json", "image_dir": "masks"}))
    assert [subset.image_dir for subset in config.sections[0].subsets] == ["images", "masks"]


def test_images_with_two_sets_of_masks_belong_into_two_datasets() -> None:
    (problem,) = problems(
        write(SOURCES["control"], {"image_dir": "images", "conditioning_data_dir": "other_masks"}), masked_loss=True
    )
    assert "images is listed with two folders of conditioning images, masks and other_masks." in problem


@pytest.mark.parametrize(
    ("level", "key", "words"),
    [
        ("general", "shufle_caption", "unknown key shufle_caption. Did you mean shuffle_caption? It is allowed in [general] or"),
        ("dataset", "batchsize", "unknown key batchsize. Did you mean batch_size? It is allowed in [general] or [[datasets]]."),
        ("subset", "train_batch_size", "train_batch_size is called batch_size in a dataset file."),
        ("general", "dataset_repeats", "dataset_repeats is called num_repeats in a dataset file."),
        ("subset", "train_data_dir", "train_data_dir is called image_dir in a dataset file."),
        ("dataset", "learning_rate", "learning_rate is a setting of the whole run: give --learning_rate on the command line"),
        ("general", "prior_loss_weight", "prior_loss_weight is a setting of the whole run"),
        ("general", "debug_dataset", "debug_dataset is a setting of the whole run"),
        ("general", "max_token_length", "max_token_length is a setting of the whole run"),
        ("dataset", "cache_latents_to_disk", "cache_latents_to_disk is a setting of the whole run"),
        ("subset", "resolution", "resolution does not belong in [[datasets.subsets]]. Put it in [general] or [[datasets]]."),
        ("general", "is_reg", "is_reg does not belong in [general]. Put it in [[datasets.subsets]]."),
        ("subset", "subsets", "unknown key subsets."),
    ],
)
def test_what_cannot_stand_there_is_told_with_file_place_and_what_was_meant(level: str, key: str, words: str) -> None:
    (problem,) = problems(with_key("folder", level, key, 1))
    place = {"general": "[general]", "dataset": "[[datasets]] 1", "subset": "[[datasets]] 1, subset 1"}[level]
    assert problem.startswith(f"data.toml: {place}: {words}")


def command_line(**options: Any) -> DatasetConfig:
    return load(None, resolution="512", **options)


def test_masks_on_the_command_line_go_with_the_images_in_the_folder_itself() -> None:
    Path("images/a.png").touch()
    given = {"train_data_dir": "images", "conditioning_data_dir": "masks", "dataset_repeats": 3, "caption_extension": "txt"}
    config = command_line(masked_loss=True, **given)
    (subset,) = config.sections[0].subsets
    assert (subset.image_dir, subset.conditioning_data_dir, subset.metadata_file) == ("images", "masks", None)
    assert (subset.num_repeats, subset.caption_extension, subset.alpha_mask, subset.is_reg) == (3, ".txt", False, False)
    assert not config.from_file
    (problem,) = problems(None, resolution="512", **given)
    assert "used with --masked_loss only" in problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conditioning_data_dir": "masks"}, "--conditioning_data_dir masks needs --train_data_dir FOLDER"),
        (
            {"train_data_dir": "images"},
            "--train_data_dir images holds no images: with --conditioning_data_dir they lie in the folder",
        ),
        ({"train_data_dir": "images", "in_json": "meta.json"}, "--in_json cannot be used with --conditioning_data_dir"),
        ({"train_data_dir": "images", "reg_data_dir": "masks"}, "--reg_data_dir cannot be used with --conditioning_data_dir"),
        ({"train_data_dir": "images", "conditioning_data_dir": "gone"}, "conditioning_data_dir gone is not a folder"),
    ],
)
def test_what_does_not_go_with_masks_on_the_command_line_is_told(options: dict[str, str], words: str) -> None:
    Path("images/10_dog").mkdir()
    told = problems(None, resolution="512", masked_loss=True, **{"conditioning_data_dir": "masks", **options})
    assert any(words in problem for problem in told), told


def test_the_masked_loss_without_masks_on_the_command_line_is_refused() -> None:
    Path("images/10_dog").mkdir()
    (problem,) = problems(None, resolution="512", masked_loss=True, train_data_dir="images")
    assert problem.startswith("--masked_loss has no masks in the command line. ")
    assert command_line(train_data_dir="images", masked_loss=True, alpha_mask=True)


def test_folders_on_the_command_line_beside_a_file_are_told_to_be_ignored() -> None:
    config = load(write(SOURCES["folder"]), train_data_dir="x", conditioning_data_dir="y")
    assert "--train_data_dir, --conditioning_data_dir is ignored because --dataset_config names the images." in config.warnings


@pytest.mark.parametrize("name", ["sdxl_train", "sdxl_train_network", "cache_latents", "cache_text_encoder_outputs"])
def test_every_command_takes_masks_with_the_masked_loss(name: str) -> None:
    Path("images/a.png").touch()
    read: dict[str, tuple[type[ScriptOptions], Callable[[Any], DatasetConfig]]] = {
        "sdxl_train": (SdxlTrainOptions, inputs.dataset_definition),
        "sdxl_train_network": (SdxlTrainNetworkOptions, inputs.dataset_definition),
        "cache_latents": (CacheLatentsOptions, cache_latents.dataset_definition),
        "cache_text_encoder_outputs": (CacheTextEncoderOutputsOptions, cache_text_encoder_outputs.dataset_definition),
    }
    script, definition = read[name]
    Path("model.safetensors").touch()
    words = ["--pretrained_model_name_or_path", "model.safetensors", "--resolution", "512", "--masked_loss"]
    words += ["--train_data_dir", "images", "--conditioning_data_dir", "masks"]
    if issubclass(script, TrainingOptions):
        words += ["--output_dir", "out"] + (["--network_module", "networks.lora"] if name == "sdxl_train_network" else [])
    (subset,) = definition(parse(script, words)).sections[0].subsets
    assert (subset.image_dir, subset.conditioning_data_dir) == ("images", "masks")
