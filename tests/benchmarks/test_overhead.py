"""`python -m benchmarks.train.overhead`: its turns, its rows, and what it reads from a trace."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.train import overhead, trace
from qlora_kit.bench import child
from qlora_kit.bench.ours import InTrainer
from qlora_kit.bench.steps import RECORDED_AFTER
from qlora_kit.bench.subject import Build, Job, Point, Stage
from qlora_kit.train.trainer import Trainer


def kernel(start: float, end: float, name: str = "k", correlation: int = 0) -> dict[str, Any]:
    event = {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start}
    return event | {"args": {"correlation": correlation}}


def host(start: float, end: float, name: str, cat: str = "cuda_runtime") -> dict[str, Any]:
    event = {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start}
    return event | {"args": {"correlation": 7 if "Graph" in name else -1}}


TRACE = [
    {"ph": "M", "name": "process_name"},  # no event of a step
    host(-10, 60, "cudaGraphLaunch"),
    host(150, 250, "cudaEventSynchronize"),
    host(255, 256, "cudaFuncGetAttributes"),
    host(258, 280, "aten::copy_", "cpu_op"),
    kernel(0, 100, "gemm", 7),
    kernel(104, 200, "gemm", 7),
    kernel(190, 230, "beside"),  # on another stream: 30 µs longer than the graph
    kernel(270, 290, "adamw"),  # 40 µs later
    kernel(291, 295, "adamw"),
]
"""Two steps; a graph that is replayed once, and three kernels outside of it."""


def test_a_trace_is_summed_up() -> None:
    found = trace.summary(reversed(TRACE), steps=2)
    assert (found["steps"], found["replays"], found["kernels"]) == (2, 1, 5)
    names = [(call["name"], call["calls"], call["ms"]) for call in found["calls"]]
    assert names == [("cudaEventSynchronize", 0.5, 0.05), ("cudaGraphLaunch", 0.5, 0.035)]
    outside = found["outside_graph"]
    assert (outside["kernels"], outside["ms"]) == (1.5, 0.032)
    assert outside["longest"] == [
        {"name": "beside", "calls": 0.5, "us": 20.0},
        {"name": "adamw", "calls": 1.0, "us": 12.0},
    ]
    assert found["idle_ms"] == pytest.approx((4 + 40 + 1) / 2e3)
    assert (found["long_gaps"], found["long_gaps_ms"]) == (0.5, 0.02)
    assert found["short_gaps_ms"] == pytest.approx(5 / 2e3)
    (gap,) = found["longest_gaps"]
    assert gap["us"] == 40
    assert gap["host_us"] == {
        "cudaEventSynchronize": 20,
        "aten::copy_": 12,
        "cudaFuncGetAttributes": 1,
    }
    text = "\n".join(trace.lines(found))
    assert "2 steps, 1 replays" in text
    assert "40.0 us  cudaEventSynchronize 20" in text


def test_a_kernel_beside_others_hides_no_gap_and_makes_none() -> None:
    """The end that counts is the last one so far, not that of the kernel before."""
    nested = [kernel(0, 100), kernel(10, 20), kernel(120, 130)]
    assert trace.summary(nested, 1)["idle_ms"] == pytest.approx(0.02)  # not 0.1


def test_no_gpu_no_kernels() -> None:
    found = trace.summary([host(0, 5, "aten::mm", "cpu_op")], steps=1)
    assert found["kernels"] == found["replays"] == found["idle_ms"] == 0
    assert found["longest_gaps"] == found["calls"] == []


def loop(name: str, turns: list[float], every: int | None = None, was: bool = False) -> Any:
    return overhead.Loop(name, every, was, turns)


def test_rows_are_beside_the_bare_loop() -> None:
    loops = [
        loop("bare", [98.0, 100.0, 102.0]),
        loop("new", [103.0, 101.0], every=1),
        loop("old", [104.0, 108.0], every=1, was=True),
        loop("no time", [], every=5),
    ]
    rows = overhead.rows_of(loops, {"model": "m"}, {"kernels": 3})
    assert [row["loop"] for row in rows] == ["bare", "new", "old"]
    assert [row["overhead"] for row in rows] == pytest.approx([0.0, 0.02, 0.06])
    assert [(row["ms_min"], row["ms_max"]) for row in rows] == [(98, 102), (101, 103), (104, 108)]
    assert [row.get("profile") for row in rows] == [None, {"kernels": 3}, None]
    assert "+6.00%" in overhead.table(rows)


def test_as_it_was_waits() -> None:
    config = SimpleNamespace(non_blocking=True)
    trainer: Any = SimpleNamespace(
        logs_late=True, accelerator=SimpleNamespace(dataloader_config=config)
    )
    overhead.as_it_was(trainer)
    assert (trainer.logs_late, config.non_blocking) == (False, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for real sizes on a GPU")
def test_loops_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model: every Trainer has its lines, the old one is changed, and all are fused."""
    changed: list[int] = []
    seen: list[tuple[bool, int, int]] = []
    as_it_was, train = overhead.as_it_was, Trainer.train

    def noted_change(trainer: Trainer) -> None:
        changed.append(int(trainer.args.logging_steps))
        as_it_was(trainer)

    def noted_train(trainer: Trainer) -> Any:
        args = trainer.args
        seen.append((trainer.fused is not None, int(args.logging_steps), args.max_steps))
        return train(trainer)

    monkeypatch.setattr(overhead, "as_it_was", noted_change)
    monkeypatch.setattr(Trainer, "train", noted_train)
    assert overhead.main(["--steps", "2", "--rounds", "2", "--out", str(tmp_path)]) == 0
    steps = 2 + 1 + RECORDED_AFTER
    round_of = [(True, every, steps) for every in (5, 1, 5, 1)]
    profiled = 2 * RECORDED_AFTER + 2 + overhead.PROFILED + 1
    assert seen == [*round_of, *round_of, (True, 1, profiled)]
    assert changed == [5, 1, 5, 1]
    (file,) = (tmp_path / "trainer_overhead").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["loop"] for row in rows] == [loop.name for loop in overhead.all_loops()]
    assert [len(row["turn_ms"]) for row in rows] == [3, 2, 2, 2, 2]
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["step"] == "fused"
    assert [row["profile"]["steps"] for row in rows if "profile" in row] == [overhead.PROFILED]


def test_what_there_is_no_time_for_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bare turns stay: there is nothing to compare with otherwise."""
    monkeypatch.setattr(overhead.Bench, "bare", lambda _bench: 1.0)
    nothing: Any = None
    bench = overhead.Bench(nothing, nothing, nothing, steps=1, device="cpu")
    loops = overhead.all_loops()
    assert overhead.take_turns(bench, loops, rounds=2, until=0.0) is None
    assert [len(loop.turn_ms) for loop in loops] == [3, 0, 0, 0, 0]
    assert "profile is left out" in capsys.readouterr().out


def test_the_trainer_of_a_subject_can_be_changed() -> None:
    """What the benchmark asks of `qlora_kit/bench/ours.py`."""
    from qlora_kit.bench.ours import build
    from qlora_kit.bench.subject import Build, Point, Stage

    built = Build(impl="qlora_kit", model="tiny", checkpoint="", device="cpu", dtype="float32")
    inside = build(built, Stage()).trainer
    assert isinstance(inside, InTrainer)
    told: list[Trainer] = []
    point = Point(batch=1, seq=16, policy="save")
    times = inside(point, "fused", 2, log_every=2, change=told.append)
    assert len(times) == 2
    (trainer,) = told
    assert trainer.args.logging_steps == 2
    assert trainer.optimizer is not None
    assert len(inside(point, "fused", 1)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_tiny_model_makes_sense() -> None:
    with pytest.raises(SystemExit, match="no GPU"):
        overhead.main(["--model", "Llama-3.1-8B"])


def test_overhead_is_over_the_bare_loops_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 ms inside, 10 before and 12 after: 9% more, whatever the card did meanwhile."""
    turns = iter([[10.0], [12.0]])
    monkeypatch.setattr(child, "timed_steps", lambda *_: (next(turns), []))

    def trainer(_point: Point, _step: str, steps: int) -> list[float]:
        return [12.0] * steps

    subject: Any = SimpleNamespace(trainer=trainer, prepare=lambda _point: nullcontext())
    job = Job(build=Build(impl="qlora_kit", model="tiny", checkpoint=""), points=(), steps=2)
    point = Point(batch=2, seq=24, policy="save")
    found = child.in_trainer(subject, [], job, point, "fused", Stage())
    assert found["trainer_overhead"] == pytest.approx(12 / 11 - 1)
    assert found["trainer_tokens_per_s"] == pytest.approx(48 / 12e-3)


def test_an_interrupted_run_has_the_turns_it_took(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(bench: Any, loops: Any, *_: Any) -> None:
        if taken:
            loops[0].turn_ms.append(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(overhead, "take_turns", interrupted)
    for taken, status in ((True, 0), (False, 1)):
        out = tmp_path / str(taken)
        assert overhead.main(["--model", "tiny", "--steps", "1", "--out", str(out)]) == status
        assert taken == bool(list(out.rglob("*.json")))
