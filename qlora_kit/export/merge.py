"""Merge a low-rank adapter into its base, streamed, with memory for a few rows.

    W' = dtype(W + s·B·A)        computed in float32, rounded once

Which W is right is not settled: merging into the original 16-bit weights is usual,
yet the adapter was trained to correct the quantized ones. Both are offered, and
`deviation.compare` measures what either costs:

- `into="quantized"`: W is what the trained model computed with, the decoded NF4
  weight. Layers without an adapter are decoded too, so that the merged model
  equals the unmerged one up to the rounding to `dtype`.
- `into="original"`: W is the original weight, everywhere.

Nothing is loaded. Every tensor of the checkpoint becomes a stream of rows
(`rows.py`) that goes to its place in the output (`checkpoint/writer.py`), so peak
memory is the codes of one weight and a few chunks, well below one large tensor,
and the output appears whole or not at all. Names follow the checkpoint, so
that every tool that reads the base reads the result.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.checkpoint.source import Source, open_source
from qlora_kit.checkpoint.tensor_file import TensorInfo
from qlora_kit.checkpoint.writer import ShardWriter
from qlora_kit.core.atomic import atomic_directory, atomic_write_text
from qlora_kit.core.errors import ConfigError, NonFiniteError
from qlora_kit.core.log import logger
from qlora_kit.core.units import format_bytes, parse_bytes
from qlora_kit.export.items import Item, MergePlan
from qlora_kit.export.plan import make_plan
from qlora_kit.export.rows import chunks

Into = Literal["quantized", "original"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSummary:
    """What a merge did.

    Example:
        >>> MergeSummary(out=Path("m"), into="original", dtype="bfloat16", merged=7,
        ...     decoded=0, replaced=0, tensors=20, nbytes=2048, files=1, seconds=1.0).merged
        7
    """

    out: Path
    """The folder that was written."""
    into: str
    """`quantized` or `original`."""
    dtype: str
    """Dtype of the merged weights."""
    merged: int
    """Weights that got their low-rank change."""
    decoded: int
    """Weights that hold decoded NF4 values, merged ones included."""
    replaced: int
    """Tensors the adapter had trained whole."""
    tensors: int
    """Tensors written."""
    nbytes: int
    """Their size in bytes."""
    files: int
    """Weight files."""
    seconds: float
    """How long it took."""
    notes: tuple[str, ...] = ()
    """What a reader should know, such as assumptions that had to be made."""

    def __str__(self) -> str:
        """One line for the terminal, notes below it."""
        done = []
        if self.merged or not self.replaced:
            done.append(f"{self.merged} weights merged")
        if self.replaced:
            done.append(f"{self.replaced} trained tensors put")
        line = (
            f"{self.out}: {' and '.join(done)} into the {self.into} base, "
            f"{self.tensors} tensors in {self.dtype}, {format_bytes(self.nbytes)} in {self.files} "
            f"file{'s' if self.files != 1 else ''}, {self.seconds:.1f} s"
        )
        return "\n".join((line, *(f"note: {note}" for note in self.notes)))


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    into: Into = "quantized",
    dtype: str = "bfloat16",
    max_shard: str | int = "5GB",
    overwrite: bool = False,
    device: str = "auto",
    revision: str | None = None,
) -> MergeSummary:
    """Merge a LoRA adapter into its base and write a model plain transformers loads.

    Args:
        base: the model the adapter was trained on: a folder, a GGUF file or a hub id.
        adapter: folder of the adapter, saved by this package or by PEFT.
        out: folder to create.
        into: `quantized`: the base as it was trained on, decoded; equals the unmerged
            model. `original`: the 16-bit weights.
        dtype: of the result: bfloat16, float16 or float32.
        max_shard: largest weight file.
        overwrite: replace `out` if it exists.
        device: where to compute; `auto` takes a GPU if there is one.
        revision: branch, tag or commit of a hub id; None: the one the adapter names.

    Returns:
        What was done.

    Raises:
        ConfigError: an option has an unknown value.
        SourceError: base or adapter cannot be found, or `out` exists.
        FormatError: a file is malformed, or `into="original"` was asked of a 4-bit base.
        AdapterError: the adapter does not fit the base.
        NonFiniteError: a result does not fit the dtype, or the base holds NaN.

    Example:
        >>> merge("base", "adapter", "out", into="both")
        Traceback (most recent call last):
        qlora_kit.core.errors.ConfigError: into must be quantized or original, got 'both'.
    """
    if into not in ("quantized", "original"):
        raise ConfigError(f"into must be quantized or original, got {into!r}.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    started = time.perf_counter()
    shard_bytes = parse_bytes(max_shard)
    place = pick_device(device)
    files = read_adapter(adapter)
    if revision is None and str(base) == files.base.path:
        revision = files.base.revision
    source = open_source(base, revision=revision)
    plan = make_plan(source, files, into=into, device=place)
    with atomic_directory(Path(out), overwrite=overwrite) as folder:
        written = write_dense(plan, folder, DTYPES[dtype], shard_bytes)
        write_config(plan, folder, {"dtype": dtype})
        copy_side_files(source, Path(adapter), folder)
    summary = MergeSummary(
        out=Path(out),
        into=into,
        dtype=dtype,
        merged=sum(item.pair is not None or item.change is not None for item in plan.items),
        decoded=sum(item.decoded for item in plan.items),
        replaced=sum(item.value is not None for item in plan.items),
        tensors=len(plan.items),
        nbytes=sum(info.nbytes for info in written),
        files=len({info.file for info in written}),
        seconds=time.perf_counter() - started,
        notes=tuple(plan.notes),
    )
    logger.info("%s", summary)
    return summary


def pick_device(device: str) -> torch.device:
    """Resolve `auto`.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...

    Returns:
        The device.

    Raises:
        ConfigError: it is no device, or not there.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}.") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but torch sees no CUDA device. Use auto or cpu.")
    return place


def write_dense(
    plan: MergePlan, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> list[TensorInfo]:
    """Write every item of a plan as an ordinary tensor.

    Args:
        plan: what to write.
        folder: existing folder.
        dtype: of the float parameters.
        shard_bytes: data per file.

    Returns:
        What was written, files included.

    Raises:
        NonFiniteError: a value does not fit the dtype.
    """
    infos = [dense_info(item, dtype) for item in plan.items]
    with ShardWriter(folder, infos, shard_bytes) as writer:
        for item in plan.in_stack_order():
            for part in dense_parts(item, dtype):
                writer.write_part(item.name, part)
        return writer.infos


def dense_info(item: Item, dtype: torch.dtype) -> TensorInfo:
    """Describe an item as an ordinary tensor.

    Args:
        item: of a plan.
        dtype: of the float parameters.

    Returns:
        Name, shape and dtype in the output.
    """
    return TensorInfo(item.name, item.shape, dtype if item.cast else item.dtype)


def dense_parts(item: Item, dtype: torch.dtype) -> Iterator[Tensor]:
    """Compute an item part by part.

    Args:
        item: of a plan.
        dtype: of the float parameters.

    Yields:
        Consecutive parts, row-major.

    Raises:
        NonFiniteError: a value does not fit the dtype.
    """
    if not item.cast:
        yield item.raw()
        return
    rows = item.rows()
    for values in chunks(rows, item.step):
        part = values.to(dtype)
        if dtype == torch.float16 and not torch.isfinite(part).all():
            raise NonFiniteError(
                f"{item.name} has values that float16 cannot hold (or NaN). Use bfloat16."
            )
        yield part


def write_config(plan: MergePlan, folder: Path, changes: dict[str, Any]) -> None:
    """Write config.json: the source's, unquantized, for the class that was adapted.

    Args:
        plan: knows source and model.
        folder: existing folder.
        changes: keys to set.

    """
    config = {
        key: value
        for key, value in plan.source.config.items()
        if key not in ("quantization_config", "torch_dtype", "_name_or_path")
    }
    config["architectures"] = [type(plan.model).__name__]
    if any(item.value is not None for item in plan.items) and plan.num_labels is not None:
        own = plan.model.config
        config["id2label"] = {str(index): label for index, label in own.id2label.items()}
        config["label2id"] = own.label2id
    config |= changes
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def copy_side_files(source: Source, adapter: Path | None, folder: Path) -> None:
    """Copy tokenizer, chat template and generation config; the adapter's own come first.

    Args:
        source: the base.
        adapter: folder of the adapter, or None.
        folder: existing folder.
    """
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        # A tokenizer saved with the adapter is the one it was trained with.
        source.copy_side_files(folder)
        replace(source, folder=adapter).copy_side_files(folder)
    else:
        source.copy_side_files(folder)
