"""What fits, how much, and the fastest of it: on small shapes, against trying everything."""

from dataclasses import replace
from itertools import pairwise, permutations

import pytest

from qlora_kit.block.policy import POLICIES, parse_policy
from qlora_kit.core.errors import ConfigError
from qlora_kit.plan import search
from qlora_kit.plan.budget import (
    SPARE,
    Budget,
    graph_bytes,
    margin_bytes,
    needed_bytes,
    step_bytes,
)
from qlora_kit.plan.edge import Remembered, largest
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.predict import CONTEXT
from qlora_kit.plan.search import MOST_TOKENS, UNIT, WORTH, Planner, mixture
from qlora_kit.plan.setup import Setup
from tests.plan.shapes import llama, planner

LONG = Setup(rank=8, batch=2, seq=8192)
LAYERS = 5
TRIED = ("recompute_elementwise", "recompute_mlp", "offload_attention", "offload")


def test_a_budget_is_read():
    assert Budget.of("auto", find_gpu("l40s")).gpu_bytes == find_gpu("l40s").memory_bytes
    assert Budget.of("44GiB", host="8GiB") == Budget(gpu_bytes=44 << 30, host_bytes=8 << 30)
    with pytest.raises(ConfigError, match="CUDA context"):
        Budget.of("100MiB")
    with pytest.raises(ConfigError, match="is not a size"):
        Budget.of("much")


def test_needed_is_all_of_it():
    """Reserved memory, a margin on what moves, the context; graphs below their limit only."""
    made = planner("40GiB").predict(LONG)
    assert graph_bytes(made) == 0
    assert needed_bytes(made) == made.reserved_bytes + margin_bytes(made) + CONTEXT
    assert margin_bytes(made) > SPARE
    alike = planner("40GiB").predict(Setup(rank=8, seq=1024))
    assert graph_bytes(alike) == 0
    assert needed_bytes(alike) == alike.reserved_bytes + margin_bytes(alike) + CONTEXT
    short = planner("40GiB").predict(Setup(rank=8, seq=1024, varied=True))
    assert graph_bytes(short) == step_bytes(short) > 0
    assert needed_bytes(short) - short.reserved_bytes > graph_bytes(short)


def test_fits_is_never_said_of_what_does_not():
    """At the very byte, and one below it."""
    made = planner("40GiB").predict(LONG)
    exact = needed_bytes(made)
    assert Budget(gpu_bytes=exact).fits(made)
    assert not Budget(gpu_bytes=exact - 1).fits(made)


def test_host_memory_is_a_budget_too():
    setup = replace(LONG, activations="offload")
    waiting = sum(planner("40GiB").predict(setup).host.values())
    assert waiting > 0
    assert planner("40GiB", host=str(waiting)).fits(setup)
    assert not planner("40GiB", host=str(waiting - 1)).fits(setup)


def test_memory_grows_with_tokens():
    """What bisection stands on, for every policy."""
    made = planner("40GiB")
    for policy in POLICIES:
        setup = replace(LONG, activations=policy, tile=None)
        needs = [
            needed_bytes(made.predict(setup.with_tokens(seq=seq))) for seq in (4160, 6016, 8192)
        ]
        assert needs == sorted(needs)
        assert needs[0] < needs[-1]


def test_policies_are_named_from_the_most_memory_to_the_least():
    made = planner("40GiB")
    needs = [needed_bytes(made.predict(replace(LONG, activations=policy))) for policy in POLICIES]
    assert needs[:4] == sorted(needs[:4], reverse=True)


@pytest.mark.parametrize("edge", [1, 2, 63, 64, 1000, 4095])
@pytest.mark.parametrize("guess", [1, 7, 4096])
def test_every_edge_is_found(edge, guess):
    """Of a line, a curve and a staircase; and never asks for more than there is."""
    for fall in (lambda n: edge - n, lambda n: edge**2 - n**2, lambda n: edge // 8 - n // 8):
        wanted = max(n for n in range(1, 4097) if fall(n) >= 0)
        assert largest(Remembered(fall), 4096, guess=guess) == wanted
    assert largest(lambda n: -n, 4096, guess=guess) == 0
    assert largest(lambda n: 1, 4096, guess=guess) == 4096


def test_longest_looks_behind_the_dent_that_tiles_make(monkeypatch):
    """Where tiles begin, more tokens take less: the first edge is not the last."""
    made = planner("4GiB")

    def room(setup: Setup) -> int:
        tokens = setup.tokens
        return (20_000 if tokens < 32_768 else 60_000) - tokens

    monkeypatch.setattr(made, "room", room)
    assert made.longest(replace(LONG, batch=1)) == 60_000 // UNIT * UNIT


def test_longest_sequence_and_largest_batch_are_the_edges():
    made = planner("6GiB")
    setup = replace(LONG, batch=1)
    longest = made.longest(setup)
    assert longest % UNIT == 0
    assert longest > 0
    assert made.fits(setup.with_tokens(seq=longest))
    assert not made.fits(setup.with_tokens(seq=longest + UNIT))
    short, tight = replace(LONG, seq=1024), planner("3GiB")
    batch = tight.largest_batch(short)
    assert tight.fits(short.with_tokens(batch=batch))
    assert not tight.fits(short.with_tokens(batch=batch + 1))
    assert made.largest_batch(replace(short, activations="offload")) == MOST_TOKENS // 1024


def test_nothing_fits_where_the_weights_do_not():
    made = planner("560MiB", layers=8)
    assert made.fastest(LONG) is None
    assert made.fastest_update(LONG) is None
    assert made.longest(LONG) == made.largest_batch(LONG) == 0


def test_few_predictions_find_an_edge():
    """Memory is nearly a line: that is what makes a 70B model plannable in a minute."""
    made = planner("12GiB")
    made.longest(replace(LONG, batch=1))
    assert made.traced <= 10


@pytest.fixture(scope="module")
def every_mixture():
    """Of two policies, predicted; the reference that the search is held to."""
    roomy = planner("70GiB", layers=LAYERS)
    setup = replace(LONG, tile=None)
    words = {
        f"{slow}:{LAYERS - n},{fast}:{n}"
        for fast, slow in permutations(TRIED, 2)
        for n in range(LAYERS + 1)
    }
    return [roomy.predict(replace(setup, activations=text)) for text in sorted(words)]


@pytest.mark.parametrize("share", [0.02, 0.15, 0.3, 0.45, 0.6, 0.8, 0.95])
def test_a_mixture_fills_the_budget(share, every_mixture):
    """No other mixture of two is faster by more than half a layer makes."""
    needs = [needed_bytes(one) for one in every_mixture]
    budget = Budget(gpu_bytes=int(min(needs) + share * (max(needs) - min(needs))))
    made = Planner(llama(LAYERS), find_gpu("l4"), budget)
    found = made.fastest(replace(LONG, tile=None))
    assert found is not None
    assert budget.fits(found)
    best = min(one.step_s for one in every_mixture if budget.fits(one))
    worst = max(one.step_s for one in every_mixture)
    layer = (worst - min(one.step_s for one in every_mixture)) / LAYERS
    assert found.step_s <= best + layer / 2
    assert worst > best + layer / 2  # the bound tells good from bad
    assert len(set(parse_policy(found.setup.activations, LAYERS))) <= 2


def test_a_budget_without_end_keeps_most():
    """No recomputing beyond what costs nothing; and more budget is never slower."""
    speeds = [planner(size).fastest(LONG) for size in ("3GiB", "4GiB", "6GiB", "70GiB")]
    times = [one.step_s for one in speeds if one is not None]
    assert all(after <= before * (1 + WORTH) for before, after in pairwise(times))
    assert speeds[-1] is not None
    assert set(parse_policy(speeds[-1].setup.activations, 4)) <= {"save", "recompute_elementwise"}


def test_decoded_weights_are_kept_where_there_is_room():
    """A short step spends most on decoding: with room for it, all of it is saved."""
    short = Setup(rank=8, seq=512)
    found = planner("70GiB").fastest(short)
    assert found is not None
    assert found.setup.keep_decoded == 4
    assert found.step_s < planner("70GiB").predict(replace(found.setup, keep_decoded=0)).step_s
    assert found.peak_bytes > planner("70GiB").predict(replace(short)).peak_bytes


def test_mixtures_put_what_keeps_less_first():
    fast, slow = Setup(activations="save"), Setup(activations="offload")
    assert mixture(fast, slow, 3, 8).activations == "offload:5,save:3"
    kept = replace(fast, keep_decoded=8)
    assert mixture(kept, slow, 3, 8).activations == "save:3,offload:5"
    assert mixture(kept, slow, 3, 8).keep_decoded == 3
    assert mixture(kept, fast, 3, 8) == replace(fast, keep_decoded=3)
    assert mixture(kept, replace(slow, keep_decoded=8), 3, 8).keep_decoded == 8
    assert mixture(fast, replace(slow, keep_decoded=8), 3, 8).activations == "offload:5,save:3"
    assert mixture(fast, replace(slow, keep_decoded=8), 3, 8).keep_decoded == 5


def test_rows_of_an_update_stay_the_same():
    """Larger batches of fewer passes, where they fit; never other rows."""
    setup = Setup(rank=8, batch=1, accumulation=8, seq=512)
    found = planner("70GiB").fastest_update(setup)
    assert found is not None
    assert found.setup.batch * found.setup.accumulation == 8
    assert found.setup.batch > 1
    alone = planner("70GiB").fastest(setup)
    assert alone is not None
    assert alone.setup.batch == 1
    assert found.tokens_per_s > alone.tokens_per_s


def test_an_allowed_optimizer_makes_room():
    """32-bit states do not fit, paged ones do; not allowed, nothing fits."""
    setup = Setup(rank=256, batch=1, seq=512, optimizer="adamw_torch", activations="offload")
    roomy = planner("70GiB")
    budget = needed_bytes(roomy.predict(roomy.thriftiest(setup))) - (32 << 20)
    made = planner(str(budget))
    assert made.fastest_update(setup) is None
    found = made.fastest_update(setup, optimizers=["paged_adamw_8bit"])
    assert found is not None
    assert found.setup.optimizer == "paged_adamw_8bit"


def test_the_models_own_code_has_two_ways():
    made = planner("40GiB")
    kinds = made.kinds(replace(LONG, step="eager"))
    assert [kind.activations for kind in kinds] == ["save", "recompute_all"]


def test_predictions_are_made_once():
    made = planner("40GiB")
    assert made.predict(LONG) is made.predict(replace(LONG))
    assert made.traced == 1


def test_what_cannot_be_traced_is_said(monkeypatch):
    def breaks(*_: object) -> None:
        raise RuntimeError("aten::item needs a value")

    monkeypatch.setattr(search, "predict", breaks)
    with pytest.raises(ConfigError, match=r"LlamaConfig cannot be traced.*aten::item"):
        planner("40GiB").predict(LONG)


def test_weights_of_dora_do_not_stay_decoded():
    """Their rows have other factors in every step."""
    made = planner("70GiB")
    assert any(kind.keep_decoded for kind in made.kinds(LONG))
    assert not any(kind.keep_decoded for kind in made.kinds(replace(LONG, method="dora")))
