"""The planner against the longest rows that were trained: `python -m benchmarks.context`."""

import json
from copy import copy

import pytest

from benchmarks.harness.record import RESULTS
from qlora_kit.bench.record import Row
from qlora_kit.bench.shapes import SHAPES
from qlora_kit.core.units import GIB
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.predict import predict
from qlora_kit.plan.setup import Setup
from qlora_kit.quant.config import QuantConfig

BEFORE = ("8364ea4",)
"""Commits at which inputs came back once (see `block/offload.py`): their rows took up to one
matrix of hidden states more than is predicted now."""


def measured() -> list[tuple[str, Row]]:
    """Rows that trained, with the kind of GPU."""
    found = []
    for file in sorted((RESULTS / "context").glob("h*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        kind = "h200" if "H200" in record["gpu"] else "h100"
        once = record["commit"] in BEFORE
        found += [(kind, {**row, "once": once}) for row in record["rows"] if row["trained"]]
    return found


def peak(kind: str, row: Row, **changes: object) -> float:
    """What is predicted for a row, in GiB."""
    config = copy(SHAPES[row["model"]])
    config.num_hidden_layers = row["layers"] or config.num_hidden_layers
    quant = QuantConfig()
    words = {
        "rank": row["rank"],
        "seq": row["length"],
        "activations": row["policy"],
        "tile": row["tile"],
        "optimizer": row["optimizer"],
        "quant": quant.with_head() if row["quantize_head"] else quant,
        "embeddings_on_host": row["embeddings_on_host"],
    }
    return predict(config, Setup(**(words | changes)), find_gpu(kind)).peak_bytes / GIB


@pytest.mark.slow
def test_long_rows_fit_as_predicted():
    rows = measured()
    assert any(row["model"] == "Llama-3.3-70B" and row["length"] >= 36_000 for _, row in rows)
    for kind, row in rows:
        predicted, most = peak(kind, row), row["peak_allocated_gib"]
        if row["once"]:
            unit = 2 * row["length"] * SHAPES[row["model"]].hidden_size / GIB
            assert 0.99 * most - unit <= predicted < 0.99 * most
        else:
            assert predicted == pytest.approx(most, rel=0.01)
        assert row["peak_reserved_gib"] <= row["cap_gib"]


@pytest.mark.slow
def test_a_forgotten_setting_would_be_seen():
    """Without tiles, or with embeddings counted on the GPU, the same rows are missed."""
    kind, row = next(pair for pair in measured() if pair[1]["embeddings_on_host"])
    assert peak(kind, row, embeddings_on_host=False) > 1.01 * row["peak_allocated_gib"]
    assert peak(kind, row, tile=None) > 1.01 * row["peak_allocated_gib"]
