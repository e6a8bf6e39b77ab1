"""Settings of LoRA, LoRA-FA and DoRA; free of torch."""

from dataclasses import dataclass, field
from typing import TypeVar

from qlora_kit.adapters.method import ALL_LINEAR
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.patterns import matches

INITS = ("kaiming", "gaussian", "pissa", "loftq")
"""How A and B may start: uniform A with a = √5 (the reference code), normal A (the paper), from
the weight's leading singular directions, from the error of its quantization."""


T = TypeVar("T")


def _first_match(name: str, patterns: dict[str, T], default: T) -> T:
    return next((value for pattern, value in patterns.items() if matches(name, pattern)), default)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Low-rank adaptation, ΔW = s·B·A (arXiv:2106.09685); s = alpha/rank.

    Example:
        >>> LoRA(rank=8, alpha=16).scale(8, 16)
        2.0
    """

    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 32.0
    """Numerator of the scale; twice the rank by default."""
    dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """`all-linear` (every linear of the blocks, not the head), name endings, or `re:` patterns."""
    layers_to_transform: tuple[int, ...] = ()
    """Numbers of the blocks to adapt, from 0; empty: all. Embeddings and heads are not in any."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Pattern to rank, for modules that differ from `rank`; the first match counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Pattern to alpha, for modules that differ from `alpha`; the first match counts."""
    train_modules: tuple[str, ...] = ()
    """Modules trained and saved whole, in the same notation; a classifier's head always is."""
    rslora: bool = False
    """Scale by alpha/√rank (arXiv:2312.03732) instead of alpha/rank."""
    slices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Pattern of a fused linear to the slices to adapt, each with its own A: `c_attn: [q, v]`."""
    init: str = "kaiming"
    """How A starts: `kaiming`, `gaussian`, or with B from the weight: `pissa`, `loftq`."""
    dtype: str = "float32"
    """Dtype of the trained A and B; the low-rank product runs in the dtype of x."""
    lr_ratio_b: float = 1.0
    """LoRA+ (arXiv:2402.12354): B learns at this multiple of A's rate; the paper proposes 16."""
    corrected_gradient: bool = False
    """LoRA-FA only: train B along g·(AAᵀ)⁻¹/s², which moves the weight as its gradient would."""

    @property
    def freeze_a(self) -> bool:
        """Whether A keeps its random start and only B is trained."""
        return False

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: a field is out of range.
        """
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}.")
        for pattern, rank in self.rank_pattern.items():
            if rank < 1:
                raise ConfigError(f"rank_pattern[{pattern!r}] must be at least 1, got {rank}.")
        if any(index < 0 for index in self.layers_to_transform):
            raise ConfigError(
                f"layers_to_transform counts from 0, got {min(self.layers_to_transform)}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}.")
        if self.lr_ratio_b <= 0 or (self.freeze_a and self.lr_ratio_b != 1.0):
            raise ConfigError(
                f"lr_ratio_b must be positive, and 1 where A is frozen, got {self.lr_ratio_b}."
            )
        if self.init not in INITS:
            raise ConfigError(f"init must be one of {', '.join(INITS)}, got {self.init!r}.")
        self._check_variant()
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}.")

    def _check_variant(self) -> None:
        """Starts from the weight, and slices, are for plain LoRA, and not for one module both."""
        spectral = self.init in ("pissa", "loftq")
        if (spectral or self.slices) and type(self) is not LoRA:
            what = f"init {self.init}" if spectral else "slices"
            raise ConfigError(f"{what} is for the methods lora and rslora alone.")
        if spectral and self.slices:
            raise ConfigError(f"slices start at random: init {self.init} is not for them.")

    def slices_of(self, module_name: str) -> tuple[str, ...]:
        """Slices of one fused module to adapt; empty: all of it, as one."""
        return _first_match(module_name, self.slices, ())

    def scale(self, rank: int, alpha: float) -> float:
        """Factor on B·A for one module, after its patterns were applied."""
        return alpha / rank**0.5 if self.rslora else alpha / rank

    def rank_of(self, module_name: str) -> int:
        """Rank of one module: the first entry of `rank_pattern` that matches, else `rank`."""
        return _first_match(module_name, self.rank_pattern, self.rank)

    def alpha_of(self, module_name: str) -> float:
        """Alpha of one module: the first entry of `alpha_pattern` that matches, else `alpha`."""
        return _first_match(module_name, self.alpha_pattern, self.alpha)

    def scale_of(self, module_name: str) -> float:
        """Factor on B·A for one module.

        Args:
            module_name: its dotted name.

        Returns:
            s, of its own rank and alpha.

        Example:
            >>> LoRA(rank=8, alpha=16, alpha_pattern={"v_proj": 4}).scale_of("layers.0.v_proj")
            0.5
        """
        return self.scale(self.rank_of(module_name), self.alpha_of(module_name))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA with A frozen at its random start (arXiv:2308.03303): only X·Aᵀ is kept for B."""

    @property
    def freeze_a(self) -> bool:
        """Whether A keeps its random start and only B is trained."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class DoRA(LoRA):
    """LoRA on the direction of each weight row, its length trained apart (arXiv:2402.09353)."""
