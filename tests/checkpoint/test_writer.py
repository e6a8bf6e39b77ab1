"""Streaming safetensors files: what the library reads back is what was written."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_kit.checkpoint.tensor_file import TensorInfo, read_header
from qlora_kit.checkpoint.writer import INDEX_NAME, SINGLE_NAME, ShardWriter
from qlora_kit.core.errors import FormatError


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "a.bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
        "half": torch.randn(1, generator=generator).half(),
    }


def infos_of(tensors):
    return [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(folder, tensors, order=None, **options):
    with ShardWriter(folder, infos_of(tensors), **options) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])
    return writer


def assert_equal(got, tensors):
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


def test_single_file_equals(tmp_path):
    tensors = make_tensors()
    write(tmp_path, tensors, order=reversed(list(tensors)))  # any order
    assert_equal(load_file(tmp_path / SINGLE_NAME), tensors)
    assert not (tmp_path / INDEX_NAME).exists()
    with safe_open(tmp_path / SINGLE_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    broken = dict(tensors, scalar=torch.tensor(2.25))
    assert not torch.equal(load_file(tmp_path / SINGLE_NAME)["scalar"], broken["scalar"])


def test_every_tensor_is_aligned_to_its_dtype(tmp_path):
    write(tmp_path, make_tensors())
    for info in read_header(tmp_path / SINGLE_NAME).values():
        assert info.offset % info.dtype.itemsize == 0, info


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    writer = write(tmp_path, tensors, max_shard_bytes=80)
    assert writer.files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 200
    got = {}
    for file in writer.files:
        part = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in part)
        got |= part
    assert_equal(got, tensors)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    tensors = {"a": torch.zeros(1), "big": torch.zeros(100), "c": torch.zeros(1)}
    writer = write(tmp_path, tensors, max_shard_bytes=50)
    assert len(writer.files) == 3


def test_views_are_written_as_values(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "u": base[:, 1]}
    write(tmp_path, tensors)
    assert_equal(load_file(tmp_path / SINGLE_NAME), tensors)


def test_missing_extra_and_wrong_tensors_are_refused(tmp_path):
    tensors = make_tensors()
    writer = ShardWriter(tmp_path, infos_of(tensors))
    with pytest.raises(FormatError, match="was not planned"):
        writer.write("other", torch.zeros(1))
    with pytest.raises(FormatError, match=r"planned as \(3, 5\), got \(5, 3\)"):
        writer.write("b.weight", torch.zeros(5, 3).bfloat16())
    with pytest.raises(FormatError, match="planned as"):
        writer.write("b.weight", torch.zeros(3, 5))
    writer.write("b.weight", tensors["b.weight"])
    with pytest.raises(FormatError, match="begun already"):
        writer.write("b.weight", tensors["b.weight"])
    with pytest.raises(FormatError, match=r"4 planned tensors were not written.*a\.bytes"):
        writer.close()


def test_parts_follow_one_another(tmp_path):
    tensor = torch.arange(20.0).reshape(5, 4)
    writer = ShardWriter(tmp_path, infos_of({"t": tensor, "u": tensor}))
    for start in range(0, 5, 2):
        writer.write_part("t", tensor[start : start + 2])
        writer.write_part("u", tensor[start : start + 2].clone())
    writer.close()
    assert_equal(load_file(tmp_path / SINGLE_NAME), {"t": tensor, "u": tensor})
    with pytest.raises(FormatError, match=r"80 bytes; after 80 bytes came \(1,\)"):
        writer.write_part("t", torch.zeros(1))
    writer = ShardWriter(tmp_path, infos_of({"t": tensor}))
    writer.write_part("t", tensor[:2])
    with pytest.raises(FormatError, match="begun already"):
        writer.write("t", tensor)
    with pytest.raises(FormatError, match="1 planned tensors were not written in full"):
        writer.close()


def test_names_twice_and_dtypes_without_a_name_are_refused(tmp_path):
    info = TensorInfo("t", (1,), torch.float32)
    with pytest.raises(FormatError, match="comes twice"):
        ShardWriter(tmp_path, [info, info])
    with pytest.raises(FormatError, match="complex64"):
        ShardWriter(tmp_path, [TensorInfo("t", (1,), torch.complex64)])


def test_an_error_inside_the_block_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, infos_of(make_tensors())):
        raise KeyError("the reason")
