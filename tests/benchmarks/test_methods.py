"""`python -m benchmarks.methods`: every method trains, the best rate is taken, cuts are told."""

import json
import multiprocessing
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.methods import crew, report, schedule, stock
from benchmarks.methods import work as worked
from benchmarks.methods.__main__ import main, shapes_of
from benchmarks.methods.cases import BY_NAME, CASES, TASKS, Job, budget_row, split_rows
from benchmarks.methods.work import Workshop, reduced
from qlora_kit.adapters.registry import METHODS, OTHERS
from qlora_kit.bench.random_checkpoint import write_checkpoint

ROWS = 100


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny dense model, and rows in the places of the demo's."""
    folder = tmp_path_factory.mktemp("methods")
    write_checkpoint("tiny", folder / "tiny", storage="bf16", device="cpu", dtype=torch.float32)
    for task in TASKS:
        for name in (task.train, task.test):
            (folder / name).parent.mkdir(exist_ok=True)
            words = ("yes", "no") if task.evaluation == "choice" else ('{"a":1}', '{"b":2}')
            rows = [{"prompt": f"{i}?", "completion": words[i % 2]} for i in range(ROWS)]
            (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def shop(space, tmp_path, factor=0.03):
    tasks = [reduced(task, factor) for task in TASKS]
    shapes = shapes_of(["demo:2x8", "tiny:2x8"])
    return Workshop(str(space / "tiny"), tasks, shapes, space, tmp_path)


def test_every_method_is_there():
    assert {case.method for case in CASES} == {*METHODS, *OTHERS}
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_every_method_trains(space, tmp_path, case):
    bench = shop(space, tmp_path)
    row = bench.do(Job(what="run", case=case, task="reviews", rate=1e-2, seed=1))
    if case == "adapter_drop":  # the tiny model has two layers
        assert "drop_layers" in row["error"]
        return
    assert "error" not in row, row
    assert row["updates"] == 2
    assert row["set"] == "test"
    assert row["trainable"] > 0
    assert 0 <= row["score"] <= 1


@pytest.mark.parametrize("case", ["lora", "loftq", "prefix", "full"])
def test_jobs_leave_nothing_behind(space, tmp_path, case):
    bench = shop(space, tmp_path)
    job = Job(what="run", case=case, task="commands", rate=1e-2, seed=1)
    first = bench.do(job)
    (timed,) = schedule.speed_jobs([BY_NAME[case]], [bench.shapes["demo"]])
    assert bench.do(timed)["ms"] > 0
    random = schedule.speed_jobs([BY_NAME[case]], [bench.shapes["tiny"]])
    assert [bench.do(job)["ms"] > 0 for job in random] == ([] if case == "loftq" else [True])
    again = bench.do(job)
    assert first["loss"] == again["loss"] > 0
    other = bench.do(Job(what="run", case=case, task="commands", rate=1e-2, seed=2))
    assert other["loss"] != first["loss"]


def test_rows_do_not_meet(space, tmp_path):
    task = reduced(TASKS[0], 0.03)
    paths = split_rows(task, space, tmp_path)
    train, validation = (
        set(paths[name].read_text().splitlines()) for name in ("train", "validation")
    )
    assert len(train) == task.train_rows
    assert len(validation) == task.validation_rows
    assert not train & validation
    tuning = paths["tuning"].read_text().splitlines()
    assert tuning == paths["train"].read_text().splitlines()[: task.tuning_updates * task.batch]
    with pytest.raises(SystemExit, match="needs more"):
        split_rows(TASKS[0], space, tmp_path)


def test_rows_are_split_at_line_feeds_alone(tmp_path):
    # U+0085 ends a line for str.splitlines; a review of rotten_tomatoes has one inside.
    task = replace(TASKS[0], train="rows.jsonl", updates=2, batch=1, validation_rows=1)
    rows = [json.dumps({"text": f"{i}\u0085and more"}, ensure_ascii=False) for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    paths = split_rows(task, tmp_path, tmp_path / "parts")
    assert paths["train"].read_text(encoding="utf-8").split("\n") == [*rows[:2], ""]
    assert paths["validation"].read_text(encoding="utf-8") == rows[2] + "\n"


def tuned(rate, loss, case="lora"):
    return {
        "what": "tune",
        "method": case,
        "task": "reviews",
        "shape": None,
        "rate": rate,
        "seed": schedule.TUNING_SEED,
        "loss": loss,
    }


@pytest.mark.parametrize(
    ("losses", "best", "wider"),
    [
        ((3, 1, 2), 1, None),
        ((1, 2, 3), 0, -2),
        ((3, 2, 1), 2, 2),
        ((None, 5, None), 1, None),  # diverged
    ],
)
def test_a_grid_is_widened_where_its_end_is_best(losses, best, wider):
    case = BY_NAME["lora"]
    rows = [tuned(rate, loss) for rate, loss in zip(case.grid, losses, strict=True)]
    assert schedule.chosen_rate(rows, "lora", "reviews") == case.grid[best]
    expected = None if wider is None else case.beyond(wider)
    assert schedule.wider_rate(rows, case, "reviews") == expected


def test_a_grid_is_widened_twice_at_most():
    case = BY_NAME["lora"]
    rates = [*case.grid, case.beyond(2), case.beyond(3)]
    rows = [tuned(rate, -index) for index, rate in enumerate(rates)]
    assert schedule.wider_rate(rows[:4], case, "reviews") == case.beyond(3)
    assert schedule.wider_rate(rows, case, "reviews") is None


def test_seeds_wait_for_the_rate_and_come_whole():
    cases = [BY_NAME["lora"], BY_NAME["dora"]]
    jobs = schedule.training_jobs(cases, TASKS[:1], 2)
    board = schedule.Board(list(jobs))
    assert board.next_job().what == "base"
    tunings = [board.next_job() for _ in range(6)]
    assert {job.what for job in tunings} == {"tune"}
    assert board.next_job() is None  # nothing to do until a grid is done
    for job, loss in zip(tunings[:3], (3, 1, 2), strict=True):
        board.finished(job, tuned(job.rate, loss))
    run = board.next_job()
    assert (run.what, run.case, run.seed, run.rate) == ("run", "lora", 0, 1e-3)
    for job in tunings[3:]:
        board.finished(job, tuned(job.rate, job.rate, "dora"))
    wider = board.next_job()  # the lowest rate was best
    assert (wider.case, wider.rate) == ("dora", BY_NAME["dora"].beyond(-2))
    again = schedule.Board(jobs, list(board.rows))
    again.skip_done()
    kinds = [(job.what, job.case, job.rate) for job in again.pending[:2]]
    assert kinds == [("tune", "dora", wider.rate), ("base", None, None)]


def test_the_slowest_method_comes_first():
    cases = [BY_NAME["lora"], BY_NAME["dora"]]
    speeds = [{"what": "speed", "method": n, "ms": ms} for n, ms in (("lora", 2), ("dora", 3))]
    costs = schedule.costs_of([*speeds, {"what": "speed", "method": "x", "error": "no"}])
    jobs = schedule.training_jobs(cases, TASKS[:1], 2, costs)
    assert [(j.case, j.seed) for j in jobs if j.what == "run"] == [
        ("dora", 0),
        ("lora", 0),
        ("dora", 1),
        ("lora", 1),
    ]


def test_a_second_worker_finds_what_the_first_made(space, tmp_path, monkeypatch):
    job = Job(what="run", case="lora", task="commands", rate=1e-2, seed=1)
    first = shop(space, tmp_path)
    first.prepare([4, 16])
    row = first.do(job)
    for name in ("load", "build_dataset"):  # neither reads the checkpoint nor tokenizes
        monkeypatch.delattr(stock if name == "load" else worked, name)
    second = shop(space, tmp_path)
    again = second.do(job)
    assert again["loss"] == row["loss"] > 0
    assert "error" not in second.do(replace(job, case="full"))


def test_bases_are_copies(space, tmp_path):
    bench = shop(space, tmp_path)
    one, other = bench.stock.base(4), bench.stock.base(4)
    spaces = [{p.data_ptr() for p in model.parameters()} for model in (one, other)]
    assert not spaces[0] & spaces[1]
    held = spaces[0] & {p.data_ptr() for p in bench.stock._bases[4].parameters()}
    assert not held


def test_an_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    with crew.environment(crew.UNSEEN):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ


def test_a_record_of_speeds_alone_is_told(tmp_path):
    cases = [BY_NAME[name] for name in ("lora", "pissa", "bitfit")]
    budget = budget_row([], shapes_of(["tiny:2x8"]), cases, model="x", not_run=[])
    speeds = [
        {
            "what": "speed",
            "method": case.name,
            "shape": "tiny",
            "trainable": 7,
            "ms": ms,
            "tokens_per_s": 1e3 * 16 / ms,
            "fused": case.name == "lora",
            "peak_bytes": 2**30,
        }
        for case, ms in zip(cases, (2.0, 4.0, 3.0), strict=True)
    ]
    record = {"gpu": "G", "cpu": "C", "commit": "c", "rows": [budget, *speeds]}
    said = report.text(record, "r.json", ["pissa"])
    assert "Scores are not measured yet" in said
    assert "commit c (`r.json`)" in said
    resumed = record | {"rows": [budget, *(row | {"commit": "b"} for row in speeds)]}
    assert "commit c (speed b) (`r.json`)" in report.text(resumed, "r.json", ["pissa"])
    assert "Left out: LoRA r 16 from PiSSA" in said
    assert "| BitFit | 7 | 5,333 | 1.50* | 1.0 |" in said
    assert "PiSSA |" not in said
    assert "PiSSA |" in report.text(record, "r.json")


def test_spread_is_of_the_seeds():
    assert report.spread([0.5, 0.7]) == "60.0 ± 14.1 (50.0–70.0)"


def dies(pipe, setting, number):
    """A worker that ends at its first job; the one after it works."""
    if number == 0:
        pipe.send("ready")
        pipe.recv()
        return
    crew.work(pipe, setting, number)


def alone(space, tmp_path):
    return crew.Setting(
        model=str(space / "tiny"),
        tasks=(reduced(TASKS[0], 0.03),),
        shapes=(),
        demo=space,
        folder=tmp_path,
        workers=1,
    )


@pytest.mark.slow
def test_workers_are_spawned_where_they_cannot_be_forked(space, tmp_path, monkeypatch, capsys):
    def gone(*arguments, **more):
        raise EOFError

    context, forked = crew._context, SimpleNamespace(Pipe=multiprocessing.Pipe, Process=gone)
    monkeypatch.setattr(crew, "START", "forkserver")
    monkeypatch.setattr(
        crew, "_context", lambda method: forked if method == "forkserver" else context(method)
    )
    board = schedule.Board([])
    with crew.Crew(alone(space, tmp_path), board, time.monotonic() + 100) as found:
        found.run([Job(what="base", task="reviews")], alone=True)
    assert "cannot be started by forkserver" in capsys.readouterr().out
    assert 0 <= board.rows[0]["score"] <= 1


@pytest.mark.slow
def test_a_worker_that_ends_is_replaced(space, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "work", dies)
    setting = alone(space, tmp_path)
    board = schedule.Board([])
    with crew.Crew(setting, board, time.monotonic() + 100) as found:
        found.run([Job(what="base", task="reviews", seed=seed) for seed in (0, 1)], alone=True)
    assert found.left == []
    assert board.rows[0]["error"] == "the process ended with 0"
    assert 0 <= board.rows[1]["score"] <= 1
    assert len(crew.read_rows(tmp_path)) == 1


def words(space, tmp_path):
    found = ["--model", str(space / "tiny"), "--demo", str(space), "--out", str(tmp_path)]
    found += ["--work", str(tmp_path / "work"), "--budget", "0.03", "--seeds", "2", "--no-tune"]
    return [*found, "--methods", "lora", "bitfit", "--tasks", "reviews", "--speed", "demo:2x8"]


@pytest.mark.slow
def test_the_whole_command_and_its_report(space, tmp_path):
    assert main(words(space, tmp_path)) == 0
    (file,) = (tmp_path / "methods").glob("*.json")
    record = json.loads(file.read_text())
    assert [row["what"] for row in record["rows"]].count("run") == 4
    assert record["rows"][0]["not_run"] == []
    assert str(tmp_path) not in file.read_text()
    lines = len((tmp_path / "work" / "rows.jsonl").read_text().splitlines())
    document, figure = tmp_path / "doc.md", tmp_path / "doc.svg"
    document.write_text("above\n\n{}\n{}\n\nbelow\n".format(*report.MARKS))
    pytest.importorskip("matplotlib")
    write = ["--report", str(file), "--document", str(document), "--figure", str(figure)]
    for _ in range(2):  # the second time changes nothing
        assert main(write) == 0
        first = document.read_text(), figure.read_text()
    assert main(write) == 0
    assert first == (document.read_text(), figure.read_text())
    assert document.read_text().startswith("above")
    assert document.read_text().endswith("below\n")
    assert "| LoRA r 16 |" in document.read_text()
    # No time: what was done stays, what was not is named.
    assert main([*words(space, tmp_path), "--seeds", "3", "--total-seconds", "40"]) == 0
    record = json.loads(file.read_text())
    assert [row["what"] for row in record["rows"]].count("run") == 6
    rows = (tmp_path / "work" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == lines + 2


def test_workers_take_turns_at_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert crew.visible_gpus() == ("3", "GPU-5")
