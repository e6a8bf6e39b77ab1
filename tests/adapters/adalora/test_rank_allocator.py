"""Importance, the budget and the choice of triplets, against plain formulas."""

import json

import pytest
import torch
from torch import nn

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.adalora.layer import AdaLoRALinear
from qlora_kit.adapters.adalora.rank_allocator import SCORES_FILE, RankAllocator, keep_best
from qlora_kit.core.errors import ConfigError, FormatError, SourceError

BUDGET = RankBudget(target_rank=2, start_updates=2, final_updates=3, every=2)
UPDATES = 12
F64_EPS = 2.0**-52


def layers(dtype: str = "float32") -> list[AdaLoRALinear]:
    config = AdaLoRA(rank=4, alpha=4, budget=BUDGET, dtype=dtype)
    shapes = [(12, 10), (12, 16), (20, 10)]
    return [
        AdaLoRALinear(nn.Linear(k, n), f"layer{i}", config, seed=0)
        for i, (k, n) in enumerate(shapes)
    ]


def allocator(modules: list[AdaLoRALinear]) -> RankAllocator:
    return RankAllocator(modules, BUDGET, target_rank=2)


def set_gradients(modules: list[AdaLoRALinear], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for parameter in module.trainable().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def step(modules: list[AdaLoRALinear], rate: float = 0.1) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.trainable().values():
                parameter -= rate * parameter.grad


def test_the_budget_is_the_papers_cubic():
    wanted = {}
    for t in range(1, UPDATES + 1):
        if t <= 2:
            wanted[t] = 12.0
        elif t <= 9:
            wanted[t] = 6 + 6 * (1 - (t - 2) / (12 - 2 - 3)) ** 3
        else:
            wanted[t] = 6.0
    for t, exact in wanted.items():
        assert BUDGET.at(t, 12, 6, UPDATES) == int(exact + 1e-9), t
    assert [t for t in wanted if BUDGET.distributes(t, UPDATES)] == [4, 6, 8, 9]
    assert RankBudget().phases(1000) == (100, 500)
    with pytest.raises(ConfigError, match="leave none"):
        RankBudget(start_updates=5, final_updates=5).phases(10)


def test_no_final_phase_ends_with_the_last_update():
    budget = RankBudget(start_updates=0, final_updates=0, every=4)
    assert [t for t in range(1, 11) if budget.distributes(t, 10)] == [4, 8, 10]
    assert budget.at(10, 12, 6, 10) == 6


def test_scores_match_a_plain_formula():
    """Three updates, in float64, value by value; β swapped or post-step values are found."""
    modules = layers()
    kept = allocator(modules)
    state = {}
    late = {}
    for t in (1, 2, 3):
        set_gradients(modules, t)
        if t == 1:  # λ starts at zero: give it something to be important for
            with torch.no_grad():
                for module in modules:
                    module.lora_E.normal_()
        before = {
            (m.place, k): p.detach().double() for m in modules for k, p in m.trainable().items()
        }
        kept.observe(t, updates=UPDATES)
        for (place, key), w in before.items():
            module = next(m for m in modules if m.place == place)
            g = module.trainable()[key].grad.double()
            mean, spread = state.get((place, key), (torch.zeros_like(w), torch.zeros_like(w)))
            importance = (w * g).abs()
            mean = 0.85 * mean + 0.15 * importance
            spread = 0.85 * spread + 0.15 * (importance - mean).abs()
            state[place, key] = mean, spread
            late[place, key] = ((w - 0.1 * g) * g).abs()
        step(modules)
    scores = []
    for module in modules:
        s = {key: torch.mul(*state[module.place, key]) for key in module.trainable()}
        scores.append(s["lora_E"][:, 0] + s["lora_B"].mean(0) + s["lora_A"].mean(1))
    exact = torch.cat(scores)
    found = kept.scores().double()
    assert ((found - exact).abs() / exact).max() < 32 * 2.0**-24
    post_step = torch.cat([late[m.place, "lora_E"][:, 0] for m in modules])
    assert ((0.15**2 * post_step - exact).abs() / exact).max() > 0.1
    assert ((kept.scores() * 1.01 - exact).abs() / exact).max() > 32 * 2.0**-24


def test_the_choice_is_global_exact_and_stable():
    assert keep_best(torch.zeros(5), 3).tolist() == [True, True, True, False, False]
    assert keep_best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1).tolist() == [False, True, False, False]
    assert keep_best(torch.ones(3), 0).sum() == 0
    assert keep_best(torch.ones(3), 9).sum() == 3
    scores = torch.randint(0, 4, (1000,)).float()
    kept = keep_best(scores, 400)
    order = sorted(range(1000), key=lambda i: (-scores[i].item(), i))[:400]
    assert kept.nonzero()[:, 0].tolist() == sorted(order)


def run(modules, kept, first: int, last: int) -> None:
    for t in range(first, last + 1):
        set_gradients(modules, t)
        kept.observe(t, updates=UPDATES)
        step(modules)
        kept.allocate(t, updates=UPDATES)


def alive(modules) -> list[bool]:
    return [bool(v) for m in modules for v in (m.lora_E[:, 0] != 0)]


def test_ranks_over_a_whole_run():
    modules = layers()
    kept = allocator(modules)
    seen, final = {}, None
    for t in range(1, UPDATES + 1):
        run(modules, kept, t, t)
        seen[t] = sum(alive(modules))
        if t == 9:
            final = alive(modules)
            scores = kept.scores().clone()
        if t > 9:
            assert alive(modules) == final  # the optimizer moves λ, the choice stays
            assert torch.equal(kept.scores(), scores)  # and importance is not followed
    assert seen == {1: 12, 2: 12, 3: 12, 4: 8, 5: 12, 6: 6, 7: 12, 8: 6, 9: 6, 10: 6, 11: 6, 12: 6}
    assert all((m.lora_A.grad != 0).all() for m in modules)  # P and Q train on
    history = kept.history.to_dict()
    assert history["updates"] == [0, 4, 6, 8, 9]
    assert [sum(r) for r in history["ranks"]] == history["budget"] == [12, 8, 6, 6, 6]
    assert history["ranks"][-1] == [sum(final[i : i + 4]) for i in (0, 4, 8)]
    json.dumps(history)


@pytest.mark.parametrize("cut", [3, 4, 5, 9, 10])
def test_saved_and_loaded_it_goes_on_with_the_same_bits(cut, tmp_path):
    whole = layers()
    kept = allocator(whole)
    run(whole, kept, 1, UPDATES)
    first = layers()
    before = allocator(first)
    run(first, before, 1, cut)
    before.save(tmp_path)
    second = layers()
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(old.state_dict())
    after = allocator(second)
    after.load(tmp_path)
    run(second, after, cut + 1, UPDATES)
    for new, old in zip(second, whole, strict=True):
        for key, parameter in new.trainable().items():
            assert torch.equal(parameter, old.trainable()[key])
    assert torch.equal(after.scores(), kept.scores())
    assert after.history == kept.history
    # without the scores it goes elsewhere
    third = layers()
    for new, old in zip(third, first, strict=True):
        new.load_state_dict(old.state_dict())
    run(third, allocator(third), cut + 1, UPDATES)
    same = [torch.equal(a.lora_E, b.lora_E) for a, b in zip(third, whole, strict=True)]
    assert not all(same)


def test_bfloat16_masters_have_float32_scores():
    modules = layers("bfloat16")
    kept = allocator(modules)
    run(modules, kept, 1, 4)
    assert kept.scores().dtype == torch.float32
    assert sum(alive(modules)) == 8


def test_what_does_not_belong_is_refused(tmp_path):
    kept = allocator(layers())
    with pytest.raises(SourceError, match="no adalora"):
        kept.load(tmp_path)
    allocator(layers()[:1]).save(tmp_path)
    with pytest.raises(FormatError, match="does not belong"):
        kept.load(tmp_path)
    (tmp_path / SCORES_FILE).write_bytes(b"nothing")
    with pytest.raises(FormatError, match="damaged"):
        kept.load(tmp_path)
