"""GLoRA's structures: gradients of all 432, W⊙A never formed, what draws and searches do."""

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit.adapters.glora.config import FORMS, GLoRA, Structure
from qlora_kit.adapters.glora.layer import GLoRALinear
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.super_net.search import (
    Found,
    SearchSettings,
    random_structures,
    ranked,
    search,
)
from qlora_kit.adapters.super_net.structures import count_values, draw, super_net_pieces
from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig
from tests import tiny_models
from tests.adapters.bases import F32_EPS, make_linear, relative_error
from tests.adapters.glora.test_layer import ALL, RANK, K, N, adapted, error, truth


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_every_structure(bias):
    """On NF4 against float64; without a bias, E + W·C is one. What is not used has no gradient."""
    torch.manual_seed(0)
    layer, weight = adapted("nf4", str(Structure()), super_net=True)
    if not bias:
        plain = nn.Linear(K, N, bias=False).requires_grad_(False)
        base = NF4Linear.from_linear(plain, QuantConfig())
        layer = GLoRALinear(base, "proj", GLoRA(rank=RANK, super_net=True), seed=0)
        for value in layer.supports.values():
            nn.init.normal_(value, 0, 0.3)
        weight = base.dequantize(torch.float32).double()
    bound = 8 * K**0.5 * F32_EPS  # sums of K or N terms, errors adding at random
    for structure in {s.on(bias=bias) for s in ALL}:
        layer.choice = structure
        for value in layer.supports.values():
            value.grad = None
        x, g = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
        y, dx, grads = truth(layer, weight, x, g)
        out = layer(x)
        out.backward(g)
        assert relative_error(out, y) < bound, structure
        assert relative_error(x.grad, dx) < bound, structure
        for name, exact in grads.items():
            given = layer.supports[name].grad
            assert (given is None) == (exact is None), (structure, name)
            if exact is not None:
                assert error(layer, weight, x, g, name, exact) < bound, (structure, name)
                off = (given.double() * 1.01 - exact).norm() / exact.norm()
                assert off > 10 * bound  # the bound bites


class _Shapes(TorchDispatchMode):
    """Shapes of every tensor an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else (out,)
        self.seen += [tuple(t.shape) for t in parts if isinstance(t, torch.Tensor)]
        return out


def test_the_forward_makes_no_matrix_of_the_weights_size():
    """Neither W⊙A nor A_d·A_u nor a decoded W: only the 4-bit op, which is one op here."""
    layer, weight = adapted("nf4", str(Structure()))
    with _Shapes() as shapes:
        layer(torch.randn(5, K, requires_grad=True))
    full = {(N, K), (K, N)}
    assert len(shapes.seen) > 2 * RANK
    assert not full & set(shapes.seen)
    with _Shapes() as shapes:  # the formula as it stands does
        weight * (layer.supports["A_d"] @ layer.supports["A_u"])
    assert full & set(shapes.seen)


def test_every_structure_is_drawn_alike():
    """Forms of each support within five standard deviations of even odds; all 432 occur."""
    generator = random.Random(0)
    draws = [draw(generator) for _ in range(8000)]
    assert set(draws) == set(ALL)
    for support, forms in FORMS.items():
        counts = Counter(getattr(structure, support) for structure in draws)
        p = 1 / len(forms)
        room = 5 * math.sqrt(len(draws) * p * (1 - p))
        for form in forms:
            assert abs(counts[form] - p * len(draws)) < room, (support, form)


def super_net():
    return attach(tiny_models.build("gpt2"), GLoRA(rank=2, super_net=True))


def forms(found: Found) -> list[str]:
    return " ".join(map(str, found.structures)).split()


def test_mutations_change_a_fifth_and_children_have_two_parents():
    adapter = super_net()
    pieces = super_net_pieces(adapter)
    first = iter(range(10**6))

    def loss() -> float:  # the first two are the parents for good
        return float(next(first))

    sizes = {"population": 100, "generations": 2}
    one = SearchSettings(top=1, mutations=100, crossovers=0, **sizes)
    found = search(adapter, loss, limit=10**9, settings=one)
    parent, children = found.best, found.candidates[100:]
    assert parent == found.candidates[0]
    assert {child.generation for child in children} == {1}
    changed = [
        a != b for child in children for a, b in zip(forms(parent), forms(child), strict=True)
    ]
    # drawn anew with p = 0.2, and then another form than before: 3/4 or 2/3 of the time
    wanted = 0.2 * (2 * 3 / 4 + 3 * 2 / 3) / 5
    room = 5 * math.sqrt(wanted * (1 - wanted) / len(changed))
    assert abs(sum(changed) / len(changed) - wanted) < room
    assert room < 0.03  # 0.2 of changed forms would be found

    first = iter(range(10**6))
    two = SearchSettings(top=2, mutations=0, crossovers=100, **sizes)
    found = search(adapter, loss, limit=10**9, settings=two)
    a, b = (forms(parent) for parent in found.candidates[:2])
    children = found.candidates[100:]
    both = 0
    for child in map(forms, children):
        assert all(own in pair for own, *pair in zip(child, a, b, strict=True))
        both += child != a and child != b
    assert both == len(children)  # new ones alone are measured
    assert len(pieces) == 8


def test_no_candidate_is_measured_twice_and_all_are_seen():
    adapter = super_net()
    seen: list[Found] = []
    sizes = SearchSettings(population=40, top=3, mutations=20, crossovers=20, generations=4)
    found = search(adapter, lambda: 0.0, limit=700, settings=sizes, watch=seen.append)
    assert tuple(seen) == found.candidates
    assert len({one.structures for one in seen}) == found.measured == 160
    assert found.ranking(5) == ranked(seen)[:5]
    assert found.ranking(1)[0] == found.best
    pieces = super_net_pieces(adapter)
    for one in seen:
        assert one.parameters == count_values(pieces, one.structures) <= 700


def test_random_structures_have_the_size():
    adapter = super_net()
    pieces = super_net_pieces(adapter)
    for size in (500, 2000):
        drawn = random_structures(adapter, size=size, count=4, seed=1)
        counts = [count_values(pieces, candidate) for candidate in drawn]
        assert all(size - 64 < count <= size for count in counts)  # a vector has 64 or more
        assert drawn == random_structures(adapter, size=size, count=4, seed=1)
        assert not set(drawn) & set(random_structures(adapter, size=size, count=4, seed=2))
    adapter.detach_from_model()
    with pytest.raises(AdapterError, match="no GLoRA super-net"):
        random_structures(attach(adapter.model, GLoRA(rank=2)), size=9, count=1, seed=0)


def test_a_structure_counts_what_the_linear_trains():
    for kind, text in itertools.product(("nf4", "conv1d"), map(str, ALL[::31])):
        base, _ = make_linear(kind, K, N)
        layer = GLoRALinear(base, "proj", GLoRA(rank=RANK, structure=text), seed=0)
        trained = sum(value.numel() for value in layer.trainable().values())
        assert count_values([layer], (layer.structure,)) == trained
