"""Variants compute what they should, and the table holds them all."""

from dataclasses import replace

import pytest
import torch

from qlora_kit.adapters.bottleneck.layer import BottleneckLinear
from qlora_kit.bench.latency import (
    VARIANTS,
    LatencyOptions,
    measure_latency,
    render_latency,
    variant,
)
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import config_of

OPTIONS = LatencyOptions(model="tiny", rank=4, device="cpu", dtype="float32")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return random_model(config_of("tiny"), None, device="cpu", dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 19)[None]).logits


def test_merged_is_the_unmerged_model(base):
    """With the same B: the product beside the weight or in it."""
    found = []
    for name in ("lora", "merged"):
        torch.manual_seed(1)
        found.append(logits(variant(base, name, OPTIONS)[0]))
    scale = found[0].abs().max()
    assert (found[0] - found[1]).abs().max() < 200 * EPS * scale
    assert (found[0] - logits(base)).abs().max() > 200 * EPS * scale  # B is not zero


def test_variants_leave_the_base_alone(base):
    before = logits(base)
    for name in VARIANTS:
        model, count = variant(base, name, OPTIONS)
        assert (count > 0) is (name != "base")
        shared = {p.data_ptr() for p in base.parameters()}
        own = [p for p in model.parameters() if p.data_ptr() not in shared]
        assert bool(own) is (name != "base")
        assert torch.equal(logits(base), before)


def test_merged_has_no_more_modules_than_the_base(base):
    kinds = [
        sorted(type(m).__name__ for m in variant(base, name, OPTIONS)[0].modules())
        for name in ("base", "merged", "lora")
    ]
    assert kinds[0] == kinds[1] != kinds[2]


@pytest.mark.parametrize(("kind", "each"), [("pfeiffer", 1), ("houlsby", 2)])
def test_bottlenecks_are_on_every_layer_and_do_something(base, kind, each):
    model, count = variant(base, kind, OPTIONS)
    pieces = [m for m in model.modules() if isinstance(m, BottleneckLinear)]
    assert len(pieces) == each * 2
    assert count == sum(p.numel() for piece in pieces for p in piece.trainable().values())
    assert (logits(model) - logits(base)).abs().max() > 0


def test_rows_and_table():
    options = replace(OPTIONS, shapes=((1, 8),), new_tokens=2, rank=2, seconds=0)
    rows = measure_latency(options)
    assert [(r["measure"], r["variant"]) for r in rows] == [
        (measure, name) for measure in ("forward", "generate") for name in VARIANTS
    ]
    assert all(r["ms_p10"] <= r["ms_median"] <= r["ms_p90"] for r in rows)
    assert all(r["overhead"] == 0 for r in rows if r["variant"] == "base")
    text = render_latency(rows)
    assert len(text.splitlines()) == 4
    assert all(name in text.splitlines()[0] for name in VARIANTS)
