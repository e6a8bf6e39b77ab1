"""When a launch may read its weight before the kernel ahead of it has ended."""

from dataclasses import replace

import torch

from qlora_kit.ops.nf4_linear.early import may_be_read_early
from tests.ops.helpers import Options, make_case


def test_a_weight_is_read_early_once_nobody_writes_it():
    weight = make_case(1, 256, 256, Options(rank=0)).weight
    assert not may_be_read_early(weight)
    assert may_be_read_early(weight)
    weight.absmax.zero_()
    assert not may_be_read_early(weight)
    assert may_be_read_early(weight)
    both = torch.cat((weight.packed, weight.packed))
    halves = [replace(weight, packed=half) for half in both.chunk(2)]
    assert [may_be_read_early(half) for half in halves] == [False, False]
    halves = [replace(weight, packed=half) for half in both.chunk(2)]
    assert [may_be_read_early(half) for half in halves] == [True, True]
    both.zero_()
    assert not may_be_read_early(halves[1])
