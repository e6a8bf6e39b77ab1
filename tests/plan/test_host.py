"""The host's figure: how it is measured, and what predictions make of it."""

import json
from dataclasses import replace

import pytest

from benchmarks.harness.record import RESULTS
from benchmarks.plan.__main__ import SPEED
from qlora_kit.bench.predicted import prediction_of
from qlora_kit.core.units import GIB
from qlora_kit.plan import gpus
from qlora_kit.plan.gpus import find_gpu, this_machine
from qlora_kit.plan.host import ASSUMED_US, host_us_per_op
from qlora_kit.plan.plan import make_plan
from qlora_kit.plan.predict import PINNING_S, predict
from qlora_kit.plan.search import Planner
from qlora_kit.plan.setup import Setup
from qlora_kit.plan.table import memory_table
from tests.plan.shapes import llama, planner

GPU = find_gpu("h100")
SMALL = Setup(rank=8, seq=256, graph=False)


def clock(passes: list[float]):
    """A clock by which passes take so many seconds each."""
    times = [time for seconds in passes for time in (0.0, seconds)]
    return iter(times).__next__


def test_the_figure_is_the_median_pass():
    """First passes warm up, and one that was interrupted does not count."""
    usual = [9.0] * 3 + [1e-3] * 12
    assert host_us_per_op(clock=clock(usual)) == 5.0
    assert host_us_per_op(clock=clock([9.0] * 3 + [1e-3] * 8 + [7e-3] * 4)) == 5.0
    assert host_us_per_op(clock=clock([2 * seconds for seconds in usual])) == 10.0


def test_it_is_measured_here_in_no_time():
    assert 0.1 < host_us_per_op() < 1000


def test_steps_that_wait_for_python_take_the_hosts_time():
    """In proportion; a host's twofold time would be missed by a constant."""
    known = predict(llama(), SMALL, GPU)
    assert (known.limited_by, known.host_us) == ("host", ASSUMED_US)
    slow = predict(llama(), SMALL, replace(GPU, host_us=1.5 * ASSUMED_US))
    assert slow.step_s == pytest.approx(1.5 * known.step_s)
    quick = predict(llama(), SMALL, replace(GPU, host_us=1e-3))
    assert quick.limited_by == "compute"
    assert quick.step_s < known.step_s


def test_a_recorded_step_takes_none_of_it():
    recorded = replace(SMALL, graph=True)
    slow = replace(GPU, host_us=100 * ASSUMED_US)
    one, other = (predict(llama(), recorded, gpu) for gpu in (GPU, slow))
    assert one.recorded
    assert one.step_s == other.step_s < predict(llama(), SMALL, slow).step_s


def test_rows_of_records_are_predicted_for_their_host():
    row = {"model": "tiny", "method": "lora", "bits": 4, "rank": 8, "batch": 1, "seq": 64}
    row |= {"policy": "save", "optimizer": "adamw_8bit", "masters": "library", "graphs": False}
    known = prediction_of(row, "h100", 80 << 30)
    slow = prediction_of(row | {"host_us_per_op": 2 * ASSUMED_US}, "h100", 80 << 30)
    assert slow.step_s == pytest.approx(2 * known.step_s)


@pytest.mark.slow
def test_the_figure_tells_a_hosts_steps():
    """Every row of the record within the target; for the assumed host, those that wait are not."""
    (file,) = (RESULTS / "host").glob("*a5ac720.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    kind = record["gpu"], record["gpu_memory_bytes"]
    waited = 0
    for row in record["rows"]:
        made = prediction_of(row, *kind)
        assert made.step_s == pytest.approx(row["ms_median"] / 1e3, rel=SPEED)
        assert made.peak_bytes / GIB == pytest.approx(row["peak_allocated_gib"], rel=0.01)
        assert made.recorded is row["graph"]
        if made.limited_by == "host":
            waited += 1
            assumed = prediction_of({**row, "host_us_per_op": None}, *kind)
            assert assumed.step_s > 1.5 * row["ms_median"] / 1e3
    assert waited == 7


def test_this_machine_has_its_own_figure(monkeypatch):
    assert this_machine() is None or this_machine().host_measured
    monkeypatch.setattr(gpus, "this_gpu", lambda: GPU)
    monkeypatch.setattr(gpus, "_host_us", lambda: 7.25)
    found = this_machine()
    assert found is not None
    assert (found.name, found.host_us, found.host_measured) == ("h100", 7.25, True)


def test_a_plan_says_that_it_was_assumed():
    """And does not where it was measured."""
    there = planner("20GiB")
    measured = Planner(
        there.config, replace(there.gpu, host_us=8.5, host_measured=True), there.budget
    )
    setup = Setup(rank=8, seq=512, activations="save")
    said, silent = (make_plan(one, setup, "m") for one in (there, measured))
    assert f"note: host: assumed, {ASSUMED_US:g} µs for a small op" in str(said)
    assert "host: assumed" not in str(silent)
    assert [one.to_dict()["host_measured"] for one in (said, silent)] == [False, True]
    assert silent.to_dict()["run"]["host_us_per_op"] == 8.5


def test_pinning_is_the_first_steps():
    """Named, in proportion to what waits on the host, and no part of the step's time."""
    away = Setup(rank=8, seq=1 << 16, activations="offload")
    made = predict(llama(), away, GPU)
    pinned = made.host["checkpoints"]
    assert made.pinning_s == pytest.approx(PINNING_S * pinned / GIB)
    assert made.pinning_s > 0
    text = memory_table(made)
    assert f"first step +{made.pinning_s:.2g} s: pinning" in text
    twice = predict(llama(), away.with_tokens(seq=1 << 17), GPU)
    assert twice.pinning_s == pytest.approx(2 * made.pinning_s, rel=0.2)
    stays = predict(llama(), replace(away, activations="recompute_all"), GPU)
    assert stays.pinning_s == 0
    assert "pinning" not in memory_table(stays)
