"""The benchmark of loading, on a CPU with a tiny model: that it runs and that its sums add up."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.load import child
from benchmarks.load import load as command
from benchmarks.load.load import breakdown, cases, line, make, run, summary, together
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


def test_ways_and_runs_are_chosen():
    every = cases(peers=True, cold=True)
    assert {case.way for case in every} == {"bf16-nf4", "nf4-nf4", "bf16-bf16"}
    some = cases(peers=True, cold=False, ways=["bf16-nf4"], runs=1)
    assert {"qlora_kit", "peft"} <= {case.impl for case in some}
    assert {(case.way, case.runs) for case in some} == {("bf16-nf4", 1)}
    assert {case.impl for case in cases(True, False, impls=["peft"])} == {"peft"}


def test_a_round_has_a_process_of_each_case():
    chosen = [command.Case("a", "bf16", "nf4", 2), command.Case("b", "bf16", "nf4", 1)]
    rows = list(together(chosen, lambda case, *_, **more: {"impl": case.impl} | more, lambda: 90.0))
    assert sorted(row["impl"] for row in rows) == ["a", "a", "b"]
    assert all(row["turns"] for row in rows)
    assert not list(together(chosen, lambda *_: {}, lambda: 1.0))


@pytest.mark.slow
def test_the_command_with_processes_that_take_turns(tmp_path, monkeypatch, capsys):
    two = [replace(case, runs=1) for case in cases(False, False) if case.way == "nf4-nf4"]
    monkeypatch.setattr(command, "cases", lambda *_, **__: two)
    words = ["load.py", "--model", "tiny", "--together", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path)])
    command.main()
    (file,) = (tmp_path / "load").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row.get("turns") for row in rows] == [True] * 2, rows
    assert "into the page cache" in capsys.readouterr().out


def test_an_interrupted_run_has_the_rows_it_measured(tmp_path, monkeypatch):
    def interrupted(case, *_, **__):
        if case.breakdown:
            raise KeyboardInterrupt
        return {"impl": case.impl, "failed": "as if measured"}

    monkeypatch.setattr(command, "run", interrupted)
    monkeypatch.setattr(command, "line", lambda row: row["impl"])
    words = ["load.py", "--model", "tiny", "--folder", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    (file,) = (tmp_path / "load").glob("*.json")
    assert [row["impl"] for row in json.loads(file.read_text())["rows"]] == ["qlora_kit"]


def test_rates_are_rates(folders):
    found = rates(folders["bf16"])
    assert found["read_file_gbs"] > 0
    assert found["read_mapping_1_thread_gbs"] > 0
    assert ("gpu_from_pinned_gbs" in found) == torch.cuda.is_available()
