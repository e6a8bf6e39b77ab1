"""φ: known overlaps, bounds, the random control, and what must be refused."""

import math

import pytest
import torch

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.analysis.similarity import (
    compare_adapters,
    mean_grids,
    random_directions,
    similarity_grid,
)
from qlora_kit.core.errors import AdapterError, ShapeError
from tests import tiny_models
from tests.analysis.helpers import (
    FLOAT64_EPS,
    adapter,
    peft_adapter,
    random_pair,
    rotation,
    with_right,
)

D = 10
ANGLE = 0.7
BOUND = 256 * FLOAT64_EPS
"""Of a decomposition and products of at most ten columns."""


def known_pair() -> tuple[LowRank, LowRank, torch.Tensor]:
    """Two changes whose A overlap by hand: one axis turned by ANGLE, one shared, one apart."""
    frame = rotation(D, 5)  # any frame of the space gives the same φ
    e = frame.T
    first = torch.stack([e[0], e[1], e[2]], 1)
    turned = math.cos(ANGLE) * e[0] + math.sin(ANGLE) * e[5]
    second = torch.stack([turned, e[6], e[1], e[7]], 1)
    c = math.cos(ANGLE) ** 2
    sums = [[c, c, c, c], [c, c, c + 1, c + 1], [c, c, c + 1, c + 1]]
    smaller = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 3, 3]])
    expected = torch.tensor(sums, dtype=torch.float64) / smaller
    one = LowRank(with_right(first, [9.0, 5.0, 2.0], 1), torch.ones(4, 3), 1.0)
    two = LowRank(with_right(second, [8.0, 4.0, 3.0, 1.0], 2), torch.ones(4, 4), 1.0)
    return one, two, expected


def test_known_overlap():
    one, two, expected = known_pair()
    (found,) = compare_adapters(adapter(q=one), adapter(q=two), sides=("A",))
    assert found.dimension == D
    assert (found.grid - expected).abs().max() < BOUND
    # wrong answers: weakest first, A's rows as they are, or no division by min(i, j)
    flipped = LowRank(with_right(rotation(D, 5).T[:3].T, [2.0, 5.0, 9.0], 1), one.b, 1.0)
    (other,) = compare_adapters(adapter(q=flipped), adapter(q=two), sides=("A",))
    assert (other.grid - expected).abs().max() > 0.1
    rows = [torch.nn.functional.normalize(pair.a.T, dim=0) for pair in (one, two)]
    raw = (rows[0].T @ rows[1]).square().cumsum(0).cumsum(1)
    assert (
        raw / torch.tensor([[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 3, 3]]) - expected
    ).abs().max() > 0.1
    assert (raw - expected).abs().max() > 0.1


def test_output_side_is_b():
    """The same overlap, put into B."""
    one, two, expected = known_pair()
    turned = [LowRank(torch.ones(p.a.shape[0], 6), p.a.T, 1.0) for p in (one, two)]
    (found,) = compare_adapters(adapter(q=turned[0]), adapter(q=turned[1]), sides=("B",))
    assert (found.grid - expected).abs().max() < BOUND


def test_bounds_and_identity():
    """φ is 1 with itself wherever one span holds the other, symmetric, never outside 0 to 1."""
    one, two = (random_pair(30, 40, 6, seed) for seed in (1, 2))
    files = adapter(q=one)
    for same in compare_adapters(files, files):
        corner = same.grid.diagonal()
        assert (corner - 1).abs().max() < 64 * FLOAT64_EPS * 40
        assert (same.grid - 1).abs().max() < 64 * FLOAT64_EPS * 40  # the smaller lies in the larger
    (ab,) = compare_adapters(adapter(q=one), adapter(q=two), sides=("A",))
    (ba,) = compare_adapters(adapter(q=two), adapter(q=one), sides=("A",))
    assert (ab.grid - ba.grid.T).abs().max() < 64 * FLOAT64_EPS
    assert 0 <= ab.grid.min() <= ab.grid.max() <= 1
    # a scaled, mixed copy spans the same: φ at full rank does not see it
    mixed = LowRank(rotation(6, 3).float() @ one.a * 7, one.b, 1.0)
    (again,) = compare_adapters(adapter(q=one), adapter(q=mixed), sides=("A",))
    assert again.grid[-1, -1] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("i", "j"), [(1, 1), (2, 8), (8, 8), (16, 4)])
def test_random_control_is_max_over_d(i, j):
    """The mean of 400 draws lies within five standard errors of max(i, j)/d."""
    d, draws = 48, 400
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [
            float(
                similarity_grid(
                    random_directions(d, 16, generator), random_directions(d, 8, generator)
                )[i - 1, j - 1]
            )
            for _ in range(draws)
        ]
    )
    error = 5 * float(found.std()) / draws**0.5
    assert abs(float(found.mean()) - max(i, j) / d) < error
    if i != j:  # the bound bites
        assert abs(float(found.mean()) - min(i, j) / d) > error
    assert abs(float(found.mean()) - (max(i, j) + 1) / d) > error


def test_control_beside_every_module():
    """Its shape is that of φ, and at r of d it is near r/d."""
    files = [adapter(q=random_pair(64, 128, 16, seed)) for seed in (1, 2)]
    for one in compare_adapters(*files):
        assert one.random.shape == one.grid.shape == (16, 16)
        assert one.expected(16, 4) == 16 / one.dimension
        # one draw: Var φ(r, r) < 2/(r d)², a tenth of it here
        assert abs(float(one.random[15, 15]) - one.expected(16, 16)) < 5 * 2**0.5 / one.dimension


def test_pefts_adapters(tmp_path):
    """PEFT's files, compared by a dense formula on PEFT's own tensors."""
    base = tiny_models.saved("llama")
    for rank, seed in ((4, 1), (8, 2)):
        peft_adapter(base, tmp_path / f"r{rank}", rank=rank, seed=seed)
    ours, theirs = (read_adapter(tmp_path / f"r{rank}") for rank in (4, 8))
    found = compare_adapters(ours, theirs, modules=("q_proj",))
    assert [one.side for one in found] == ["A", "A", "B", "B"]
    from safetensors.torch import load_file

    files = [load_file(tmp_path / f"r{r}" / "adapter_model.safetensors") for r in (4, 8)]
    for one in found:
        key = f"base_model.model.{one.module}.lora_{one.side}.weight"
        factors = [tensors[key].double() for tensors in files]
        parts = [torch.linalg.svd(f.T if one.side == "A" else f)[0] for f in factors]
        for i in range(1, 5):
            for j in range(1, 9):
                phi = (parts[0][:, :i].T @ parts[1][:, :j]).norm() ** 2 / min(i, j)
                assert abs(float(one.grid[i - 1, j - 1] - phi)) < 1e-10
        # wrong: the last directions for the first
        weakest = (parts[0][:, 3:4].T @ parts[1][:, 7:8]).norm() ** 2
        assert abs(float(one.grid[0, 0] - weakest)) > 1e-6


def test_means_over_layers():
    grids = mean_grids(
        compare_adapters(*([adapter(q=random_pair(8, 8, 2), v=random_pair(8, 6, 2))] * 2))
    )
    assert {(side, kind) for side, kind in grids} == {(s, k) for s in "AB" for k in "qv"}
    phi, _, layers = grids["A", "q"]
    assert (layers, phi.shape) == (1, (2, 2))


def test_refusals():
    with pytest.raises(AdapterError, match=r"no module in common.*has q.*second v"):
        compare_adapters(adapter(q=random_pair(4, 4, 1)), adapter(v=random_pair(4, 4, 1)))
    with pytest.raises(AdapterError, match="8 inputs in one adapter and 9"):
        compare_adapters(adapter(q=random_pair(4, 8, 1)), adapter(q=random_pair(4, 9, 1)))
    with pytest.raises(ShapeError, match="of one d"):
        similarity_grid(torch.eye(4), torch.eye(5))
    with pytest.raises(ShapeError, match="orthonormal"):
        similarity_grid(2 * torch.eye(4), torch.eye(4))


def test_an_untrained_adapter_compares_as_empty():
    """B is zero before training: no directions, no number, no crash."""
    fresh = adapter(q=LowRank(torch.randn(2, 8), torch.zeros(4, 2), 1.0))
    (found,) = compare_adapters(fresh, fresh, sides=("B",))
    assert found.grid.shape == (0, 0)
    assert mean_grids([found]) == {}
