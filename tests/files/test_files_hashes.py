import hashlib
import json
from pathlib import Path

import torch

from library.files.hashes import add_network_hashes, model_hash, sha256_file, sshs_legacy_hash, sshs_model_hash

REFERENCE = json.loads((Path(__file__).parents[1] / "compat" / "networks_reference_values.json").read_text())["hashes"]


def test_network_hashes_of_a_small_file_equal_the_reference():
    tensors = {"b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4), "a.alpha": torch.tensor(1.0)}
    metadata = dict(REFERENCE["metadata"])
    add_network_hashes(metadata, tensors)
    assert metadata["sshs_model_hash"] == REFERENCE["sshs_model_hash"]
    assert metadata["sshs_legacy_hash"] == REFERENCE["sshs_legacy_hash"]


def test_network_hashes_of_a_file_above_one_mebibyte_equal_the_reference():
    tensors = {"w": torch.arange(400_000, dtype=torch.float32)}
    for metadata, key in (({"ss_a": "1"}, "metadata ss_a=1"), ({"ss_a": "1", "ss_bb": "22"}, "metadata ss_a=1 ss_bb=22")):
        assert [sshs_model_hash(tensors), sshs_legacy_hash(tensors, metadata | {"modelspec.title": "x"})] == REFERENCE["large"][key]


def test_model_hashes_are_those_of_the_window_and_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "m.ckpt").write_bytes(content)
    assert model_hash(tmp_path / "m.ckpt") == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    assert sha256_file(tmp_path / "m.ckpt") == hashlib.sha256(content).hexdigest()
    for function in (model_hash, sha256_file):
        assert function(tmp_path / "no") == "NOFILE"
        assert function(tmp_path) == "IsADirectory"
