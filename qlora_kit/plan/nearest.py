"""What to change in a run that does not fit, from what nobody would notice to what all would.

First what changes no result: how activations are kept, how rows are divided among passes. Then
what changes it by rounding: a fused optimizer where that takes less, an 8-bit state that can leave
the GPU, tiles, the model's ends made small. Then what changes what is trained: the base in 4 bits,
a lower rank at the same scale, at last shorter rows. Of each kind there is one, the nearest, and
each was predicted to fit.
"""

from collections.abc import Iterator
from dataclasses import replace

from qlora_kit.plan.changes import PAGED, leaner, with_rank
from qlora_kit.plan.predict import Prediction
from qlora_kit.plan.search import Planner
from qlora_kit.plan.setup import FULL, Setup

LOWEST_RANK = 4
"""Below this an adapter is hardly smaller, and learns hardly anything."""


def nearest(planner: Planner, setup: Setup) -> tuple[Prediction, ...]:
    """Runs that fit and are near one that does not.

    Args:
        planner: of the model.
        setup: of the run that does not fit.

    Returns:
        In the order of the module's text; after a run with other activations alone, only the
        same rows in smaller batches.
    """
    found: list[Prediction] = []
    same = planner.fastest(setup)
    made = [same, _smaller_batch(planner, setup)]
    if same is None:
        lean = leaner(setup, planner.config)
        paged = replace(setup, optimizer=PAGED)
        others = [paged, lean]
        if setup.method == FULL and setup.optimizer == "adamw_torch":
            others = [replace(setup, optimizer="adamw_torch_fused"), *others]
        made += [_fitting(planner, one) for one in others if one != setup]
        made += [_four_bits(planner, setup), _lower_rank(planner, setup)]
        made += _shorter(planner, setup)
    for one in made:
        if one is not None and one not in found:
            found.append(one)
    return tuple(found)


def _fitting(planner: Planner, setup: Setup) -> Prediction | None:
    """The fastest way to run something, if it fits at all: that is asked first, for less."""
    return planner.fastest(setup) if planner.fits(planner.thriftiest(setup)) else None


def _smaller_batch(planner: Planner, setup: Setup) -> Prediction | None:
    """The largest smaller batch that fits, with more passes for the same rows."""
    rows = setup.batch * setup.accumulation
    for batch in (n for n in range(setup.batch - 1, 0, -1) if rows % n == 0):
        made = planner.fastest(replace(setup, batch=batch, accumulation=rows // batch))
        if made is not None:
            return made
    return None


def _four_bits(planner: Planner, setup: Setup) -> Prediction | None:
    """The same on a base in 4 bits; with the model's ends made small where that is needed."""
    if setup.bits == 4 or setup.adapter is None:
        return None
    four = replace(setup, bits=4)
    return _fitting(planner, four) or _fitting(planner, leaner(four, planner.config))


def _lower_rank(planner: Planner, setup: Setup) -> Prediction | None:
    """The highest of the rank's halves that fits, with all made small that changes no more."""
    base = leaner(setup, planner.config)
    ranks = _halves(base)
    if not ranks:
        return None
    thrifty = planner.thriftiest(base)
    if planner.fits(thrifty) or not planner.fits(with_rank(thrifty, ranks[-1])):
        return None  # the rank is not what is in the way, or not alone
    rank = next(rank for rank in ranks if planner.fits(with_rank(thrifty, rank)))
    return planner.fastest(with_rank(base, rank))


def _halves(setup: Setup) -> list[int]:
    """Ranks to try, from the highest; none where the rank is not one number."""
    adapter = setup.lora
    if adapter is None or adapter.rank_pattern or setup.method == "adalora":
        return []
    found, rank = [], adapter.rank // 2
    while rank >= LOWEST_RANK:
        found.append(rank)
        rank //= 2
    return found


def _shorter(planner: Planner, setup: Setup) -> Iterator[Prediction]:
    """The longest rows that fit, in the same batch and alone."""
    rows = setup.batch * setup.accumulation
    thrifty = planner.thriftiest(setup)
    for batch in dict.fromkeys((setup.batch, 1)):
        divided = replace(thrifty, batch=batch, accumulation=rows // batch)
        seq = min(setup.seq, planner.longest(divided))
        if 0 < seq < setup.seq:
            yield planner.predict(divided.with_tokens(seq=seq))
