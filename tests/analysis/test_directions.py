"""Directions of a change: against the dense decomposition, with known ones, and of nothing."""

from dataclasses import replace

import pytest
import torch

from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.analysis.directions import SIDES, decompose, layer_and_kind, subspace
from tests.analysis.helpers import FLOAT64_EPS, random_pair, rotation, with_right


@pytest.mark.parametrize(("out", "in_", "rank"), [(12, 20, 3), (20, 12, 8), (5, 40, 8), (40, 5, 8)])
def test_decomposition_is_that_of_the_dense_change(out, in_, rank):
    """Ranks above the smaller side are fine: directions end with the matrix."""
    pair = random_pair(out, in_, rank)
    dense = pair.scale * (pair.b.double() @ pair.a.double())
    found = decompose(pair)
    bound = 16 * max(out, in_) * FLOAT64_EPS * dense.norm()
    assert found.rank == min(out, in_, rank)
    again = found.left @ found.values.diag() @ found.right.T
    assert (again - dense).norm() < bound
    assert (found.values - torch.linalg.svdvals(dense)[: found.rank]).abs().max() < bound
    assert abs(found.norm - float(dense.norm())) < bound
    # the bound bites: without s, or with A and B in the wrong order of directions
    assert (again / pair.scale - dense).norm() > 1e6 * bound
    assert (found.left.flip(1) @ found.values.diag() @ found.right.T - dense).norm() > 1e6 * bound


def test_stable_rank_of_known_values():
    right = rotation(9, 1)[:, :2]
    left = rotation(7, 2)[:, :2]
    pair = LowRank(right.T, left @ torch.tensor([4.0, 2.0]).double().diag(), 2.0)
    found = decompose(pair)
    assert found.values.tolist() == pytest.approx([8.0, 4.0], rel=64 * FLOAT64_EPS)
    assert found.stable_rank == pytest.approx(1.25, rel=64 * FLOAT64_EPS)


def test_adaloras_values_count():
    """λ multiplies A; a λ of zero takes its direction away."""
    pair = random_pair(12, 20, 3)
    values = torch.tensor([[2.0], [0.0], [-1.0]])
    with_values = replace(pair, values=values)
    dense = pair.scale * (pair.b.double() @ (values.double() * pair.a.double()))
    found = decompose(with_values)
    assert found.rank == 2
    # λ·A is rounded to float32 once
    again = found.left @ found.values.diag() @ found.right.T
    assert (again - dense).norm() < 2 * torch.finfo(torch.float32).eps * dense.norm()
    assert abs(decompose(pair).norm - found.norm) > 0.01
    assert subspace(with_values, "A").shape == (20, 2)


@pytest.mark.parametrize("side", SIDES)
def test_sides_span_what_they_should(side):
    pair = random_pair(12, 20, 3)
    columns = subspace(pair, side)
    inputs = side in ("A", "input")
    factor = pair.a.double().T if inputs else pair.b.double()
    assert columns.shape == factor.shape
    inside = columns @ (columns.T @ factor)
    assert (inside - factor).norm() < 64 * FLOAT64_EPS * factor.norm()


def test_strongest_first_of_the_side_asked_for():
    """Of A alone the order is A's, of ΔW it is that of the product."""
    axes = torch.eye(6, dtype=torch.float64)
    a = with_right(axes[:, :2], [3.0, 1.0])
    b = torch.linalg.inv(rotation(2, 0) @ torch.tensor([3.0, 1.0]).double().diag())
    flip = torch.tensor([1.0, 9.0]).double().diag() @ b  # B·A = diag(1, 9) on the two axes
    pair = LowRank(a, flip, 1.0)
    assert subspace(pair, "A")[:, 0].abs()[0] == pytest.approx(1.0)
    assert subspace(pair, "input")[:, 0].abs()[1] == pytest.approx(1.0)


def test_a_change_of_nothing_has_no_directions():
    pair = LowRank(torch.randn(3, 20), torch.zeros(12, 3), 1.0)
    found = decompose(pair)
    assert (found.rank, found.norm, found.stable_rank) == (0, 0.0, 0.0)
    assert subspace(pair, "B").shape == (12, 0)
    assert subspace(pair, "A").shape == (20, 3)


def test_what_cancels_is_no_change():
    """PiSSA's files before training: the start and its negative, whose sum is rounding."""
    start = random_pair(12, 20, 3)
    files = LowRank(torch.cat([start.a] * 2), torch.cat([start.b, -start.b], 1), start.scale)
    assert decompose(files).rank == 0
    moved = replace(files, a=files.a + torch.cat([0.01 * start.a, 0 * start.a]))
    assert decompose(moved).rank == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("bert.encoder.layer.3.attention.self.query", (3, "attention.self.query")),
        ("model.layers.2.mlp.experts.5.w1", (5, "w1")),
        ("classifier", (None, "classifier")),
        ("layers.0", (None, "layers.0")),
    ],
)
def test_layers_and_kinds(name, expected):
    assert layer_and_kind(name) == expected
