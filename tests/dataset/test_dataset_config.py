"""The dataset file: every key at every level, the order of fallbacks, and all mistakes in one answer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toml
from dataset_files import effective, load, problems

from library.options import dataset_file
from library.options.dataset_config import DatasetConfig, bucket_limits, load_dataset_config
from library.options.dataset_keys import KEYS, SUBSET
from library.options.errors import UsageError
from library.options.groups.cache import CacheOptions
from library.options.groups.caption import CaptionOptions
from library.options.groups.dataset import DatasetOptions
from library.options.groups.image import ImageOptions
from library.options.not_built import NOT_BUILT_DATASET_KEYS

Content = dict[str, Any]


def write(tmp_path: Path, content: Content, name: str = "data.toml") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(content) if name.endswith("json") else toml.dumps(content), encoding="utf-8")
    return path


def minimal(
    tmp_path: Path, general: Content | None = None, dataset: Content | None = None, subset: Content | None = None
) -> Content:
    (tmp_path / "images").mkdir(exist_ok=True)
    folder = {"image_dir": str(tmp_path / "images")} | (subset or {})
    return {"general": general or {}, "datasets": [{"resolution": 512, "subsets": [folder]} | (dataset or {})]}


SAMPLES: dict[str, Any] = {
    "resolution": [512, 768], "batch_size": 3, "enable_bucket": True, "min_bucket_reso": 128, "max_bucket_reso": 2048,
    "bucket_reso_steps": 32, "bucket_no_upscale": True, "resize_interpolation": "box", "is_reg": True, "class_tokens": "dog",
    "caption_extension": "txt", "num_repeats": 4, "flip_aug": True, "shuffle_caption": True, "caption_separator": ";",
    "keep_tokens": 2, "keep_tokens_separator": "|||", "secondary_separator": ";;", "enable_wildcard": True, "caption_prefix": "p",
    "caption_suffix": "s", "caption_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2, "caption_tag_dropout_rate": 1,
    "network_multiplier": 2, "validation_split": 0.25, "validation_seed": 7, "cache_info": True, "color_aug": True,
    "random_crop": True, "face_crop_aug_range": [1, 2.5], "alpha_mask": True, "custom_attributes": {"a": {"b": [1]}},
    "token_warmup_min": 2, "token_warmup_step": 0.25,
}  # fmt: skip
READ = SAMPLES | {"resolution": (512, 768), "caption_extension": ".txt", "face_crop_aug_range": (1.0, 2.5)}


def test_the_innermost_value_that_is_set_wins_and_zero_counts_as_set(tmp_path: Path) -> None:
    general, dataset, subset = {"keep_tokens": 3, "flip_aug": True}, {"keep_tokens": 2}, {"keep_tokens": 0, "flip_aug": False}
    config = load(write(tmp_path, minimal(tmp_path, general, dataset, subset)))
    assert effective(config, "keep_tokens") == 0
    assert effective(config, "flip_aug") is False
    assert effective(load(write(tmp_path, minimal(tmp_path, general, dataset))), "keep_tokens") == 2
    assert effective(load(write(tmp_path, minimal(tmp_path, general))), "keep_tokens") == 3
    assert effective(load(write(tmp_path, minimal(tmp_path)), keep_tokens=5), "keep_tokens") == 5
    assert effective(load(write(tmp_path, minimal(tmp_path))), "keep_tokens") == 0


def test_an_empty_text_overrides_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, minimal(tmp_path, subset={"keep_tokens_separator": ""}))
    assert effective(load(path, keep_tokens_separator="|||"), "keep_tokens_separator") == ""


OPTIONS: dict[str, Any] = {
    "enable_bucket": True, "min_bucket_reso": 128, "max_bucket_reso": 2048, "bucket_reso_steps": 32, "bucket_no_upscale": True,
    "resize_interpolation": "area", "cache_info": True, "color_aug": True, "flip_aug": True, "random_crop": True,
    "alpha_mask": True, "caption_extension": "txt", "caption_separator": ";", "shuffle_caption": True, "keep_tokens": 2,
    "keep_tokens_separator": "|||", "secondary_separator": ";;", "enable_wildcard": True, "caption_prefix": "p",
    "caption_suffix": "s", "caption_dropout_rate": 0.5, "caption_dropout_every_n_epochs": 2, "caption_tag_dropout_rate": 0.25,
    "token_warmup_min": 2, "token_warmup_step": 0.25, "validation_split": 0.5, "validation_seed": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_option_of_the_same_name_is_the_fallback(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, minimal(tmp_path))
    before = effective(load(path), name)
    after = effective(load(path, **{name: OPTIONS[name]}), name)
    assert after == (".txt" if name == "caption_extension" else OPTIONS[name]) != before


def test_every_key_with_an_option_of_its_name_is_among_them() -> None:
    assert OPTIONS.keys() | {"resolution", "face_crop_aug_range"} == {key.name for key in KEYS.values() if key.option == key.name}


def test_a_range_of_factors_on_the_command_line_is_read_as_in_the_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal(tmp_path)), face_crop_aug_range="1.5,3")
    assert effective(config, "face_crop_aug_range") == (1.5, 3.0)


def test_options_with_other_names_are_fallbacks(tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal(tmp_path)), train_batch_size=7, dataset_repeats=3, prior_loss_weight=0.5)
    assert (effective(config, "batch_size"), effective(config, "num_repeats"), config.prior_loss_weight) == (7, 3, 0.5)


@pytest.mark.parametrize(
    ("written", "read"),
    [(512, (512, 512)), ([512, 768], (512, 768)), ("512,768", (512, 768)), ("512", (512, 512)), (512.0, (512, 512))],
)
def test_a_resolution_may_be_a_number_a_pair_or_a_text(tmp_path: Path, written: Any, read: tuple[int, int]) -> None:
    assert effective(load(write(tmp_path, minimal(tmp_path, dataset={"resolution": written}))), "resolution") == read


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("resolution", [512], None),
        ("resolution", [1, 2, 3], "a side in pixels"),
        ("resolution", 0, "a side in pixels"),
        ("resolution", "big", "a side in pixels"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("batch_size", True, "a whole number of at least 1"),
        ("batch_size", 1.5, "a whole number of at least 1"),
        ("enable_bucket", 1, "true or false"),
        ("resize_interpolation", "lanzcos", "one of lanczos, nearest"),
        ("caption_dropout_rate", 1.5, "a number from 0 to 1"),
        ("caption_dropout_rate", True, "a number from 0 to 1"),
        ("caption_separator", 5, "a text in quotes"),
        ("caption_separator", "", "a text in quotes of at least one character"),
        ("keep_tokens", -1, "a whole number of at least 0"),
        ("keep_tokens", True, "a whole number of at least 0"),
        ("token_warmup_step", -0.5, "a number of at least 0"),
        ("token_warmup_step", True, "a number of at least 0"),
        ("network_multiplier", "strong", "a number"),
        ("validation_split", 1, "a number from 0 to below 1"),
        ("validation_seed", 1.5, "a whole number of at least 0"),
        ("face_crop_aug_range", [2.0, 1.0], "two numbers above 0"),
        ("face_crop_aug_range", [0, 1.0], "two numbers above 0"),
        ("face_crop_aug_range", [1.0], "two numbers above 0"),
        ("face_crop_aug_range", 2.0, "two numbers above 0"),
        ("custom_attributes", ["diff_output_preservation"], "a table, such as {"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(
    tmp_path: Path, name: str, value: Any, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_file, "NOT_BUILT_DATASET_KEYS", {})
    path = write(tmp_path, minimal(tmp_path, dataset={name: value}))
    if wanted is None:
        assert effective(load(path), "resolution") == (512, 512)
        return
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: [[datasets]] 1: {name} must be {wanted}")
    assert problem.endswith(f"but it is {json.dumps(value)}.")


def test_quoted_numbers_and_whole_numbers_for_fractions_are_read(tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal(tmp_path, dataset={"batch_size": "4", "caption_dropout_rate": 1, "flip_aug": "true"})))
    assert (effective(config, "batch_size"), effective(config, "caption_dropout_rate"), effective(config, "flip_aug")) == (
        4,
        1.0,
        True,
    )


def test_all_mistakes_are_told_at_once_with_place_and_nearest_key(tmp_path: Path) -> None:
    content = minimal(
        tmp_path, {"shufle_caption": True}, {"batchsize": 2, "train_batch_size": 3}, {"image_directory": "x", "zzz": 1}
    )
    content["generall"] = {}
    content["datasets"].append({"resolution": 512, "subsets": [{"image_dir": str(tmp_path / "missing")}, {"class_tokens": "x"}]})
    path = write(tmp_path, content)
    told = "\n".join(problems(path, prior_loss_weight=1.0))
    for expected in [
        "unknown table or key generall. A dataset file holds [general] and [[datasets]]. Did you mean general?",
        "[general]: unknown key shufle_caption. Did you mean shuffle_caption? It is allowed in [general] or [[datasets]] or",
        "[[datasets]] 1: unknown key batchsize. Did you mean batch_size?",
        "[[datasets]] 1: train_batch_size is called batch_size in a dataset file.",
        "[[datasets]] 1, subset 1: unknown key image_directory.",
        "[[datasets]] 1, subset 1: unknown key zzz. Remove it.",
        "[[datasets]] 2, subset 1: image_dir " + str(tmp_path / "missing") + " is not a folder.",
        "[[datasets]] 2, subset 2: image_dir is missing.",
    ]:
        assert expected in told


@pytest.mark.parametrize("name", ["prior_loss_weight", "max_token_length", "cache_latents"])
def test_settings_of_the_whole_run_are_sent_to_the_command_line(tmp_path: Path, name: str) -> None:
    (problem,) = problems(write(tmp_path, minimal(tmp_path, {name: 1})))
    assert f"give --{name} on the command line" in problem


@pytest.mark.parametrize("name", NOT_BUILT_DATASET_KEYS)
def test_keys_without_their_feature_are_refused_by_name_unless_switched_off(tmp_path: Path, name: str) -> None:
    level = "subset" if SUBSET in KEYS[name].levels else "dataset"
    told = "\n".join(problems(write(tmp_path, minimal(tmp_path, **{level: {name: "on"}}))))
    assert f"{name} cannot be used: " in told
    for harmless in NOT_BUILT_DATASET_KEYS[name][1]:
        load(write(tmp_path, minimal(tmp_path, **{level: {name: harmless}})))


def test_json_is_read_too(tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal(tmp_path, {"keep_tokens": None}), "data.JSON".lower()), keep_tokens=2)
    assert effective(config, "keep_tokens") == 2


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data.yaml", b"", "must end in .toml or .json"),
        ("data.toml", b"[general\n", "is not valid TOML"),
        ("data.toml", b'x = "C:\\pictures"\n', "Write Windows paths in single quotes"),
        ("data.json", b"[1]", "but it holds a list"),
        ("data.toml", "# Bär".encode("latin-1"), "is not UTF-8 (byte 0xe4 at 3)"),
        ("data.toml", b"", "[[datasets]] is missing"),
        ("data.toml", b"datasets = 3", "[[datasets]] must be a list of tables"),
        ("data.toml", b"[[datasets]]\nresolution = 512", "[[datasets.subsets]] of [[datasets]] 1 is missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    told = "\n".join(problems(path))
    assert expected in told
    assert str(path) in told


def test_a_missing_file_and_a_missing_resolution_are_told(tmp_path: Path) -> None:
    assert "there is no such file" in problems(tmp_path / "none.toml")[0]
    content = minimal(tmp_path)
    del content["datasets"][0]["resolution"]
    assert "resolution is missing" in problems(write(tmp_path, content))[0]
    assert effective(load(write(tmp_path, content), resolution="640"), "resolution") == (640, 640)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({"resolution": 500}, "must consist of multiples of 32"),
        ({"enable_bucket": True, "bucket_reso_steps": 8}, "bucket_reso_steps is 8, but it must be a multiple of 32"),
        ({"enable_bucket": True, "resolution": 1280}, "max_bucket_reso 1024 is below the resolution 1280x1280"),
        ({"enable_bucket": True, "min_bucket_reso": 640}, "min_bucket_reso 640 is above the resolution 512x512"),
    ],
)
def test_sizes_that_cannot_be_trained_are_refused(tmp_path: Path, dataset: Content, expected: str) -> None:
    assert expected in problems(write(tmp_path, minimal(tmp_path, dataset=dataset)))[0]


def test_bucket_limits_are_rounded_outwards_with_a_warning(tmp_path: Path) -> None:
    dataset = {"enable_bucket": True, "min_bucket_reso": 300, "max_bucket_reso": 1000}
    warnings = "\n".join(load(write(tmp_path, minimal(tmp_path, dataset=dataset))).warnings)
    assert "from 256 to 1024" in warnings


def test_the_smallest_side_of_a_bucket_is_one_step(tmp_path: Path) -> None:
    dataset = {"enable_bucket": True, "min_bucket_reso": 32}
    (section,) = load(write(tmp_path, minimal(tmp_path, dataset=dataset))).sections
    assert bucket_limits(section) == (64, 1024)


def test_limits_that_are_not_used_are_not_checked_against_the_resolution(tmp_path: Path) -> None:
    dataset = {"enable_bucket": True, "bucket_no_upscale": True, "resolution": 1280}
    assert any("not used with bucket_no_upscale" in w for w in load(write(tmp_path, minimal(tmp_path, dataset=dataset))).warnings)


def test_a_limit_at_the_resolution_is_warned_about(tmp_path: Path) -> None:
    dataset = {"enable_bucket": True, "resolution": 1024}
    assert any("2048 is usual" in warning for warning in load(write(tmp_path, minimal(tmp_path, dataset=dataset))).warnings)


def test_one_folder_by_two_names_is_used_once_in_a_dataset_but_may_stand_in_two(tmp_path: Path) -> None:
    content = minimal(tmp_path)
    folder = content["datasets"][0]["subsets"][0]["image_dir"]
    content["datasets"][0]["subsets"].append({"image_dir": f"{folder}/../images/"})
    content["datasets"].append({"resolution": 256, "subsets": [{"image_dir": folder}]})
    config = load(write(tmp_path, content))
    assert [len(section.subsets) for section in config.sections] == [1, 1]
    assert any("listed twice" in warning for warning in config.warnings)


def test_a_subset_without_repeats_is_skipped_and_a_dataset_of_nothing_else_refused(tmp_path: Path) -> None:
    assert "no images are left" in problems(write(tmp_path, minimal(tmp_path, subset={"num_repeats": 0})))[0]


def folders(tmp_path: Path, *names: str, **options: Any) -> DatasetConfig:
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
    return load_dataset_config(
        DatasetOptions(train_data_dir=str(tmp_path / "train"), resolution="512", **options),
        CaptionOptions(),
        ImageOptions(),
        CacheOptions(),
    )


def test_folder_names_give_repeats_and_class_tokens(tmp_path: Path) -> None:
    config = folders(tmp_path, "10_sks dog", "3_a_b", "07_lead", "5", "x_y", "1.5_f", "0_zero", "-2_neg")
    found = [(Path(s.image_dir).name, s.num_repeats, s.class_tokens) for s in config.sections[0].subsets]
    assert found == [("07_lead", 7, "lead"), ("10_sks dog", 10, "sks dog"), ("3_a_b", 3, "a_b"), ("5", 5, "")]
    assert sum("does not start with a number of repeats" in warning for warning in config.warnings) == 2
    assert not config.from_file


def test_folders_of_regularisation_images_are_marked(tmp_path: Path) -> None:
    (tmp_path / "reg" / "1_dog").mkdir(parents=True)
    config = folders(tmp_path, "2_sks dog", reg_data_dir=str(tmp_path / "reg"))
    assert [(s.is_reg, s.class_tokens) for s in config.sections[0].subsets] == [(False, "sks dog"), (True, "dog")]


def test_a_folder_without_subfolders_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no folder named REPEATS_CLASS"):
        folders(tmp_path, "pictures")


def test_no_source_at_all_says_what_to_give() -> None:
    with pytest.raises(UsageError, match="give --dataset_config FILE, or --train_data_dir"):
        load_dataset_config(DatasetOptions(), CaptionOptions(), ImageOptions(), CacheOptions())


def test_a_dataset_file_is_checked_without_torch(tmp_path: Path) -> None:
    program = "import sys, library.options.dataset_config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode == 0
