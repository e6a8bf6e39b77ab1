"""Linear combinations of adapters: Σ wᵢ·ΔWᵢ as one adapter, exactly.

The ranks add up: A is all Aᵢ one below the other and B all wᵢ·sᵢ·Bᵢ side by side, with a
scale of 1, so that B·A = Σ wᵢ·sᵢ·Bᵢ·Aᵢ with no error but one rounding of B to float32.
(Averaging A and B themselves, as is sometimes done, gives Σᵢⱼ wᵢwⱼ BᵢAⱼ: another matrix, with
products of one adapter's B and another's A.) Ranks, scales and places may differ.

Modules trained whole combine likewise, W + Σ wᵢ·(Wᵢ - W): what every adapter changed. A
classifier's head has no W before training, a loader started it at random; so for one of those
the weights of the adapters must sum to 1, where W drops out.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.core.errors import AdapterError


def combined_pair(parts: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Combine the changes of one module.

    Args:
        parts: weight and change of each adapter; all of the same module.

    Returns:
        One change, its tensors float32 and its scale 1. A single part keeps its tensors and
        has another scale.

    Example:
        >>> one = LowRank(torch.ones(1, 2), torch.ones(2, 1), 0.5)
        >>> two = LowRank(torch.eye(2), torch.eye(2), 3.0)
        >>> combined_pair([(1.0, one), (-1.0, two)]).delta()
        tensor([[-2.5000,  0.5000],
                [ 0.5000, -2.5000]])
    """
    if len(parts) == 1:
        weight, pair = parts[0]
        return LowRank(pair.a, pair.b, weight * pair.scale, embedding=pair.embedding)
    a = torch.cat([pair.a.float() for _, pair in parts])
    b = torch.cat([(pair.b.double() * (w * pair.scale)).float() for w, pair in parts], 1)
    return LowRank(a, b, 1.0, embedding=parts[0][1].embedding)


def combined_values(
    parts: Sequence[tuple[float, Mapping[str, Tensor]]],
    base: Mapping[str, Tensor],
    *,
    place: str,
    new: bool,
) -> dict[str, Tensor]:
    """Combine the values of one module that adapters trained whole.

    Args:
        parts: weight and values of each adapter.
        base: the values of the base.
        place: the module's name, for messages.
        new: the module is a head, or something else without a value before training.

    Returns:
        Name to value, in the dtype of the first part.

    Raises:
        AdapterError: it is new and the weights do not sum to 1.

    Example:
        >>> base, one = {"bias": torch.tensor([2.0])}, {"bias": torch.tensor([4.0])}
        >>> combined_values([(0.5, one)], base, place="norm", new=False)["bias"]
        tensor([3.])
    """
    total = sum(weight for weight, _ in parts)
    if new and abs(total - 1.0) > 1e-6:
        raise AdapterError(
            f"{place} was trained from a random start, so that it can be averaged but not scaled: "
            f"the weights of the adapters that have it must sum to 1, got {total:g}."
        )
    rest = 0.0 if new else 1.0 - total
    first = parts[0][1]
    found = {}
    for name, value in first.items():
        if not value.is_floating_point():
            found[name] = value
            continue
        sums = sum(weight * values[name].double() for weight, values in parts)
        found[name] = (sums + rest * base[name].double()).to(value.dtype)
    return found
