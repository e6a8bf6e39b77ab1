"""Ratios and verdicts: what is compared with what, and why a claim does not hold."""

import pytest

from qlora_kit.bench.claims import memory_ratio, reference, speed_ratio, verdicts
from tests.bench.rows import row_of

SHAPE = ("Llama-3.2-1B", 1, 2048)


def verdict(rows, start):
    return next(v for v in verdicts(rows)[SHAPE] if v.claim.startswith(start))


def test_the_better_loss_head_is_the_reference():
    stock = row_of("full", head="stock", peak_allocated_gib=24.0, tokens_per_s=22_000.0)
    chunked, ours = row_of("full"), row_of("qlora")
    rows = [stock, chunked, ours]
    assert reference(rows, ours) is chunked
    assert reference(rows, ours, speed=True) is stock
    assert memory_ratio(rows, ours) == pytest.approx(20.0 / 1.5)
    assert memory_ratio(rows, ours) != pytest.approx(24.0 / 1.5)
    assert speed_ratio(rows, ours) == pytest.approx(26_000 / 22_000)


def test_full_in_bf16_is_never_the_reference():
    ours = row_of("qlora")
    assert reference([row_of("full_bf16"), ours], ours) is None
    assert memory_ratio([row_of("full_bf16"), ours], ours) is None


def test_recomputing_is_compared_with_recomputing():
    saving = row_of("full", policy="save", peak_allocated_gib=30.0)
    ours = row_of("qlora", policy="recompute_elementwise")
    rows = [row_of("full"), saving, ours]
    assert reference(rows, ours) is saving
    mixed = row_of("qlora", policy="save:8,offload:8")
    assert reference(rows, mixed) is rows[0]


def test_a_claim_that_holds_says_so():
    rows = [row_of("full"), row_of("lora"), row_of("qlora")]
    found = verdict(rows, "QLoRA needs")
    assert found.met is True
    assert found.ratio == pytest.approx(20.0 / 1.5)
    assert "20.00 GiB" in found.text


def test_activations_that_are_in_the_way_are_named():
    """What stays is 18 times less, the step is not: at 8 times 2.5 GiB are allowed in all."""
    parts = row_of("qlora")["components_gib"] | {"step": 2.0}
    fat = row_of("qlora", components_gib=parts, peak_allocated_gib=3.1)
    found = verdict([row_of("full"), fat], "QLoRA needs")
    assert found.met is False
    assert "activations and workspaces do not: 2.00 GiB here, 1.60 GiB" in found.text
    assert "2.50 GiB in all" in found.text
    assert "1.40 GiB for them" in found.text


def test_weights_that_are_in_the_way_are_named():
    parts = {"weights": 8.0, "embeddings": 0.5, "trained": 0.1, "step": 0.1}
    fat = row_of("lora", components_gib=parts, peak_allocated_gib=8.7)
    found = verdict([row_of("full"), fat], "LoRA needs")
    assert found.met is False
    assert "frozen weights alone are 8.50 GiB" in found.text


def test_a_graphs_reserved_memory_counts():
    graph = row_of("qlora", graph=True, peak_reserved_gib=4.0)
    assert memory_ratio([row_of("full"), graph], graph) == pytest.approx(5.0)
    assert verdict([row_of("full"), graph], "QLoRA needs").met is False


@pytest.mark.parametrize(("speed", "met"), [(26_000.0, True), (23_000.0, False)])
def test_speed_is_fastest_against_fastest(speed, met):
    slow = row_of("full", policy="recompute_all", tokens_per_s=15_000.0)
    rows = [slow, row_of("full", policy="save"), row_of("qlora", tokens_per_s=speed)]
    found = verdict(rows, "QLoRA trains")
    assert found.met is met
    assert found.ratio == pytest.approx(speed / 20_000)
    assert ("1.43 times fewer FLOPs" in found.text) is not met
    assert ("which recomputed nothing" in found.text) is not met


def test_out_of_memory_leaves_the_claim_open():
    gone = {"oom": True, "tokens_per_s": None}
    full = {k: v for k, v in (row_of("full") | gone).items() if k != "tokens_per_s"}
    for start in ("QLoRA needs", "QLoRA trains"):
        found = verdict([full, row_of("qlora")], start)
        assert found.met is None
        assert "ran out of memory" in found.text


def test_without_a_gpu_nothing_is_claimed():
    rows = [
        row_of(name, peak_allocated_gib=None, peak_reserved_gib=None) for name in ("full", "qlora")
    ]
    assert verdicts(rows) == {}
