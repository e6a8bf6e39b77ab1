"""Settings of AdaLoRA, and how its ranks fall from their start to their target; free of torch.

With t the update, b₀ the sum of all start ranks and b_T that of all target ranks, the
number of singular values that may be other than zero is

    b₀                                              t ≤ t_i
    b_T + (b₀ − b_T)·(1 − (t − t_i)/(T − t_i − t_f))³   t_i < t ≤ T − t_f
    b_T                                             afterwards

rounded down. Source: arXiv:2303.10512, Eq. 12 and Appendix A.
"""

from dataclasses import dataclass, field

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import ConfigError

ORTHOGONALITY_FORMS = ("code", "paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBudget:
    """How AdaLoRA distributes ranks over matrices while it trains (arXiv:2303.10512).

    Example:
        >>> budget = RankBudget(start_updates=10, final_updates=20)
        >>> [budget.at(t, 120, 100, 110) for t in (10, 11, 55, 90, 110)]
        [120, 119, 101, 100, 100]
    """

    target_rank: int | None = None
    """Average rank at the end; null: two thirds of the start rank, `adapter.rank`."""
    start_updates: int | None = None
    """Updates before ranks begin to fall, t_i; null: a tenth of the run."""
    final_updates: int | None = None
    """Updates at the end with ranks that stay, t_f; null: half of the run."""
    every: int = 100
    """Updates between two distributions of the budget, ΔT."""
    beta1: float = 0.85
    """Smoothing of the sensitivity |w·∇w|."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    orthogonality: float = 0.1
    """γ, weight of the term in the loss that keeps P and Q orthogonal; 0 for none."""
    orthogonality_form: str = "code"
    """`code`: mean of ‖PᵀP − I‖ as the authors' code has it; `paper`: sum of squares, as Eq. 4."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: a field is out of range.
        """
        for name in ("target_rank", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        for name in ("start_updates", "final_updates"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be at least 0 or null, got {value}.")
        if not (0.0 < self.beta1 < 1.0 and 0.0 < self.beta2 < 1.0):
            raise ConfigError(
                f"beta1 and beta2 must be between 0 and 1, got {self.beta1} and {self.beta2}."
            )
        if self.orthogonality < 0.0:
            raise ConfigError(f"orthogonality must be at least 0, got {self.orthogonality}.")
        if self.orthogonality_form not in ORTHOGONALITY_FORMS:
            raise ConfigError(
                f"orthogonality_form must be one of {', '.join(ORTHOGONALITY_FORMS)}, got "
                f"{self.orthogonality_form!r}."
            )

    def phases(self, updates: int) -> tuple[int, int]:
        """Where ranks begin to fall and where they are final.

        Args:
            updates: of the whole run, T.

        Returns:
            (t_i, T − t_f), both counted in updates.

        Raises:
            ConfigError: nothing is left between them.

        Example:
            >>> RankBudget().phases(100)
            (10, 50)
        """
        start = updates // 10 if self.start_updates is None else self.start_updates
        final = updates // 2 if self.final_updates is None else self.final_updates
        if start >= updates - final:
            raise ConfigError(
                f"adalora needs updates in which ranks can fall: start_updates {start} and "
                f"final_updates {final} leave none of the run's {updates}. Lower one of them, or "
                "train longer."
            )
        return start, updates - final

    def at(self, update: int, whole: int, target: int, updates: int) -> int:
        """How many singular values may be other than zero after an update.

        Args:
            update: t, from 1.
            whole: b₀.
            target: b_T.
            updates: of the whole run, T.

        Returns:
            b(t), rounded down.

        Example:
            >>> RankBudget(start_updates=0, final_updates=0).at(5, 16, 8, 10)
            9
        """
        start, end = self.phases(updates)
        if update <= start:
            return whole
        if update >= end:
            return target
        left = 1.0 - (update - start) / (end - start)
        return target + int((whole - target) * left**3)

    def distributes(self, update: int, updates: int) -> bool:
        """Whether the budget is distributed anew after an update.

        Args:
            update: t, from 1.
            updates: of the whole run, T.

        Returns:
            True every `every` updates while ranks fall, and where they become final.

        Example:
            >>> budget = RankBudget(every=3, start_updates=2, final_updates=2)
            >>> [t for t in range(1, 11) if budget.distributes(t, 10)]
            [3, 6, 8]
        """
        start, end = self.phases(updates)
        return update == end or (start < update < end and update % self.every == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoRA(LoRA):
    """LoRA as P·Λ·Q whose ranks are distributed over matrices in training (arXiv:2303.10512).

    `rank` is every matrix's start rank; `init` is not used: P and Q start from N(0, 0.02²).

    Example:
        >>> AdaLoRA().rank, AdaLoRA().target_rank
        (12, 8)
    """

    rank: int = 12
    """Rank of every matrix at the start, r₀."""
    budget: RankBudget = field(default_factory=RankBudget)
    """How ranks fall from there."""

    @property
    def target_rank(self) -> int:
        """Average rank at the end: what `budget` says, or two thirds of `rank`."""
        named = self.budget.target_rank
        return max(1, 2 * self.rank // 3) if named is None else named

    def __post_init__(self) -> None:
        """Refuse values that cannot train.

        Raises:
            ConfigError: a field is out of range, or is not AdaLoRA's.
        """
        LoRA.__post_init__(self)
        if self.target_rank > self.rank:
            raise ConfigError(
                f"adalora's ranks fall from rank to target_rank: got {self.rank} and "
                f"{self.target_rank}. Raise adapter.rank (about 1.5 times adalora.target_rank)."
            )
        foreign = [n for n in ("rslora", "rank_pattern", "alpha_pattern") if getattr(self, n)]
        if foreign:
            raise ConfigError(
                f"adalora gives every matrix the same start rank and scale: {foreign[0]} is not "
                "for it. Leave it out; ranks differ by importance later."
            )
