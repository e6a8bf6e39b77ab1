"""What is offered to a run that does not fit: the mildest change first, each of which fits."""

from dataclasses import replace

import pytest

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import ConfigError
from qlora_kit.plan.budget import Budget, needed_bytes
from qlora_kit.plan.changes import changes, leaner, speed_change, with_rank
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.nearest import LOWEST_RANK, nearest
from qlora_kit.plan.plan import make_plan
from qlora_kit.plan.search import Planner
from qlora_kit.plan.setup import FULL, Setup
from tests.plan.shapes import llama

DENSE = Setup(rank=16, bits=16, seq=512)
WIDE = Setup(rank=512, seq=256, optimizer="adamw_torch")


def under(budget: int, *, layers: int = 4) -> Planner:
    return Planner(llama(layers), find_gpu("l4"), Budget.of(budget))


def least(setup: Setup) -> int:
    """What the thriftiest policy needs."""
    made = under(64 << 30)
    return needed_bytes(made.predict(made.thriftiest(setup)))


def between(small: Setup, large: Setup) -> int:
    low, high = least(small), least(large)
    assert low < high
    return (low + high) // 2


def test_four_bits_are_offered_where_16_are_too_many():
    lean = leaner(DENSE, llama())
    made = under(between(replace(lean, bits=4), lean))
    found = nearest(made, DENSE)
    told = [changes(DENSE, one.setup) for one in found]
    assert all(made.budget.fits(one) for one in found)
    assert [one for one in told if one.get("model.bits") == "4"]
    assert not any("model.bits" in one for one in told if "adapter.rank" in one)
    four = replace(DENSE, bits=4)
    assert not any("model.bits" in changes(four, one.setup) for one in nearest(made, four))


def test_the_highest_lower_rank_that_fits_is_offered():
    """At the scale it had, after what trains the same, before shorter rows."""
    lean = leaner(WIDE, llama())
    made = under(between(with_rank(lean, 128), with_rank(lean, 256)))
    found = nearest(made, WIDE)
    told = [changes(WIDE, one.setup) for one in found]
    assert all(made.budget.fits(one) for one in found)
    ranks = [one["adapter.rank"] for one in told if "adapter.rank" in one]
    assert ranks == ["128"]
    (lower,) = [one.setup for one in found if one.setup.rank == 128]
    assert lower.adapter.scale_of("q_proj") == WIDE.adapter.scale_of("q_proj")
    assert not made.fits(made.thriftiest(with_rank(lean, 256)))
    at = told.index(next(one for one in told if "adapter.rank" in one))
    assert all("data.max_length" not in one for one in told[:at])


def test_a_rank_that_is_not_in_the_way_stays():
    """Where rows are what is too large, and where no rank is low enough."""
    long = Setup(rank=8, seq=1 << 16)
    for planner, setup in ((under(1 << 30), long), (under(700 << 20, layers=8), WIDE)):
        assert not any("adapter.rank" in changes(setup, o.setup) for o in nearest(planner, setup))


def test_patterns_and_full_fine_tuning_have_no_rank_to_lower():
    with pytest.raises(ConfigError, match="full has no rank"):
        with_rank(Setup(method=FULL, bits=16), 8)
    lean = leaner(WIDE, llama())
    made = under(between(with_rank(lean, 128), with_rank(lean, 256)))
    shape = LoRA(rank=512, rank_pattern={"q_proj": 64})
    patterned = replace(WIDE, shape=shape)
    assert all("adapter.rank" not in changes(patterned, o.setup) for o in nearest(made, patterned))


@pytest.mark.parametrize("method", ["lora", "rslora", "lora_fa"])
def test_another_rank_has_the_scale_it_had(method):
    setup = Setup(method=method, rank=64)
    small = with_rank(setup, LOWEST_RANK)
    assert small.adapter.rank == LOWEST_RANK
    assert small.adapter.scale_of("q_proj") == pytest.approx(setup.adapter.scale_of("q_proj"))
    assert small.adapter.scale(LOWEST_RANK, 32.0) != setup.adapter.scale_of("q_proj")
    assert changes(setup, small)["adapter.alpha"] == f"{small.adapter.alpha:g}"


def test_what_a_change_costs_is_said():
    setup = Setup(rank=16, batch=2, seq=8192, activations="save")
    made = make_plan(under(3 << 30), setup, "m")
    assert made.nearest
    one = made.nearest[0]
    assert made.costs(one) == 1 - one.tokens_per_s / made.run.tokens_per_s
    assert made.costs(one) == -speed_change(made.run, one) != 0
    assert f"({-made.costs(one):+.0%})" in str(made)
    assert made.to_dict()["nearest"][0]["costs"] == made.costs(one)


def test_a_fused_optimizer_is_offered_to_full_fine_tuning():
    """Torch's other AdamW has the denominators of all weights at once; flat ones never do."""
    plain = Setup(method=FULL, bits=16, seq=64, optimizer="adamw_torch")
    fused = replace(plain, optimizer="adamw_torch_fused")
    made = under(between(fused, plain))
    first = nearest(made, plain)[0]
    assert changes(plain, first.setup)["train.optimizer"] == "adamw_torch_fused"
    assert made.budget.fits(first)
    adapter = Setup(seq=8192, optimizer="adamw_torch")
    found = nearest(under(700 << 20), adapter)
    assert all("fused" not in one.setup.optimizer for one in found)
