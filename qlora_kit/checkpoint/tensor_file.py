"""One safetensors file: its header, and one tensor at a time.

The format is eight bytes (length of the header, little endian), a JSON header
(name to dtype, shape and byte range), then the bytes. It is read here with plain
positioned reads instead of a memory map: mapped pages count as resident until
the map is dropped, so a pass over a 16 GB file would look like 16 GB of memory
and trip memory limits, while a read costs exactly the tensor that is alive.

Every way a file can be wrong raises its own `FormatError` before any tensor is
returned, so that a truncated download is named instead of becoming a model that
talks nonsense.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.core.errors import FormatError, SourceError

MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""Dtype names of the format to torch's."""
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Example:
        >>> TensorInfo("w", (2, 3), torch.bfloat16).nbytes
        12
    """

    name: str
    """Key in the checkpoint."""
    shape: tuple[int, ...]
    """Sizes, outermost first."""
    dtype: torch.dtype
    """Dtype as stored."""
    file: str = ""
    """File name inside the checkpoint folder; empty for a tensor that is yet to be written."""
    offset: int = 0
    """First byte in the file."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        Tensor name to its description, in the order of the header.

    Raises:
        SourceError: the file does not exist.
        FormatError: the file is truncated, or its header does not describe it.

    Example:
        >>> import tempfile, safetensors.torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     safetensors.torch.save_file({"w": torch.zeros(2, 3)}, path)
        ...     read_header(path)["w"].shape
        (2, 3)
    """
    if not path.is_file():
        raise SourceError(f"{path} is missing. Copy or download the checkpoint again.")
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise FormatError(
                f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in that folder."
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > size_bytes:
            raise FormatError(
                f"{path} is not a safetensors file or is truncated: its header should take "
                f"{length} bytes and the file has {size_bytes}. Download it again."
            )
        header = _parse_json(file.read(length), path)
    data_start = 8 + length
    infos = {
        name: _parse_entry(name, entry, path, data_start, size_bytes)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _refuse_overlap(infos, path)
    return infos


def read_tensor(folder: Path, info: TensorInfo, start: int = 0, stop: int | None = None) -> Tensor:
    """Read one tensor, or some of its rows, into its own memory.

    Args:
        folder: the folder `info.file` lies in.
        info: as `read_header` returned it.
        start: first index along the first dimension.
        stop: index after the last one; None for all.

    Returns:
        The tensor on the CPU, writable, in the stored dtype; (stop - start, ...) of
        its shape.

    Raises:
        FormatError: the file became shorter since its header was read.

    Example:
        >>> import tempfile, safetensors.torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "model.safetensors")
        ...     safetensors.torch.save_file({"w": torch.arange(3)}, path)
        ...     read_tensor(path.parent, read_header(path)["w"])
        tensor([0, 1, 2])
    """
    shape, offset, nbytes = info.shape, info.offset, info.nbytes
    if start or stop is not None:
        stop = shape[0] if stop is None else stop
        assert 0 <= start <= stop <= shape[0], (info, start, stop)
        row_bytes = nbytes // shape[0] if shape[0] else 0
        shape, nbytes = (stop - start, *shape[1:]), (stop - start) * row_bytes
        offset += start * row_bytes
    raw = torch.empty(nbytes, dtype=torch.uint8)
    if nbytes:
        with (folder / info.file).open("rb") as file:
            file.seek(offset)
            got = file.readinto(raw.numpy().data)
        if got != nbytes:
            raise FormatError(
                f"{folder / info.file} ends inside tensor {info.name!r}: needed {nbytes} "
                f"bytes, got {got}. Download it again."
            )
    return raw.view(info.dtype).reshape(shape)


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Decode the header, which must be one JSON object."""
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise FormatError(
            f"the header of {path} is not JSON ({error}). Download it again."
        ) from error
    if not isinstance(header, dict):
        raise FormatError(f"the header of {path} is not a JSON object. Download it again.")
    return header


def _parse_entry(name: str, entry: Any, path: Path, data_start: int, size_bytes: int) -> TensorInfo:
    """Check one header entry against the file it describes."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers_ok = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: the header entry of {name!r} is malformed: {entry!r}."
        ) from error
    if not numbers_ok or dtype_name not in DTYPES:
        raise FormatError(
            f"{path}: tensor {name!r} has dtype {dtype_name!r} and shape {shape}; known dtypes are "
            f"{', '.join(DTYPES)} and sizes are whole numbers."
        )
    info = TensorInfo(name, tuple(shape), DTYPES[dtype_name], path.name, data_start + begin)
    if end - begin != info.nbytes:
        raise FormatError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype_name} needs {info.nbytes} "
            f"bytes, its range holds {end - begin}."
        )
    if data_start + end > size_bytes:
        raise FormatError(
            f"{path} is truncated: tensor {name!r} ends at byte {data_start + end}, the file at "
            f"{size_bytes}. Download it again."
        )
    return info


def _refuse_overlap(infos: dict[str, TensorInfo], path: Path) -> None:
    """Two tensors never share bytes in this format."""
    ordered = sorted((info for info in infos.values() if info.nbytes), key=lambda info: info.offset)
    for left, right in pairwise(ordered):
        if left.offset + left.nbytes > right.offset:
            raise FormatError(f"{path}: tensors {left.name!r} and {right.name!r} overlap.")
