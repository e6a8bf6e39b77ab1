"""What is planned: everything about a run that its memory and speed depend on."""

import os
from dataclasses import dataclass, field, replace

import torch

from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.registry import OTHERS, make_adapter_config
from qlora_kit.block.tiles import Tile
from qlora_kit.core.allocator import NAMES, segments_grow
from qlora_kit.core.errors import ConfigError
from qlora_kit.quant.config import QuantConfig

FULL = "full"
"""Method of training every weight, for comparison."""
PREFIX = "prefix_tuning"
"""Method whose masks are always made."""


def will_grow() -> bool:
    """Whether torch's segments grow in a run from here; see `core/allocator.py`.

    Returns:
        False where the user set the allocator otherwise, or where CUDA has started without.

    Example:
        >>> will_grow() in (True, False)
        True
    """
    fixed = torch.cuda.is_initialized() or any(name in os.environ for name in NAMES)
    return segments_grow() or not fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One run on one GPU.

    Example:
        >>> Setup(rank=8).lora.rank, Setup(method="full", bits=16).adapter
        (8, None)
        >>> Setup(method="bottleneck").adapter.kind
        'houlsby'
    """

    method: str = "lora"
    """Of `adapters.registry.METHODS` or `OTHERS`; with `full` every weight is trained."""
    bits: int = 4
    """4: the base in NF4; 16: as it is."""
    rank: int = 16
    """Of the adapter, unless `shape` says more."""
    targets: str | tuple[str, ...] = "all-linear"
    """Likewise, which linears it is on."""
    shape: LoRA | None = None
    """All of the adapter's settings; None for `rank` and `targets` alone."""
    own: Method | RankBudget | None = None
    """Settings of a method unlike LoRA, or AdaLoRA's budget; None for their defaults."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """How the base is stored in 4 bits."""
    batch: int = 1
    """Rows of a forward pass."""
    seq: int = 2048
    """Tokens of a row."""
    activations: str = "recompute_elementwise"
    """What layers keep for the backward; see `block/policy.py`."""
    keep_decoded: int = 0
    """Layers, from the first on, whose weights stay decoded; with fused layers and 4 bits, and
    not with DoRA, whose rows have other factors in every step."""
    tile: Tile = "auto"
    """Tokens at a time where each is alone; see `block/tiles.py`."""
    embeddings_on_host: bool = False
    """Whether input embeddings stay in host memory."""
    optimizer: str = "adamw_8bit"
    """A Transformers name."""
    step: str = "fused"
    """`fused`, or `eager` for the model's own code; `fused` where a model's layers cannot be
    is planned as `eager`."""
    graph: bool = True
    """Whether small batches of fused layers run as a CUDA graph."""
    varied: bool = False
    """Whether batches differ in shape, so that some run beside what others were recorded in."""
    dtype: str = "bfloat16"
    """The model computes in."""
    mixed: bool = True
    """With `full`: float32 masters under autocast, as is usual; False: all in 16 bits."""
    accumulation: int = 1
    """Forward passes per update."""
    target_share: float = 1.0
    """Share of the tokens that are predicted."""
    growing_segments: bool = field(default_factory=will_grow)
    """Whether torch's segments grow, so that fragments are few."""

    @property
    def tokens(self) -> int:
        """Of a forward pass."""
        return self.batch * self.seq

    @property
    def adapter(self) -> Method | None:
        """What is put on the model; None with `full`."""
        if self.method == FULL:
            return None
        fields = self.shape or LoRA(rank=self.rank, targets=self.targets)
        others = () if self.own is None else (self.own,)
        made: Method = make_adapter_config(self.method, fields, *others)
        return made

    @property
    def lora(self) -> LoRA | None:
        """The adapter of a method with LoRA's settings, a rank among them; None with others."""
        made = None if self.method in OTHERS else self.adapter
        return made if isinstance(made, LoRA) else None

    def __post_init__(self) -> None:
        """Refuse what no run can be.

        Raises:
            ConfigError: a number is not positive, or 4-bit weights would be trained.
        """
        if self.batch < 1 or self.seq < 1:
            raise ConfigError(f"a plan needs batch and seq above 0, got {self.batch}, {self.seq}.")
        if self.method == FULL and self.bits == 4:
            raise ConfigError("full fine-tuning trains 16-bit weights; set bits to 16.")

    def with_tokens(self, *, batch: int | None = None, seq: int | None = None) -> "Setup":
        """The same run with other sizes.

        Args:
            batch: rows, or None for the same.
            seq: tokens of a row, or None for the same.

        Returns:
            A new setup.

        Example:
            >>> Setup(batch=2).with_tokens(seq=512).tokens
            1024
        """
        return replace(self, batch=batch or self.batch, seq=seq or self.seq)
