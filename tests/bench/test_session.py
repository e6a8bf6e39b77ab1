"""Jobs in processes: several in one, what a process that dies costs, and what time leaves out."""

from pathlib import Path

import pytest

from qlora_kit.bench.process import Outcome
from qlora_kit.bench.session import Session, read_rows
from qlora_kit.bench.subject import Build, Job, Point, first_fields, read_jobs, write_row


def job(method="lora"):
    build = Build(impl="qlora_kit", model="tiny", checkpoint="", method=method, rank=4)
    return Job(build=build, points=tuple(Point(batch=1, seq=8 * n, policy="save") for n in (1, 2)))


def session(tmp_path, **limits):
    return Session(tmp_path, **{"limit_seconds": 60.0, "total_seconds": 60.0} | limits)


class Processes:
    """Stand in for `Session.start`: each writes so many rows, then ends as told."""

    def __init__(self, *ends):
        self.ends, self.seen = list(ends), []

    def __call__(self, words, environment=None):
        jobs = read_jobs(Path(words[-1]))
        self.seen.append([len(one.points) for one in jobs])
        rows, reason, last = self.ends.pop(0)
        pairs = [(one, point) for one in jobs for point in one.points]
        for one, point in pairs[:rows]:
            write_row(one.rows_file, first_fields(one.build, point) | {"tokens_per_s": 1.0})
        stages = [f"·    1.0 s  {mark}  tiny" for mark in last]
        return Outcome(
            code=1 if reason else 0,
            timed_out=False,
            seconds=1.0,
            tail=(reason,),
            stages=tuple(stages),
        )


def run(tmp_path, monkeypatch, *ends, **limits):
    made, processes = session(tmp_path, **limits), Processes(*ends)
    monkeypatch.setattr(made, "start", processes)
    made.run_together([job("lora"), job("lora_fa")])
    return processes.seen, [(r["method"], r["seq"], r.get("error")) for r in made.rows]


def test_several_jobs_share_a_process(tmp_path, monkeypatch):
    seen, rows = run(tmp_path, monkeypatch, (4, "", ("build", "point")))
    assert seen == [[2, 2]]
    assert [error for *_, error in rows] == [None] * 4


def test_a_point_that_ends_the_process_costs_itself(tmp_path, monkeypatch):
    ends = [(1, "killed", ("build", "point", "point")), (2, "", ("build", "point"))]
    seen, rows = run(tmp_path, monkeypatch, *ends)
    assert seen == [[2, 2], [2]]
    expected = [("lora", 8, None), ("lora", 16, "killed")]
    assert rows == [*expected, ("lora_fa", 8, None), ("lora_fa", 16, None)]


def test_a_job_that_builds_nothing_is_given_up_as_a_whole(tmp_path, monkeypatch):
    """Also where one before it in the same process had points."""
    ends = [(2, "no such model", ("build", "point", "point", "build"))]
    seen, rows = run(tmp_path, monkeypatch, *ends)
    assert seen == [[2, 2]]
    assert [error for *_, error in rows] == [None, None, "no such model", "no such model"]


def test_without_time_nothing_is_started(tmp_path, monkeypatch):
    seen, rows = run(tmp_path, monkeypatch, total_seconds=1.0)
    assert seen == []
    assert {error for *_, error in rows} == {"no time left in this run"}
    assert len(rows) == 4


@pytest.mark.slow
def test_real_jobs_in_one_process(tmp_path):
    """Each row is its own job's, and nothing of the first model is left for the second."""
    made = session(tmp_path, limit_seconds=120.0, total_seconds=120.0)
    build = Build(
        impl="qlora_kit", model="tiny", checkpoint="", rank=4, device="cpu", dtype="float32"
    )
    full = Build(
        impl="full",
        model="tiny",
        checkpoint="",
        method="full",
        bits=16,
        device="cpu",
        dtype="float32",
        optimizer="adamw_torch_fused",
    )
    point = Point(batch=1, seq=96, policy="save", graph=False)
    made.run_together([Job(build=b, points=(point,), warmup=0, steps=1) for b in (build, full)])
    assert [row["impl"] for row in made.rows] == ["qlora_kit", "full"]
    assert all(row["tokens_per_s"] > 0 for row in made.rows)
    assert len(list(tmp_path.glob("rows-*.jsonl"))) == 1
    assert made.rows[1]["imports_s"] < made.rows[0]["imports_s"]
    assert read_rows(tmp_path / "rows-0.jsonl") == made.rows
