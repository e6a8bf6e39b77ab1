"""Write safetensors tensor by tensor.

`safetensors.torch.save_file` wants every tensor at once, and the library has no
way to append. Merging an 8B model would then need all 16 GB in memory. The
format itself is friendlier than its library: the header holds only names, dtypes,
shapes and byte ranges, all known before the first tensor is computed. So the
whole layout is planned from `TensorInfo`s, every file is created at its final
size, and each tensor is written to its place when it is ready, in any order; one
tensor is in memory at a time.

Within a file tensors are laid out by falling item size, then by name, as the
library does: every tensor then starts aligned to its own dtype.

Source: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from qlora_kit.checkpoint.tensor_file import DTYPE_NAMES, TensorInfo
from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import FormatError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000


class ShardWriter:
    """A checkpoint that is written one tensor at a time.

    Use as a context manager: leaving it normally checks that nothing is missing
    and writes the index.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> tensors = {"a": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}
        >>> infos = [TensorInfo(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(Path(folder), infos) as writer:
        ...         for name, tensor in tensors.items():
        ...             writer.write(name, tensor)
        ...     back = safetensors.torch.load_file(Path(folder, "model.safetensors"))
        >>> torch.equal(back["a"], tensors["a"]), back["b"].dtype
        (True, torch.bfloat16)
    """

    def __init__(
        self,
        folder: Path,
        infos: Iterable[TensorInfo],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Plan the layout and create the files, empty but for their headers.

        Args:
            folder: existing folder to write into.
            infos: every tensor that will be written; their order decides the shards.
            max_shard_bytes: data per file. A larger single tensor gets a file of its own.

        Raises:
            FormatError: a name comes twice, or a dtype has no name in the format.
        """
        self.folder = Path(folder)
        self._planned: dict[str, TensorInfo] = {}
        self._done: dict[str, int] = {}
        shards = _split(infos, max_shard_bytes)
        self.files = [
            SINGLE_NAME if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        for file_name, shard in zip(self.files, shards, strict=True):
            self._create(file_name, shard)

    def _create(self, file_name: str, shard: list[TensorInfo]) -> None:
        """Write one file's header and reserve room for its data."""
        ordered = sorted(shard, key=lambda info: (-info.dtype.itemsize, info.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for info in ordered:
            header[info.name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            position += info.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        start = 8 + len(raw)
        with (self.folder / file_name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little"))
            file.write(raw)
            file.truncate(start + position)
        for info in ordered:
            self._planned[info.name] = TensorInfo(
                info.name, info.shape, info.dtype, file_name, start
            )
            self._done[info.name] = 0
            start += info.nbytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place.

        Args:
            name: a planned name, not written before.
            tensor: of the planned shape and dtype, on any device. Not modified.

        Raises:
            FormatError: the name was not planned or was written before, or the
                tensor is not what was planned.
        """
        info = self._planned.get(name)
        if info is not None and (tuple(tensor.shape) != info.shape or self._done[name]):
            state = "was begun already" if self._done[name] else f"got {tuple(tensor.shape)}"
            raise FormatError(f"tensor {name!r} was planned as {info.shape}, {state}.")
        self.write_part(name, tensor)

    def write_part(self, name: str, part: Tensor) -> None:
        """Write the next part of a tensor; parts follow one another in row-major order.

        Args:
            name: a planned name.
            part: any shape, of the planned dtype, on any device. Not modified.

        Raises:
            FormatError: the name was not planned, or its parts are too many or of
                another dtype.
        """
        info = self._planned.get(name)
        if info is None:
            raise FormatError(f"tensor {name!r} was not planned.")
        done = self._done[name]
        if part.dtype != info.dtype or done + part.nbytes > info.nbytes:
            raise FormatError(
                f"tensor {name!r} was planned as {info.shape} {info.dtype}, {info.nbytes} bytes; "
                f"after {done} bytes came {tuple(part.shape)} {part.dtype}."
            )
        if part.nbytes:
            raw = part.detach().cpu().contiguous().reshape(-1)
            with (self.folder / info.file).open("r+b", buffering=0) as file:
                file.seek(info.offset + done)
                view = raw.view(dtype=torch.uint8).numpy().data
                while view:  # an unbuffered write may take only a part
                    view = view[file.write(view) :]
            done += part.nbytes
        self._done[name] = done

    @property
    def infos(self) -> list[TensorInfo]:
        """Every planned tensor with its file and place."""
        return list(self._planned.values())

    def close(self) -> None:
        """Check that every planned tensor was written, and write the index of several files.

        Raises:
            FormatError: planned tensors were never written.
        """
        missing = [n for n, info in self._planned.items() if self._done[n] != info.nbytes]
        if missing:
            some = ", ".join(sorted(missing)[:5])
            raise FormatError(
                f"{len(missing)} planned tensors were not written in full to {self.folder}: {some}"
                f"{', ...' if len(missing) > 5 else ''}."
            )
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in self._planned.values())},
                "weight_map": {name: info.file for name, info in sorted(self._planned.items())},
            }
            atomic_write_text(self.folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> Self:
        """Start writing; the files exist already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close unless an error is on its way out."""
        if kind is None:
            self.close()


def _split(infos: Iterable[TensorInfo], max_shard_bytes: int) -> list[list[TensorInfo]]:
    """Fill shards in order; at least one, even for no tensors."""
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    seen: set[str] = set()
    for info in infos:
        if info.name in seen or info.dtype not in DTYPE_NAMES:
            problem = "comes twice" if info.name in seen else f"has dtype {info.dtype}"
            raise FormatError(f"tensor {info.name!r} {problem}, which safetensors cannot store.")
        seen.add(info.name)
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    return shards
