"""The planner against what was measured: the newest record of `python -m benchmarks.plan`."""

import json
import statistics
from functools import cache

import pytest

from benchmarks.plan.__main__ import MEDIAN, MOST, SPEED, errors
from benchmarks.plan.plot import newest_record
from qlora_kit.bench.predicted import add_predictions
from qlora_kit.bench.record import Row


@cache
def rows() -> list[tuple[Row, float, float]]:
    record = json.loads(newest_record().read_text(encoding="utf-8"))
    add_predictions(record)
    return errors(record["rows"])


@pytest.mark.slow
def test_every_measured_peak_is_predicted():
    found = rows()
    assert len(found) >= 30
    wrong = {f"{r['model']} {r['batch']} x {r['seq']} {r['policy']}": m for r, m, _ in found}
    assert {name: error for name, error in wrong.items() if abs(error) > MOST} == {}
    assert statistics.median(map(abs, wrong.values())) <= MEDIAN


@pytest.mark.slow
def test_a_wrong_count_would_be_seen():
    """Without the gradients' buffer, or with one more copy of the activations, most rows fail."""
    adapters = [
        row["predicted_components_gib"]["trained"] / row["peak_allocated_gib"]
        for row, _, _ in rows()
        if row["method"] != "full"
    ]
    assert statistics.median(adapters) > MEDIAN


@pytest.mark.slow
def test_speeds_are_predicted_where_the_gpu_decides():
    """Small batches without a CUDA graph wait for Python, and hosts differ."""
    known = [
        speed for row, _, speed in rows() if row["batch"] * row["seq"] > 4096 or row.get("graph")
    ]
    assert len(known) >= 20
    assert max(map(abs, known)) <= SPEED
