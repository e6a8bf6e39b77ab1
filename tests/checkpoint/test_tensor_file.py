"""Reading safetensors: equal to the library, and one error per way of being malformed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_kit.checkpoint.tensor_file import DTYPES, TensorInfo, read_header, read_tensor
from qlora_kit.core.errors import FormatError, SourceError
from qlora_kit.core.memory import PeakMemory


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape=(2,), dtype="U8", offsets=(0, 2)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", sorted(DTYPES.values(), key=str), ids=str)
def test_every_dtype_equals_what_the_library_wrote(tmp_path, dtype):
    bits = torch.randint(0, 2, (3, 5, dtype.itemsize), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(3, 5)
    save_file({"t": tensor, "scalar": tensor[0, 0].clone()}, tmp_path / "a.safetensors")
    infos = read_header(tmp_path / "a.safetensors")
    got = read_tensor(tmp_path, infos["t"])
    assert got.dtype == dtype
    assert got.shape == (3, 5)
    assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))
    assert read_tensor(tmp_path, infos["scalar"]).shape == ()


def test_rows_equal_slices(tmp_path):
    tensor = torch.arange(24, dtype=torch.int16).reshape(4, 3, 2)
    save_file({"other": torch.ones(3), "t": tensor}, tmp_path / "a.safetensors")
    info = read_header(tmp_path / "a.safetensors")["t"]
    for start, stop in ((0, 4), (1, 3), (2, None), (4, 4), (0, 0)):
        assert torch.equal(read_tensor(tmp_path, info, start, stop), tensor[start:stop])


def test_empty_tensors_and_metadata(tmp_path):
    save_file({"none": torch.empty(0, 4)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "a.safetensors")
    assert list(infos) == ["none"]
    assert read_tensor(tmp_path, infos["none"]).shape == (0, 4)


def test_many_reads_leave_no_memory_behind(tmp_path):
    tensors = {f"t{i}": torch.zeros(4_000_000) for i in range(12)}  # 16 MB each
    save_file(tensors, tmp_path / "a.safetensors")
    tensors.clear()
    infos = read_header(tmp_path / "a.safetensors")
    for info in infos.values():  # what the allocator keeps for later, it keeps after one pass
        read_tensor(tmp_path, info)
    with PeakMemory() as memory:
        for _ in range(3):
            for info in infos.values():
                read_tensor(tmp_path, info)
    assert memory.growth_bytes < 40_000_000  # of 576 MB read
    with PeakMemory() as memory:
        kept = [read_tensor(tmp_path, info) for info in infos.values()]
    assert memory.growth_bytes > 150_000_000  # the measurement notices what is kept
    assert len(kept) == 12


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"nothing\.safetensors is missing"):
        read_header(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not JSON"),
        (b"[]", b"", "not a JSON object"),
        ({"t": {"dtype": "U8"}}, b"", "malformed"),
        ({"t": entry(dtype="Q4")}, b"ab", "known dtypes"),
        ({"t": entry(shape=(-2,))}, b"ab", "whole numbers"),
        ({"t": entry(shape=(3,))}, b"ab", "needs 3 bytes, its range holds 2"),
        ({"t": entry(offsets=(2, 0))}, b"ab", "its range holds -2"),
        ({"t": entry()}, b"a", "truncated"),
        ({"t": entry(), "u": entry(offsets=(1, 3))}, b"abc", "overlap"),
    ],
)
def test_each_malformed_header_has_its_own_error(tmp_path, header, data, message):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError, match=message):
        read_header(path)


def test_header_longer_than_the_file(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(FormatError, match="truncated: its header should take 1000"):
        read_header(tmp_path / "cut.safetensors")
    (tmp_path / "tiny.safetensors").write_bytes(b"abc")
    with pytest.raises(FormatError, match="not a safetensors file"):
        read_header(tmp_path / "tiny.safetensors")


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FormatError, match="git lfs pull"):
        read_header(path)


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    write_raw(tmp_path / "a.safetensors", {"t": entry()}, b"a")
    info = TensorInfo(
        "t", (2,), torch.uint8, "a.safetensors", (tmp_path / "a.safetensors").stat().st_size - 1
    )
    with pytest.raises(FormatError, match="ends inside tensor 't': needed 2 bytes, got 1"):
        read_tensor(tmp_path, info)


def test_damaged_bytes_never_surprise(tmp_path):
    """Whatever happens to a header, the file is refused or reads without another error."""
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, tmp_path / "a.safetensors"
    )
    whole = (tmp_path / "a.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    random = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(int(torch.randint(1, 4, (), generator=random))):
            place = int(torch.randint(0, header_end, (), generator=random))
            damaged[place] = int(torch.randint(0, 256, (), generator=random))
        path = tmp_path / "b.safetensors"
        path.write_bytes(damaged)
        try:
            for info in read_header(path).values():
                read_tensor(tmp_path, info)
        except FormatError:
            refused += 1
    assert refused > 200
