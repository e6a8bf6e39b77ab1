"""The order of rows depends on seed and epoch alone, and grouping saves padding."""

import pytest
import torch

from qlora_kit.train.sampling import EpochSampler, SortedSampler

LENGTHS = torch.randint(1, 100, (103,), generator=torch.Generator().manual_seed(0)).tolist()


def order(epoch: int = 0, *, grouped: bool = True, seed: int = 0, batch: int = 4) -> list[int]:
    sampler = EpochSampler(LENGTHS, batch_size=batch, group_by_length=grouped, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def padded(rows: list[int], batch: int = 4) -> int:
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return sum(max(LENGTHS[r] for r in one) * len(one) for one in batches)


@pytest.mark.parametrize("grouped", [True, False])
def test_a_pure_function_of_seed_and_epoch(grouped: bool) -> None:
    """The global random state neither decides the order nor is touched."""
    first = order(3, grouped=grouped)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert order(3, grouped=grouped) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert order(4, grouped=grouped) != first
    assert order(3, grouped=grouped, seed=1) != first


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 7, 60, 200])
def test_every_row_once(grouped: bool, batch: int) -> None:
    """Whatever the batch size, also larger than the set."""
    assert sorted(order(grouped=grouped, batch=batch)) == list(range(len(LENGTHS)))


def test_grouping_saves_padding_and_starts_with_the_longest() -> None:
    """Less than half of the padding; the first batch holds the longest row."""
    exact = sum(LENGTHS)
    assert padded(order()) - exact < 0.5 * (padded(order(grouped=False)) - exact)
    assert max(LENGTHS) in [LENGTHS[row] for row in order()[:4]]
    means = [sum(LENGTHS[r] for r in order()[i : i + 4]) for i in range(4, 100, 4)]
    assert means != sorted(means, reverse=True)  # batches are mixed, not sorted


def test_sorted_is_longest_first() -> None:
    """Ties keep the order of the set."""
    assert list(SortedSampler([1, 3, 3, 2])) == [1, 2, 3, 0]
