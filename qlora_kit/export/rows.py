"""Weights as streams of rows: how an export keeps less than one tensor in memory.

A merge computes W + s·B·A row by row, so it never needs the whole W: rows of a
float weight are read from their place in the file, rows of an NF4 weight are
decoded from its codes, which are a quarter of the 16-bit size. What is needed
whole is small: codes, scales, A and B.

Every class here yields rows in float32, valued as the trained model saw them.
`rows_step` says how many rows make whole quantization blocks, so that a chunk
never cuts one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.checkpoint.source import Source
from qlora_kit.checkpoint.tensor_file import read_tensor
from qlora_kit.core.errors import NonFiniteError
from qlora_kit.ops.nf4_quantize.op import nf4_quantize, nf4_quantize_absmax
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.double_quant import dequantize_absmax
from qlora_kit.quant.nf4 import dequantize_nf4
from qlora_kit.quant.weight import NF4Weight

_SHORTEST = torch.finfo(torch.float32).tiny ** 0.5
"""A row of zeros is divided by this, and stays zero."""
CHUNK_WEIGHTS = 1 << 22
"""Weights in flight at a time: 16 MB in float32."""


class Rows(Protocol):
    """A weight seen as a matrix, read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; leading dimensions of a stack are folded into the rows."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop, float32 (stop - start, columns)."""
        ...


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Fold all but the last dimension into rows.

    Args:
        shape: of any tensor; a scalar is one by one.

    Returns:
        Rows and columns.

    Example:
        >>> as_matrix((4, 3, 2)), as_matrix((5,)), as_matrix(())
        ((12, 2), (1, 5), (1, 1))
    """
    if not shape:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


def rows_step(columns: int, block_size: int) -> int:
    """Fewest rows that make whole blocks.

    Args:
        columns: of the matrix.
        block_size: of the quantization.

    Returns:
        The number of rows.

    Example:
        >>> rows_step(96, 64), rows_step(128, 64)
        (2, 1)
    """
    return block_size // math.gcd(columns, block_size)


def chunks(rows: Rows, step: int = 1) -> Iterator[Tensor]:
    """Read a weight from the first row to the last.

    Args:
        rows: the weight.
        step: chunks start at multiples of it.

    Yields:
        Consecutive chunks, float32 (rows, columns).

    Example:
        >>> [chunk.shape[0] for chunk in chunks(InMemory(torch.ones(3, 2)))]
        [3]
    """
    count, columns = rows.shape
    size = max(1, CHUNK_WEIGHTS // max(1, columns * step)) * step
    for start in range(0, count, size):
        yield rows.read(start, min(start + size, count))


@dataclass(frozen=True)
class InMemory:
    """A matrix that is in memory anyway.

    Example:
        >>> InMemory(torch.ones(3, 2)).read(1, 2)
        tensor([[1., 1.]])
    """

    matrix: Tensor
    """(rows, columns), any float dtype."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return as_matrix(self.matrix.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop in float32."""
        return self.matrix.reshape(self.shape)[start:stop].float()


@dataclass(frozen=True)
class Stored:
    """A float tensor of a checkpoint, read from its file by rows."""

    source: Source
    name: str
    device: torch.device
    seen_as: torch.dtype | None = None
    """Dtype the model had cast it to; None: as stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return as_matrix(self.source.tensors[self.name].shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop in float32, rounded to the dtype the model saw."""
        info = replace(self.source.tensors[self.name], shape=self.shape)
        values = read_tensor(self.source.folder, info, start, stop).to(self.device)
        if self.seen_as is not None:
            values = values.to(self.seen_as)
        return values.float()


@dataclass(frozen=True)
class Decoded:
    """An NF4 weight, decoded by rows."""

    packed: Tensor
    """Its codes, uint8."""
    scales: Tensor
    """(blocks,) float32, decoded."""
    shape: tuple[int, int]
    block_size: int
    dtype: torch.dtype
    """Dtype the model computes in: decoded values are rounded to it."""

    @classmethod
    def of(cls, weight: NF4Weight, dtype: torch.dtype) -> "Decoded":
        """View an NF4 weight.

        Args:
            weight: any shape.
            dtype: the model computes in.

        Returns:
            Its rows.
        """
        shape = as_matrix(weight.shape)
        return cls(weight.packed.view(-1), weight.scales(), shape, weight.block_size, dtype)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop in float32; start is a multiple of `rows_step`."""
        columns = self.shape[1]
        first, last = start * columns, stop * columns
        assert first % self.block_size == 0, (self.shape, start)
        return dequantize_nf4(
            self.packed[first // 2 : (last + 1) // 2],
            self.scales[first // self.block_size : -(-last // self.block_size)],
            (stop - start, columns),
            block_size=self.block_size,
            dtype=self.dtype,
        ).float()


@dataclass(frozen=True)
class Requantized:
    """Rows quantized and decoded again as they pass, with scales that were decided before.

    For members of a stack, whose scales are double-quantized together.
    """

    rows: Rows
    scales: Tensor
    """(blocks,) float32 of this member alone, decoded."""
    config: QuantConfig
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.shape

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop in float32; start is a multiple of `rows_step`."""
        values = self.rows.read(start, stop)
        packed, _ = nf4_quantize(values, block_size=self.config.block_size)
        first = start * self.shape[1] // self.config.block_size
        last = -(-stop * self.shape[1] // self.config.block_size)
        return dequantize_nf4(
            packed,
            self.scales[first:last],
            tuple(values.shape),
            block_size=self.config.block_size,
            dtype=self.dtype,
        ).float()


def quantize_chunks(rows: Rows, config: QuantConfig, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Quantize a weight from the first row to the last.

    Args:
        rows: the weight.
        config: how it is stored.
        name: what to call it in an error.

    Yields:
        packed: (bytes, 1) uint8 of one chunk.
        absmax: (blocks,) float32 of one chunk.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.
    """
    for values in chunks(rows, rows_step(rows.shape[1], config.block_size)):
        packed, absmax = nf4_quantize(values, block_size=config.block_size)
        if not torch.isfinite(absmax).all():
            raise NonFiniteError(
                f"{name} holds NaN or infinite values and cannot be quantized. Repair the "
                "checkpoint, or merge into the original weights."
            )
        yield packed, absmax


def nf4_weight(
    members: Sequence[Rows],
    config: QuantConfig,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
) -> NF4Weight:
    """Quantize one weight, given as one matrix or as several one above the other.

    The result equals quantizing the whole: chunks and members are whole blocks.

    Args:
        members: the matrices, in order; all but the last of whole blocks.
        config: how to store them.
        shape: of the weight; as many elements as the members have.
        dtype: to record as the one it was made from.
        name: what to call the weight in an error.

    Returns:
        The weight; peak memory is its codes twice and a chunk.

    Raises:
        NonFiniteError: the weight holds NaN or infinity.

    Example:
        >>> rows = InMemory(torch.ones(2, 64))
        >>> options = {"shape": (2, 64), "dtype": torch.float32, "name": "w"}
        >>> nf4_weight([rows], QuantConfig(), **options).dequantize().unique()
        tensor([1.])
    """
    parts = [part for rows in members for part in quantize_chunks(rows, config, name)]
    absmax, nested, offset = torch.cat([scale for _, scale in parts]), None, None
    if config.double_quant:
        absmax, nested, offset = nf4_quantize_absmax(absmax)
    return NF4Weight(
        packed=torch.cat([packed for packed, _ in parts]),
        absmax=absmax,
        nested_absmax=nested,
        offset=offset,
        shape=shape,
        block_size=config.block_size,
        dtype=dtype,
    )


def quantized_stack(
    members: Sequence[Rows], config: QuantConfig, dtype: torch.dtype, name: str
) -> list[Requantized]:
    """Quantize matrices that are one stacked parameter of the model.

    Args:
        members: in stacked order; each of whole blocks.
        config: how the stack was stored.
        dtype: the model computes in.
        name: what to call it in an error.

    Returns:
        One per member. Scales are held; codes are computed again while reading.

    Raises:
        NonFiniteError: a member holds NaN or infinity.
    """
    absmax = [
        torch.cat([scale for _, scale in quantize_chunks(member, config, name)])
        for member in members
    ]
    scales = decoded_scales(torch.cat(absmax), config).split([part.numel() for part in absmax])
    return [
        Requantized(member, part, config, dtype)
        for member, part in zip(members, scales, strict=True)
    ]


def decoded_scales(absmax: Tensor, config: QuantConfig) -> Tensor:
    """Scales as they are after storage.

    Args:
        absmax: (blocks,) float32.
        config: whether they are double-quantized.

    Returns:
        (blocks,) float32.

    Example:
        >>> decoded_scales(torch.tensor([1.0, 3.0]), QuantConfig(double_quant=False))
        tensor([1., 3.])
    """
    return dequantize_absmax(*nf4_quantize_absmax(absmax)) if config.double_quant else absmax


@dataclass(frozen=True)
class Merged:
    """A weight with a low-rank change added: V = W + s·B·A, or DoRA's m ⊙ V/‖V‖."""

    rows: Rows
    pair: LowRank
    """A, B and s."""
    transposed: bool
    """Whether rows are inputs, as in GPT-2's Conv1D."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.shape

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop in float32."""
        turned = self._turned(start, stop)
        if self.pair.magnitude is None:
            return turned
        wanted = self.pair.magnitude.to(turned.device, torch.float32)
        if self.transposed:
            return turned.mul_(wanted / self._column_lengths)
        lengths = torch.linalg.vector_norm(turned, dim=1).clamp_(min=_SHORTEST)
        return turned.mul_((wanted[start:stop] / lengths)[:, None])

    @cached_property
    def _column_lengths(self) -> Tensor:
        """Of V where outputs are columns: one pass over the weight before it is read."""
        count, columns = self.shape
        step = max(1, CHUNK_WEIGHTS // columns)
        squares: Tensor | None = None
        for start in range(0, count, step):
            part = self._turned(start, min(start + step, count)).square().sum(0)
            squares = part if squares is None else squares + part
        assert squares is not None
        return squares.sqrt().clamp(min=_SHORTEST)

    def _turned(self, start: int, stop: int) -> Tensor:
        values = self.rows.read(start, stop)
        if self.transposed:
            left, right = self.pair.a[:, start:stop].T, self.pair.b.T
        else:
            left, right = self.pair.b[start:stop], self.pair.a
        left, right = (factor.to(values.device, torch.float32) for factor in (left, right))
        return torch.addmm(values, left, right, alpha=self.pair.scale)
