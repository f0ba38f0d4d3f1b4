import json
import os

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from library.files.safetensors_io import open_safetensors, save_safetensors
from library.files.safetensors_layout import DTYPES, TensorInfo
from library.files.tensors import open_tensors
from library.options.errors import UserError

LIBRARY_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
]
LIBRARY_DTYPES += [torch.int64, torch.float8_e5m2, torch.float8_e4m3fn, torch.uint16, torch.uint32, torch.uint64, torch.complex64]


def tensors_of_all_kinds():
    torch.manual_seed(0)
    by_dtype = {f"kind.{i}": torch.randint(0, 2, (2, 3)).to(dtype) for i, dtype in enumerate(LIBRARY_DTYPES)}
    odd = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5), "a.weight": torch.randn(3, 5), "ä": torch.randn(2)}
    return by_dtype | odd


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(raw(found[name]), raw(tensor)), name


def test_our_bytes_are_those_of_the_safetensors_library(tmp_path):
    tensors = tensors_of_all_kinds()
    save_safetensors(tmp_path / "ours.safetensors", tensors, {"ss_a": "ü"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"ss_a": "ü"})
    ours, theirs = (tmp_path / "ours.safetensors").read_bytes(), (tmp_path / "theirs.safetensors").read_bytes()
    length = int.from_bytes(theirs[:8], "little")
    assert ours[:8] == theirs[:8]
    assert json.loads(ours[8 : 8 + length]) == json.loads(theirs[8 : 8 + length])
    assert ours[8 + length :] == theirs[8 + length :]


def test_every_dtype_of_the_library_has_a_name_here():
    assert set(safetensors.torch._TYPES.values()) - set(DTYPES.values()) == set()


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "whole"])
def test_what_was_saved_is_read_back(tmp_path, mmap):
    tensors = tensors_of_all_kinds()
    save_safetensors(tmp_path / "a.safetensors", tensors, {"ss_a": "1"})
    with open_safetensors(tmp_path / "a.safetensors", mmap) as file:
        assert file.metadata == {"ss_a": "1"}
        assert file.infos["a.weight"] == TensorInfo(torch.float32, (3, 5))
        assert len(file) == len(tensors)
        assert_same(file, tensors)
    with pytest.raises(KeyError):
        file["no such tensor"]


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "whole"])
def test_a_file_whose_tensors_are_not_aligned_is_read(tmp_path, mmap):
    header = json.dumps(
        {"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    ).encode()
    data = b"\x07" + torch.tensor([1.5, -2.0]).view(torch.uint8).numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = open_safetensors(tmp_path / "odd.safetensors", mmap)
    assert file["w"].tolist() == [1.5, -2.0]
    assert file["b"].item() == 7


def test_a_file_that_is_not_mapped_is_not_kept_in_memory_either_and_told_of_where_it_gets_shorter(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(4, 4), "b": torch.zeros(1000)})
    file = open_safetensors(tmp_path / "a.safetensors", mmap=False)
    assert file["a"].untyped_storage().nbytes() == 4 * 4 * 4, "no tensor holds on to more than itself"
    os.truncate(tmp_path / "a.safetensors", 200)
    with pytest.raises(UserError, match="got shorter while it was read: b is not"):
        file["b"]


def test_floating_point_tensors_are_converted_while_saving_and_the_rest_is_kept(tmp_path):
    tensors = {"w": torch.randn(4, 4), "ids": torch.arange(3), "t": torch.randn(4, 6).t()}
    save_safetensors(tmp_path / "a.safetensors", tensors, dtype=torch.bfloat16)
    assert_same(
        safetensors.torch.load_file(tmp_path / "a.safetensors"),
        {"w": tensors["w"].bfloat16(), "ids": tensors["ids"], "t": tensors["t"].bfloat16()},
    )


def test_dtypes_shapes_and_metadata_are_known_without_the_tensors(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(2, 3, dtype=torch.float16)}, {"k": "v"})
    with open_safetensors(tmp_path / "a.safetensors") as file:
        assert (file.infos, file.metadata) == ({"w": (torch.float16, (2, 3))}, {"k": "v"})


def test_other_software_opens_a_file_without_metadata(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() is None


def test_a_file_cut_short_is_told_with_both_sizes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"w": torch.zeros(1000)})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=rf"a\.safetensors is cut short: it has 2,000 of {size:,} bytes"):
        open_safetensors(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PK\x03\x04 and so on, long enough to be read", r"rename it to \.ckpt"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!", "header cannot be read"),
        (b'\x40\x00\x00\x00\x00\x00\x00\x00{"w": {"dtype"', "cut short"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "header cannot be read"),
        (b"abc", "header cannot be read"),
    ],
)
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path, content, sentence):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_safetensors(tmp_path / "a.safetensors")


def test_a_number_type_from_the_future_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F2", "shape": [8], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(UserError, match="number type that is not known here: F2"):
        open_safetensors(tmp_path / "a.safetensors")


def test_a_header_whose_tensors_overlap_is_damaged(tmp_path):
    header = json.dumps({name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for name in "ab"}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
        open_safetensors(tmp_path / "a.safetensors")


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_safetensors(tmp_path / "no.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        open_safetensors(tmp_path)


def test_the_extension_in_any_case_chooses_the_format(tmp_path):
    save_safetensors(tmp_path / "a.SafeTensors", {"w": torch.ones(2)}, {"k": "v"})
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "a.ckpt")
    for name in ("a.SafeTensors", "a.ckpt"):
        file = open_tensors(tmp_path / name)
        assert file["w"].tolist() == [1.0, 1.0]
        assert file.infos == {"w": TensorInfo(torch.float32, (2,))}
