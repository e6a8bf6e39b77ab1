"""How frozen base weights are stored: the one description, free of torch."""

from dataclasses import dataclass, replace

from qlora_kit.core.errors import ConfigError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

HEAD = "lm_head"
"""What the output head is called in the models that have one of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """How frozen base weights are stored. Defaults: arXiv:2305.14314, section 3.

    Example:
        >>> round(QuantConfig().bits_per_weight, 3)
        4.127
    """

    block_size: int = 64
    """Weights that share one scale. Smaller is more accurate and larger."""
    double_quant: bool = True
    """Store the scales in 8 bits, in groups of 256."""
    skip: tuple[str, ...] = (HEAD,)
    """Modules left in the compute dtype: name endings, or `re:` and a regular expression."""
    target: tuple[str, ...] = ()
    """Modules to quantize, in the same notation. Empty: every linear layer."""

    def __post_init__(self) -> None:
        """Refuse values no kernel and no peer understands.

        Raises:
            ConfigError: block_size is not a supported power of two.
        """
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}. "
                "64 is the published default."
            )

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight in bits, scales included."""
        scale_bits = 8 + 32 / 256 if self.double_quant else 32
        return 4 + scale_bits / self.block_size

    def with_head(self) -> "QuantConfig":
        """The same, with the output head in NF4 as well.

        Returns:
            A configuration whose `target` names every linear layer, unless this one names some,
            and the head.

        Example:
            >>> QuantConfig().with_head().skip, QuantConfig(target=("mlp",)).with_head().target
            ((), ('mlp', 'lm_head'))
        """
        skip = tuple(pattern for pattern in self.skip if pattern != HEAD)
        return replace(self, skip=skip, target=(*self.target, HEAD) if self.target else ("re:.*",))
