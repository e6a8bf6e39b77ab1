"""One NF4 weight: packed codes, scales, and what they stand for.

`NF4Weight` is a plain record of plain tensors. It is no tensor subclass: modules
hold the same bytes as ordinary uint8 parameters and hand this view of them to
the ops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qlora_kit.core.errors import NonFiniteError, ShapeError
from qlora_kit.quant.double_quant import GROUP_SIZE, dequantize_absmax, quantize_absmax
from qlora_kit.quant.nf4 import dequantize_nf4, quantize_nf4


@dataclass(frozen=True, slots=True)
class Codec:
    """What codes a weight and its scales: the definition, or whatever gives its bits faster."""

    quantize: Callable[..., tuple[Tensor, Tensor]] = quantize_nf4
    """As `quantize_nf4`."""
    quantize_absmax: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = quantize_absmax
    """As `quantize_absmax`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NF4Weight:
    """A weight in 4-bit NormalFloat with optional double quantization.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(64, 64))
        >>> weight.dequantize().shape, weight.nbytes
        (torch.Size([64, 64]), 2120)
    """

    packed: Tensor
    """(ceil(n/2), 1) uint8; weight 2i is the high nibble of byte i."""
    absmax: Tensor
    """(blocks,) uint8 codes when double-quantized, else float32 scales."""
    nested_absmax: Tensor | None
    """(ceil(blocks/256),) float32, or None without double quantization."""
    offset: Tensor | None
    """() float32, or None without double quantization."""
    shape: tuple[int, ...]
    """(N, K), or (E, N, K) for stacked experts."""
    block_size: int
    """Weights that share one scale, along the row-major flattened weight."""
    dtype: torch.dtype
    """Of the weight it was made from; `dequantize` returns it by default."""

    def __post_init__(self) -> None:
        """Refuse tensors that cannot belong together.

        Raises:
            ShapeError: a tensor's size or dtype does not fit the shape.
        """
        count = prod(self.shape)
        blocks = -(-count // self.block_size)
        nested = self.nested_absmax is not None
        wanted: list[tuple[str, Tensor | None, int, torch.dtype]] = [
            ("packed", self.packed, (count + 1) // 2, torch.uint8),
            ("absmax", self.absmax, blocks, torch.uint8 if nested else torch.float32),
        ]
        if nested or self.offset is not None:
            groups = -(-blocks // GROUP_SIZE)
            wanted.append(("nested_absmax", self.nested_absmax, groups, torch.float32))
            wanted.append(("offset", self.offset, 1, torch.float32))
        for name, tensor, numel, dtype in wanted:
            if tensor is None or tensor.numel() != numel or tensor.dtype != dtype:
                came = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ShapeError(
                    f"an NF4 weight of shape {self.shape} in blocks of {self.block_size} needs "
                    f"{name} with {numel} elements of {dtype}, got {came}."
                )

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        name: str = "weight",
        codec: Codec = Codec(),
        watch: Callable[[Tensor], None] | None = None,
    ) -> "NF4Weight":
        """Quantize a weight; `ops.nf4_quantize.op.quantize_weight` does it faster on a GPU.

        Args:
            weight: (N, K) or (E, N, K), float32 / float16 / bfloat16. Not modified.
            block_size: weights that share one scale.
            double_quant: store the scales in 8 bits.
            name: what to call the weight in an error.
            codec: what computes the codes.
            watch: gets the blocks' scales, (blocks,) float32, instead of their being
                checked here: the check waits for a GPU, and who quantizes many weights
                can ask for all of them once.

        Returns:
            The quantized weight, on the same device.

        Raises:
            NonFiniteError: the weight holds NaN or infinity, and nobody watches.
            ShapeError: the weight is empty or not a float.

        Source: arXiv:2305.14314, section 3.
        """
        packed, absmax = codec.quantize(weight, block_size=block_size)
        # A NaN or infinity in a block shows in its largest magnitude.
        if watch is not None:
            watch(absmax)
        elif not torch.isfinite(absmax).all():
            bad = int((~torch.isfinite(weight.reshape(-1))).sum())
            raise NonFiniteError(
                f"{name} holds {bad} NaN or infinite values of {weight.numel()} and cannot be "
                "quantized. Repair the checkpoint, or leave this module in 16 bits with "
                "QuantConfig(skip=...)."
            )
        nested_absmax = offset = None
        if double_quant:
            absmax, nested_absmax, offset = codec.quantize_absmax(absmax)
        return cls(
            packed=packed,
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=offset,
            shape=tuple(weight.shape),
            block_size=block_size,
            dtype=weight.dtype,
        )

    def scales(self) -> Tensor:
        """The blocks' scales.

        Returns:
            (blocks,) float32.
        """
        if self.nested_absmax is None:
            return self.absmax
        assert self.offset is not None
        return dequantize_absmax(self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode: dtype(float32 value × float32 scale), rounded once.

        Args:
            dtype: of the result; None for the dtype it was made from.

        Returns:
            The weight, of `shape`, contiguous.
        """
        return dequantize_nf4(
            self.packed,
            self.scales(),
            self.shape,
            block_size=self.block_size,
            dtype=dtype or self.dtype,
        )

    def select(self, expert: int) -> "NF4Weight":
        """One expert of a stack, without copying its codes.

        Args:
            expert: index into the first of three dimensions.

        Returns:
            The expert's (N, K) weight, sharing this one's storage. Where a group of
            256 scales runs across experts, its scales are decoded to float32 instead.

        Raises:
            ShapeError: the weight is not a stack, or an expert does not start at a block.
        """
        if len(self.shape) != 3:
            raise ShapeError(f"select needs stacked experts (E, N, K), got shape {self.shape}.")
        size = self.shape[1] * self.shape[2]
        if size % self.block_size or size % 2:
            raise ShapeError(
                f"select needs experts of whole blocks: {self.shape[1]} x {self.shape[2]} weights "
                f"are not a multiple of block_size {self.block_size}."
            )
        blocks = size // self.block_size
        absmax, nested, offset = self.absmax, self.nested_absmax, self.offset
        if nested is not None and blocks % GROUP_SIZE == 0:
            groups = blocks // GROUP_SIZE
            nested = nested[expert * groups : (expert + 1) * groups]
        else:
            absmax, nested, offset = self.scales(), None, None
        return NF4Weight(
            packed=self.packed[expert * size // 2 : (expert + 1) * size // 2],
            absmax=absmax[expert * blocks : (expert + 1) * blocks],
            nested_absmax=nested,
            offset=offset,
            shape=self.shape[1:],
            block_size=self.block_size,
            dtype=self.dtype,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors present, by field name."""
        named = {
            "packed": self.packed,
            "absmax": self.absmax,
            "nested_absmax": self.nested_absmax,
            "offset": self.offset,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on another device.

        Args:
            device: where to.

        Returns:
            A weight whose tensors all live on `device`.
        """
        nested = self.nested_absmax
        offset = self.offset
        return NF4Weight(
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=None if nested is None else nested.to(device),
            offset=None if offset is None else offset.to(device),
            shape=self.shape,
            block_size=self.block_size,
            dtype=self.dtype,
        )

    @property
    def nbytes(self) -> int:
        """Storage of all its tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())
