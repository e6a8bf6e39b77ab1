"""Settings of bottleneck adapters; free of torch."""

from dataclasses import dataclass
from typing import Literal

from qlora_kit.core.errors import ConfigError

Kind = Literal["houlsby", "pfeiffer", "lin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """A narrow network in sequence with the sublayers (arXiv:1902.00751, 2005.00247).

    Example:
        >>> Bottleneck(reduction=16).width_of(1024), Bottleneck(width=8).width_of(1024)
        (64, 8)
    """

    kind: Kind = "houlsby"
    """Two per layer (houlsby), one after the feed-forward (pfeiffer), one with a norm (lin)."""
    width: int | None = None
    """Units of the bottleneck; null: the model's width over `reduction`."""
    reduction: int = 16
    """The model's width over the bottleneck's."""
    activation: Literal["auto", "relu", "gelu", "silu", "tanh"] = "auto"
    """Between the two projections; `auto`: gelu for houlsby, relu for the others."""
    norms: Literal["auto", "train", "freeze"] = "auto"
    """The model's own norms; `auto`: trained with houlsby, frozen with the others."""
    init: Literal["normal", "zero"] = "normal"
    """`normal`: nearly the identity, N(0, 0.01²) cut at 2σ; `zero`: W_u = 0, exactly the base."""
    drop_layers: int = 0
    """AdapterDrop (arXiv:2010.11918): the first layers, so many, have no adapter."""
    drop_random: int = 0
    """AdapterDrop: in training the first 0 to so many layers skip theirs, drawn for each batch."""
    after_attention: tuple[str, ...] = ()
    """Name endings of attention's last linear; empty: the usual names."""
    after_feedforward: tuple[str, ...] = ()
    """Name endings of the feed-forward's last linear; empty: the usual names."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of what is trained; products run in the dtype of the hidden states."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: a field is out of range.
        """
        if self.kind not in ("houlsby", "pfeiffer", "lin"):
            raise ConfigError(f"unknown bottleneck {self.kind!r}; known: houlsby, pfeiffer, lin.")
        if self.width is not None and self.width < 1:
            raise ConfigError(f"bottleneck.width must be at least 1, got {self.width}.")
        if self.reduction < 1:
            raise ConfigError(f"bottleneck.reduction must be at least 1, got {self.reduction}.")
        if self.drop_layers < 0 or self.drop_random < 0:
            raise ConfigError(
                "bottleneck.drop_layers and drop_random count layers and cannot be negative, got "
                f"{self.drop_layers} and {self.drop_random}."
            )

    def width_of(self, features: int) -> int:
        """Units of the bottleneck beside a sublayer of so many features."""
        return self.width if self.width is not None else max(1, features // self.reduction)

    @property
    def trains_norms(self) -> bool:
        """Whether the model's own norms are trained."""
        return self.norms == "train" or (self.norms == "auto" and self.kind == "houlsby")
