"""Sizes from configurations: published figures, and that the readings matter."""

from dataclasses import replace

import pytest

from qlora_kit.bench.sizes import (
    OURS,
    PUBLISHED,
    PUBLISHED_AS,
    breakdown,
    checkpoint_sizes,
    render_sizes,
)
from qlora_kit.core.units import MIB

WITHIN = 0.10


def off(size, reading):
    made = breakdown(size, reading)
    return {part: abs(made[part] / value - 1) for part, value in PUBLISHED[size].items()}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_breakdown_follows_from_the_shapes(size):
    assert max(off(size, PUBLISHED_AS).values()) < WITHIN


def test_other_readings_do_not():
    """Double quantization, no context, another rank, decimal megabytes: each misses somewhere."""
    assert off("7B", replace(PUBLISHED_AS, beside_bytes=0))["model"] > WITHIN
    assert off("65B", replace(PUBLISHED_AS, double_quant=True, beside_bytes=0))["model"] > WITHIN
    assert off("7B", replace(PUBLISHED_AS, rank=32))["adapters"] > WITHIN
    assert off("7B", OURS)["optimizer"] > WITHIN
    decimal = breakdown("13B", PUBLISHED_AS)["adapters"] * MIB / 1e6
    assert decimal / PUBLISHED["13B"]["adapters"] - 1 > WITHIN


@pytest.mark.parametrize(("size", "hidden", "layers"), [("7B", 4096, 32), ("65B", 8192, 80)])
def test_the_published_optimizer_is_that_of_a_wide_feed_forward(size, hidden, layers):
    """64 · 18 · hidden · 8 bytes per layer, exactly; LLaMA's own shapes give 6% more."""
    published = PUBLISHED[size]["optimizer"]
    assert published * MIB == 64 * 18 * hidden * 8 * layers
    assert breakdown(size, PUBLISHED_AS)["optimizer"] / published == pytest.approx(1.059, abs=0.001)


def test_gpt3_is_ten_thousand_times_larger_than_its_adapter():
    """The paper rounds: 350 GB and 35 MB."""
    gpt3 = checkpoint_sizes()[0]
    assert gpt3.model_bytes == pytest.approx(350e9, rel=0.01)
    assert gpt3.adapter_bytes == 2 * 18_874_368
    assert gpt3.adapter_bytes / MIB == pytest.approx(35, rel=0.03)
    assert 9_000 < gpt3.ratio < 10_000


def test_8b_adapter_has_the_known_size():
    found = {(s.model, s.adapter): s for s in checkpoint_sizes()}
    assert found["Llama-3.1-8B", "r 16 on all linears"].adapter_bytes == 2 * 41_943_040


def test_tables_name_every_figure():
    text = render_sizes()
    for parts in PUBLISHED.values():
        assert all(f"{value:,}" in text for value in parts.values())
    assert "no double" in text
