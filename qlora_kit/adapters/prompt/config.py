"""Settings of prefix-tuning and prompt-tuning; free of torch."""

from dataclasses import dataclass
from typing import Literal

from qlora_kit.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTuning:
    """Keys and values of every layer at positions that have no token (arXiv:2101.00190).

    Example:
        >>> PrefixTuning().length
        10
    """

    length: int = 10
    """Positions, l."""
    hidden: int | None = 512
    """Units of the MLP that makes them while training, dropped after it; null: none."""
    place: Literal["prefix", "infix"] = "prefix"
    """Before the prompt, or between the prompt and the answer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of what is trained."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: a field is out of range.
        """
        if self.length < 1 or (self.hidden is not None and self.hidden < 1):
            raise ConfigError(
                f"prefix_tuning.length and hidden must be at least 1, got {self.length} and "
                f"{self.hidden}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTuning:
    """Embeddings of positions that have no token (arXiv:2104.08691), or their states in all layers.

    Example:
        >>> PromptTuning().layers
        'embedding'
    """

    length: int = 10
    """Positions, l."""
    layers: Literal["embedding", "all"] = "embedding"
    """`embedding`: PreEmbed, what enters the first block; `all`: PreLayer, what enters each."""
    place: Literal["prefix", "infix"] = "prefix"
    """Before the prompt, or between the prompt and the answer."""
    init: Literal["vocabulary", "normal"] = "vocabulary"
    """Start from embeddings of tokens drawn at random, or from N(0, 0.02²)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of what is trained."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: the length is not positive.
        """
        if self.length < 1:
            raise ConfigError(f"prompt_tuning.length must be at least 1, got {self.length}.")
