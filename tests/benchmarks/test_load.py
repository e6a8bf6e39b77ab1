"""The benchmark of loading, on a CPU with a tiny model: that it runs and that its sums add up."""

import json
import sys

import pytest
import torch

from benchmarks.load import child
from benchmarks.load.load import breakdown, cases, line, make, run, summary
from benchmarks.load.rates import rates
from qlora_kit.bench.subject import Stage
from qlora_kit.load import hf_quantizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make("tiny", tmp_path_factory.mktemp("made"), "cpu")


def job(folder, **changes):
    fields = {"impl": "qlora_kit", "target": "nf4", "device": "cpu", "breakdown": False}
    return {**fields, "folder": str(folder), **changes}


@pytest.mark.parametrize(("source", "target"), [("bf16", "nf4"), ("nf4", "nf4"), ("bf16", "bf16")])
def test_phases_add_up_to_the_whole(source, target, folders, monkeypatch):
    monkeypatch.setattr(hf_quantizer, "UPLOADED_TO", ("cpu",))
    before = hf_quantizer.Uploader.upload
    row = child.measure(job(folders[source], target=target, breakdown=True), Stage())
    phases = row["phases_s"]
    assert abs(sum(phases.values()) - row["load_s"]) < 1e-3
    assert {"config and empty model", "headers"} <= set(phases) or target == "bf16"
    assert ("copying" in phases) == (target == "nf4")
    assert ("quantizing" in phases) == (source == "bf16" and target == "nf4")
    assert ("checking stored" in phases) == (source == "nf4")
    assert hf_quantizer.Uploader.upload is before  # the timers are gone
    said = breakdown({"source": source, "target": target, **row})
    assert "rest" in said


def test_a_phase_does_not_count_what_lies_in_another():
    timers = child.Timers()
    clock = iter([0.0, 1.0, 3.0, 10.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child.time, "perf_counter", lambda: next(clock))
        inner = timers.wrap("inner", lambda: None)
        timers.wrap("outer", inner)()
    assert timers.seconds == {"inner": 2.0, "outer": 8.0}


@pytest.mark.slow
def test_one_load_in_a_process_of_its_own(folders, tmp_path):
    row = run(cases(True, False)[0], folders["bf16"], "cpu", 100.0, tmp_path)
    assert "failed" not in row, row
    assert row["load_s"] > 0
    assert "qlora_kit" in line(row)
    assert "s   host" in line(row)
    assert f"[{row['load_s']:.2f}]" in summary([row])
    assert json.loads((tmp_path / "job.json").read_text())["device"] == "cpu"
    assert "torch" in sys.modules


@pytest.mark.slow
def test_a_load_that_fails_says_so(folders, tmp_path):
    (tmp_path / "nothing").mkdir()
    row = run(cases(False, False)[0], tmp_path / "nothing", "cpu", 100.0, tmp_path)
    assert row["failed"]
    assert "failed" in line(row)
    assert not summary([row])


def test_rates_are_rates(folders):
    found = rates(folders["bf16"])
    assert found["read_file_gbs"] > 0
    assert found["read_mapping_1_thread_gbs"] > 0
    assert ("gpu_from_pinned_gbs" in found) == torch.cuda.is_available()
