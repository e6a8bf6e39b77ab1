"""Whether the weights that were quantized were numbers, asked of the GPU once.

A NaN or an infinity shows in the scale of its block. To look at it the host has to
wait for the GPU; after every weight, neither would ever work while the other does.
So the broken blocks are counted where the scales are, and the counts are read when
everything is loaded.
"""

from collections.abc import Callable

from torch import Tensor

from qlora_kit.core.errors import NonFiniteError
from qlora_kit.load.report import shorten


class FiniteCheck:
    """Collects the scales' verdicts of many weights.

    Example:
        >>> import torch
        >>> check = FiniteCheck()
        >>> check.watch("up_proj.weight")(torch.tensor([1.0, float("inf")]))
        >>> print(str(check.error())[:45])
        up_proj.weight (1 of 2 blocks): NaN or infini
    """

    def __init__(self) -> None:
        """Start with no weights."""
        self._seen: list[tuple[str, Tensor, int]] = []

    def watch(self, name: str, experts: int = 1) -> Callable[[Tensor], None]:
        """What to hand to `quantize_weight` or `quantize_stack`.

        Args:
            name: of the weight.
            experts: how many are stacked in it.

        Returns:
            A function of the blocks' scales, (experts * blocks,) float32. It does not
            wait for a GPU.
        """

        def note(absmax: Tensor) -> None:
            broken = absmax.isfinite().logical_not_().view(experts, -1).sum(1)
            self._seen.append((name, broken, absmax.numel()))

        return note

    def error(self) -> NonFiniteError | None:
        """The error for the weights that were not finite, if there are any; waits for the GPU."""
        found = []
        for name, broken, blocks in self._seen:
            counts = broken.tolist()
            if not any(counts):
                continue
            which = ", ".join(str(expert) for expert, count in enumerate(counts) if count)
            where = f"{sum(counts)} of {blocks} blocks" if len(counts) == 1 else f"expert {which}"
            found.append(f"{name} ({where})")
        if not found:
            return None
        return NonFiniteError(
            f"{shorten(found)}: NaN or infinite values, which cannot be quantized. Repair the "
            "checkpoint, or leave these modules in 16 bits with QuantConfig(skip=...)."
        )
