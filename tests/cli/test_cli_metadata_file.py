"""Training on a metadata file as a person does it, held against training on the same images with caption files."""

import json
from pathlib import Path

from safetensors import safe_open

from tests.cli.training_commands import arguments, assert_same_bits, run_command, write_dataset


def test_a_metadata_file_trains_as_caption_files_do(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, photos, count=4)
    entries = {}
    for number, path in enumerate(sorted((tmp_path / "images").glob("*.jpg"))):
        text = path.with_suffix(".txt").rename(path.with_name(f"{number}.txt"))
        path.rename(path.with_name(f"{number}.jpg"))  # names of one length: longer ones would come first in a metadata file
        caption, _, tags = text.read_text(encoding="utf-8").partition(",")
        entries[f"{number}.jpg"] = {"caption": caption, "tags": tags}
    (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    by_file = tmp_path / "by_file.toml"
    without_ending = dataset.read_text(encoding="utf-8").replace('caption_extension = ".txt"\n', "")
    by_file.write_text(f'{without_ending}metadata_file = "{(tmp_path / "meta.json").as_posix()}"\n', encoding="utf-8")
    for file, output in ((by_file, "by_file"), (dataset, "by_folder")):
        done = run_command(arguments(tiny_checkpoint, file, tmp_path / output, "--max_train_steps", "3"))
        assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "by_file" / "net.safetensors", tmp_path / "by_folder" / "net.safetensors")
    with safe_open(tmp_path / "by_file" / "net.safetensors", "pt") as saved:
        recorded = json.loads(saved.metadata()["ss_datasets"])[0]
    assert (recorded["is_dreambooth"], recorded["subsets"][0]["metadata_file"]) == (False, "meta.json")
    assert recorded["tag_frequency"]["meta.json"]["bright"] == 4
