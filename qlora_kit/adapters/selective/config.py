"""Settings of BitFit, top-k and full fine-tuning; free of torch."""

from dataclasses import dataclass
from typing import Literal

from qlora_kit.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BitFit:
    """Only biases are trained, those of layer norms among them (arXiv:2106.10199).

    Example:
        >>> BitFit().add_biases
        'auto'
    """

    add_biases: Literal["auto", "always", "never"] = "auto"
    """Give linears of the blocks that have no bias a zero one; `auto`: if the model has none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the trained biases; each is rounded to that of its module as it is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The last blocks and the final norm are trained, the rest is frozen.

    Example:
        >>> TopK().blocks
        2
    """

    blocks: int = 2
    """How many of the last blocks."""
    final_norm: bool = True
    """Train the norm after them as well."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the trained weights; a 4-bit weight is decoded to it."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: no block is left to train.
        """
        if self.blocks < 1:
            raise ConfigError(f"top_k.blocks must be at least 1, got {self.blocks}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """All weights are trained, on a base that is not quantized.

    Example:
        >>> Full().dtype
        'float32'
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """`float32`: masters, computing under autocast, 16 bytes each with AdamW; `bfloat16`: 8."""
