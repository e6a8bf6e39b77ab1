"""`benchmarks.plan`: planned runs of `train`, plans of methods' own code, what the grid covers."""

import json
from dataclasses import replace

import pytest
from torch import nn

from benchmarks.harness.record import RESULTS
from benchmarks.plan import coverage, methods, train
from benchmarks.plan.cases import GRID, jobs, of_sizes
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.subject import first_fields
from qlora_kit.train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from qlora_kit.train.planning import advice

KNOWN = {"peak_allocated_gib": 1.0, "predicted_gib": 1.0}


def rows_of_the_grid():
    made = jobs(GRID, device="cuda", warmup=2, steps=3)
    return [first_fields(job.build, p) | KNOWN for job in made for p in job.points]


# What is covered


def test_the_grid_lacks_nothing():
    rows = rows_of_the_grid()
    assert coverage.missing(rows) == []
    assert "missing: nothing" in coverage.table(rows)


@pytest.mark.parametrize(
    ("noun", "field", "value"),
    [("sequence", "seq", 32768), ("batch", "batch", 8), ("optimizer", "optimizer", "adamw_torch")],
)
def test_what_no_row_has_is_named(noun, field, value):
    rows = [row for row in rows_of_the_grid() if row[field] != value]
    assert (noun, value) in coverage.missing(rows)
    assert f"{noun} {value}" in coverage.table(rows).splitlines()[-1]


def test_a_row_without_a_measurement_covers_nothing():
    failed = [row | {"peak_allocated_gib": None} for row in rows_of_the_grid()]
    assert len(coverage.missing(failed)) == sum(map(len, coverage.NOUNS.values()))
    run = {"case": "full", "recompute": True, "optimizer": "adamw_8bit", "model": "Llama-3.2-1B"}
    facts = coverage.facts_of({"run": {**run, "batch": 1, "seq": 512}, **KNOWN})
    assert facts["method and policy"] == ("full", "recompute_all")


def test_the_records_lack_nothing():
    """What was measured on GPUs, and is held to predictions by `tests/plan/test_record.py`."""
    rows = coverage.recorded()
    assert coverage.missing(rows) == []
    assert coverage.main([]) == 0
    longest = [r for r in rows if r.get("seq") == 65536 and r.get("peak_allocated_gib")]
    assert {row["model"] for row in longest} >= {"Llama-3.2-1B", "Llama-3.1-8B"}


def test_sizes_are_chosen():
    made = jobs(GRID, device="cuda", warmup=2, steps=3)
    (only,) = of_sizes(made, ["1x65536:offload"])
    assert only.build.model == "Llama-3.1-8B"
    assert [p.steps for p in only.points] == [1]  # it takes a quarter of a minute
    assert of_sizes(made, ["3x3:save"]) == []


# Plans of own code


def test_toys_are_planned_then_measured(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert methods.main(["--plan", str(file), "--tiny"]) == 0
    said = json.loads(file.read_text())
    said["rows"] = said["rows"][1:2]
    file.write_text(json.dumps(said))
    assert methods.main(["--run", str(file), "--out", str(tmp_path)]) == 0
    (written,) = (tmp_path / "plan_methods").glob("*.json")
    (row,) = json.loads(written.read_text())["rows"]
    assert row["run"]["case"] == "prefix"
    assert row["predicted_gib"] == said["rows"][0]["predicted_gib"]
    assert row["tokens_per_s"] > 0
    assert row["peak_allocated_gib"] is None  # without a GPU
    assert "not compared" in capsys.readouterr().out


def test_no_run_starts_when_time_is_up(tmp_path):
    file = tmp_path / "plan.json"
    methods.main(["--plan", str(file), "--tiny"])
    methods.main(["--run", str(file), "--limit-seconds", "-1", "--out", str(tmp_path)])
    (written,) = (tmp_path / "plan_methods").glob("*.json")
    assert {row["error"] for row in json.loads(written.read_text())["rows"]} == {
        "no time left in this run"
    }


def test_what_a_library_holds_on_to_is_let_go():
    """bitsandbytes keeps modules whose state is to have other bits, their weights with them."""
    optim = pytest.importorskip("bitsandbytes").optim
    held = optim.GlobalOptimManager.get_instance()
    held.register_module_override(nn.Embedding(2, 2), "weight", {"optim_bits": 32})
    assert held.module_weight_config_triple
    methods.forget_overrides()
    assert not held.module_weight_config_triple


@pytest.mark.slow
def test_peaks_of_own_code_and_of_full_fine_tuning_are_as_measured():
    """Recorded predictions came first; today's are held to the same 1%."""
    (file,) = (RESULTS / "plan_methods").glob("*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for row in record["rows"] if row.get("peak_allocated_gib")]
    assert len(rows) >= 14
    assert {row["run"]["case"] for row in rows} >= {"pfeiffer", "prefix", "glora", "full"}
    kind = record["gpu"], record["gpu_memory_bytes"]
    for row in rows:
        peak, run = row["peak_allocated_gib"], methods.Run(**row["run"])
        again = methods.predicted(run, *kind)
        assert row["left_before_gib"] == 0
        for said in (row["predicted_gib"], again["predicted_gib"]):
            assert abs(said / peak - 1) < 0.01, str(run)
        wrong = replace(run, recompute=not run.recompute)
        if run.case == "full":  # whose update is the peak, recomputed or not
            wrong = replace(run, optimizer="adamw_torch_fused")
        other = methods.predicted(wrong, *kind)
        assert abs(other["predicted_gib"] / peak - 1) > 0.01, "another run's plan would pass"


def test_a_run_is_planned_as_train_plans_it():
    """Recomputation asked for, the method's own settings, the base's bits."""
    for run in methods.RUNS:
        config = methods.config_for(run)
        assert config.train.gradient_checkpointing == run.recompute
        assert config.model.bits == (16 if run.case == "full" else 4)
    kept, again = (
        methods.predicted(replace(methods.TOY[0], seq=2048, recompute=r), "l4")["predicted_gib"]
        for r in (False, True)
    )
    assert again < kept


def test_a_records_rows_are_predicted_anew(tmp_path, capsys):
    row = {"run": methods.asdict(methods.TOY[0]), "peak_allocated_gib": 0.1, "tokens_per_s": 1e4}
    record = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 80 << 30, "rows": [row]}
    file = tmp_path / "record.json"
    found = []
    for host_us in (11.0, 44.0):
        row["host_us_per_op"] = host_us
        file.write_text(json.dumps(record))
        assert methods.main(["--again", str(file)]) == 0
        found.append(json.loads(file.read_text())["rows"][0]["predicted_tokens_per_s"])
    assert found[0] > 2 * found[1]
    assert "1 runs: peaks within" in capsys.readouterr().out


# Runs of `train`


def message() -> str:
    """What a run prints that was out of memory, by the package's own functions."""
    config = RunConfig(
        model=ModelConfig(path="/somewhere/tiny"),
        data=DataConfig(train="t.jsonl"),
        train=TrainConfig(batch_size=64, activations="save"),
    )
    found = advice(config, config_of("tiny"), [8192] * 64)
    return f"loading /somewhere/tiny\nqlora-kit: out of memory (CUDA out of memory).\n\n{found}\n"


def told(text, tmp_path, run=train.RUNS[2]):
    return train.told(run, text, tmp_path, {"/somewhere/tiny": "tiny", str(tmp_path): "."})


def test_what_a_run_out_of_memory_says_is_kept(tmp_path):
    row = told(message(), tmp_path) | {"exit": 2, "seconds": 1.0}
    assert row["printed"][0].startswith("qlora-kit: out of memory")
    assert row["settings_that_fit"] >= 2
    assert "/somewhere" not in json.dumps(row)
    assert train.complaint(row) is None
    assert train.complaint({**row, "exit": 0}) == "exit status 0 instead of 2"
    bare = told("qlora-kit: out of memory.\n", tmp_path) | {"exit": 2}
    assert train.complaint(bare) == "no table"
    table = [line for line in row["printed"] if not line.startswith("  --")]
    without = told("\n".join(table), tmp_path) | {"exit": 2}
    assert train.complaint(without) == "no settings that fit"
    none = {**without, "printed": [*table, "nothing near fits 2.00 GiB: a smaller model"]}
    assert train.complaint(none) is None
    assert "2 settings" in train.table([{**row, "settings_that_fit": 2}])


def test_the_recorded_runs_ended_as_they_must():
    """On a GPU: within 3% of what was said, evaluation included; out of memory; refused."""
    (file,) = (RESULTS / "plan_train").glob("*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    rows = {row["run"]: row for row in record["rows"]}
    assert set(rows) >= {"whole card", "6GiB", "out of memory", "refused"}
    assert record["gpu"] is not None
    assert [train.complaint(row) for row in rows.values()] == [None] * len(rows)
    planned = [row for row in rows.values() if row.get("plan")]
    assert all(row["evaluations"] == 2 and row["growing_segments"] for row in planned)
    assert rows["out of memory"]["settings_that_fit"] >= 2
    assert "load" not in rows["refused"].get("stages", {})


def test_what_a_planned_run_recorded_is_judged(tmp_path):
    run = train.RUNS[1]
    folder = tmp_path / "6GiB"
    folder.mkdir()
    said = {"setup": {"activations": "save", "keep_decoded": 0}, "tokens_per_s": 10.0}
    plan = {"predicted_gib": 1.02, "measured_gib": 1.0, "difference": 0.02, "predicted": said}
    record = {
        "plan": plan,
        "stages": [{"name": "plan", "seconds": 1.0}],
        "environment": {"growing_segments": True},
        "training": {"history": [{"tokens_per_s": 9.0}, {"eval_loss": 1.0}]},
    }
    (folder / "run.json").write_text(json.dumps(record))
    row = told("training peak: 1.02 GiB predicted\nother\n", tmp_path, run)
    row |= {"exit": 0, "seconds": 2.0}
    assert row["printed"] == ["training peak: 1.02 GiB predicted"]
    assert train.complaint(row) is None
    assert "+2.0%" in train.table([row])
    assert "off" in str(train.complaint(row | {"plan": plan | {"difference": -0.04}}))
    assert train.complaint(row | {"evaluations": 0}) == "nothing was evaluated"
    assert "WRONG" in train.table([row | {"exit": 1}])


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    """A run that is cut short has what was measured until then."""

    def cut(*_, **__):
        yield {"run": "one", "exit": 0, "expected_exit": 0, "evaluations": 1, "seconds": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "measure", cut)
    monkeypatch.setattr(train, "roomy_folder", lambda _: tmp_path / "not" / "there")
    assert train.main(["--out", str(tmp_path)]) == 0
    (written,) = (tmp_path / "plan_train").glob("*.json")
    assert [row["run"] for row in json.loads(written.read_text())["rows"]] == ["one"]


@pytest.mark.slow
def test_a_toy_is_trained_by_the_command(tmp_path):
    """Without a GPU nothing is planned; the process waits, runs and is recorded all the same."""
    wrong = train.Run(name="wrong", flags=("--train.batch_size", "none"), code=2)
    runs = (*train.TOY, wrong)
    limits = {"limit_seconds": 120, "total_seconds": 240}
    good, refused = list(train.measure(runs, tmp_path, gpu=False, **limits))
    assert good["exit"] == 0
    assert good["evaluations"] == 2
    assert len(good["tokens_per_s"]) == 6
    assert train.complaint(good) is None
    assert refused["exit"] == 2
    assert str(tmp_path) not in json.dumps([good, refused])
