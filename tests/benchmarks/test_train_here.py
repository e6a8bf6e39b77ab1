"""`python -m benchmarks.train --here`, runs that are cut short, and rows of other settings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train import __main__ as command
from benchmarks.train import here, table
from benchmarks.train.cases import CASES, Options, plan
from benchmarks.train.here import Here
from qlora_kit.bench import session as sessions
from qlora_kit.bench.child import run_job
from qlora_kit.bench.process import Outcome, run_process
from qlora_kit.bench.random_checkpoint import write_checkpoint
from qlora_kit.bench.session import read_rows
from qlora_kit.bench.subject import Build, Job, Point, Stage, first_fields
from qlora_kit.core.allocator import NAMES

WORDS = ["--model", "tiny", "--steps", "1", "--warmup", "1", "--impls", "qlora_kit", "--here"]


def record(folder: Path) -> dict[str, Any]:
    """The one that was written."""
    (file,) = (folder / "train").glob("*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What transformers and the allocator's settings leave in the environment."""
    names = ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_every_case_of_ours_in_one_process(tmp_path: Path, capsys: Any) -> None:
    """The same bits, embeddings in host memory and decoded weights change no first loss."""
    assert command.main([*WORDS, "--work", str(tmp_path), "--out", str(tmp_path)]) == 0
    made = record(tmp_path)
    rows = made["rows"]
    assert {"full", "lean", "best", "small", "repeatable", "long"} <= {
        case for row in rows for case in row["cases"]
    }
    assert made["peaks"]["bf16_tflops"] > 0
    assert {row["deterministic"] for row in rows} == {False, True}
    assert {row["embeddings_on_host"] for row in rows} == {False, True}
    for row in rows:
        assert row["step"] == "fused"
        assert row["mfu"] > 0
        assert row["check_loss"] == pytest.approx(rows[0]["check_loss"], abs=1e-5)
    assert "host embeddings" in capsys.readouterr().out
    assert not list(tmp_path.glob("tiny*"))  # the checkpoint is gone


def test_peers_have_processes_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    """They patch what others import; what ours sets for itself is not in their environment."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    seen: list[dict[str, str]] = []

    def run(words: Any, **values: Any) -> Outcome:
        seen.append({**os.environ, **(values["environment"] or {})})
        return run_process(words, **values)

    monkeypatch.setattr(sessions, "run_process", run)
    monkeypatch.setattr(command, "use_growing_segments", lambda: os.environ.update({NAMES[0]: "x"}))
    words = [*WORDS, "--impls", "peft", "qlora_kit", "--cases", "best", "full"]
    words += ["--ours-rows", "full/3", "best/1", "--work", str(tmp_path), "--out", str(tmp_path)]
    assert command.main(words) == 0
    made = record(tmp_path)
    rows = {(row["impl"], row["policy"]): row for row in made["rows"]}
    assert [impl for impl, _ in rows] == ["qlora_kit", "qlora_kit", "peft"]
    assert rows["qlora_kit", "recompute_elementwise"]["cases"] == ["best"]
    assert rows["qlora_kit", "offload_attention:1,recompute_elementwise:1"]["cases"] == ["full"]
    (environment,) = seen  # ours have none
    assert NAMES[0] not in environment
    assert os.environ[NAMES[0]] == "x"
    for row in made["rows"]:
        assert row["loss_agrees"] is True
        assert row["mfu"] > 0


def test_a_job_that_fails_is_rows_and_the_next_one_follows(tmp_path: Path) -> None:
    """The rows before it are kept; without time left nothing begins."""
    session = Here(tmp_path, limit_seconds=60, total_seconds=60)
    folder = session.checkpoint("tiny", storage="nf4", dtype="float32", work=tmp_path)
    values = {"impl": "qlora_kit", "model": "tiny", "checkpoint": str(folder), "rank": 4}
    build = Build(**values, device="cpu", dtype="float32")
    points = tuple(Point(batch=1, seq=16, policy=p) for p in ("save", "nonsense", "offload"))
    session.run(Job(build=build, points=points, warmup=0, steps=1))
    assert ["error" in row for row in session.rows] == [False, True, True]
    session.run(Job(build=build, points=points[:1], warmup=0, steps=1))
    assert session.rows[-1]["tokens_per_s"] > 0
    late = Here(tmp_path, limit_seconds=60, total_seconds=-1)
    late.run(Job(build=build, points=points))
    assert [row["error"] for row in late.rows] == ["no time left in this run"] * 3


def test_an_interrupted_run_has_the_rows_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that measured none says so by its exit status."""
    ran: list[Job] = []

    def run(self: Here, job: Job) -> None:
        if len(ran) == done:
            raise KeyboardInterrupt
        ran.append(job)
        self._refuse(job, job.points[:1], "as if measured")

    monkeypatch.setattr(Here, "run", run)
    for done, status in ((1, 1), (0, 1)):
        ran.clear()
        out = tmp_path / str(done)
        words = [*WORDS, "--work", str(tmp_path), "--out", str(out)]
        assert command.main(words) == status
        if done:
            assert len(record(out)["rows"]) == 1
        else:
            assert not out.exists()


def test_rows_outlive_a_card_that_is_unusable(tmp_path: Path, monkeypatch: Any) -> None:
    """After an illegal access every call of CUDA fails, that for the rates included."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(here, "peaks", fail)
    monkeypatch.setattr(here, "start_counting", fail)
    words = [*WORDS, "--impls", "qlora_kit", "unsloth", "--cases", "lean", "--work", str(tmp_path)]
    assert command.main([*words, "--out", str(tmp_path), "--unsloth-variants", "compile"]) == 0
    made = record(tmp_path)
    assert made["peaks"] == {}
    assert [row["mfu"] for row in made["rows"]] == [None] * 3
    assert [row.get("skipped") for row in made["rows"]] == [None, None, "Unsloth needs a GPU"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_with_its_record(tmp_path: Path, by: signal.Signals) -> None:
    """Of processes, whose rows are read as they are; where a shell ignores SIGINT, too."""
    (tmp_path / "peaks.json").write_text('{"peaks": {"bf16_tflops": 1.0}}')
    words = [sys.executable, "-m", "benchmarks.train", *WORDS[:-1], "--cases", "small"]
    words += ["--peaks", str(tmp_path / "peaks.json"), "--policies", "save", "offload"]
    words += ["--work", str(tmp_path), "--out", str(tmp_path)]
    ignoring = "import signal, sys, os; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    ignoring += "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", ignoring, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "timed steps" in line:  # of the first point: its row is about to be written
            break
    for line in process.stdout:
        if "offload" in line:
            process.send_signal(by)
            break
    text = process.stdout.read()
    assert process.wait(60) == 0, text
    assert record(tmp_path)["rows"][0]["tokens_per_s"] > 0


def test_rows_of_other_settings(tmp_path: Path) -> None:
    """Embeddings in host memory and the same bits in every run change no loss."""
    folder, file = tmp_path / "tiny", tmp_path / "rows.jsonl"
    write_checkpoint("tiny", folder, storage="nf4", device="cpu", dtype=torch.float32)
    values = {"impl": "qlora_kit", "model": "tiny", "checkpoint": str(folder), "rank": 4}
    points = (Point(batch=2, seq=24, policy="save"),)
    deterministic = []
    for more in ({}, {"embeddings_on_host": True}, {"deterministic": True}, {}):
        build = Build(**values, **more, device="cpu", dtype="float32")
        run_job(Job(build=build, points=points, warmup=1, steps=2, rows_file=str(file)), Stage())
        deterministic.append(torch.are_deterministic_algorithms_enabled())
    found = read_rows(file)
    assert deterministic == [False, False, True, False]
    assert [row["embeddings_on_host"] for row in found] == [False, True, False, False]
    assert [row["deterministic"] for row in found] == [False, False, True, False]
    for row in found:
        assert row["losses"] == pytest.approx(found[0]["losses"], abs=1e-5)
    assert table.how(found[1]) == "save, host embeddings"
    assert table.how(found[1] | {"tile": None}) == "save, no tiles, host embeddings"


def test_a_record_gets_the_planners_peaks(tmp_path: Path, capsys: Any) -> None:
    """Of our rows alone; host embeddings and their order by layer make a difference."""
    file, out = tmp_path / "record.json", tmp_path / "merged.json"
    more = ({}, {"embeddings_on_host": True}, {"policy": "save:1,offload:1"})
    rows = []
    for impl in ("qlora_kit", "unsloth"):
        build = Build(impl=impl, model="tiny", checkpoint="")
        row = first_fields(build, Point(batch=4, seq=512, policy="offload:1,save:1"))
        rows += [row | {"step": "fused"} | extra for extra in more]
    about = {"bench": "train", "commit": "a", "gpu": "NVIDIA H100 80GB HBM3", "command": "c"}
    file.write_text(json.dumps(about | {"peaks": {}, "rows": rows, "gpu_memory_bytes": 80 << 30}))
    table.main([str(file), str(tmp_path / "cut-short.json"), "--predict", "--merge", str(out)])
    assert "there is no" in capsys.readouterr().out
    peaks = [row["predicted_gib"] for row in json.loads(out.read_text())["rows"]]
    assert peaks[3:] == [None] * 2  # settings are ours alone
    assert peaks[1] < peaks[0] < peaks[2]
    file.write_text(json.dumps(about | {"peaks": {}, "rows": rows}))
    with pytest.raises(SystemExit, match="too old"):
        table.main([str(file), "--predict"])
    with pytest.raises(SystemExit, match="no record"):
        table.main([str(tmp_path / "cut-short.json")])


def test_peers_of_another_commit_say_so() -> None:
    """What this commit measured itself stays; ours of another one is not taken."""
    point = Point(batch=4, seq=512, policy="save")
    rows = {}
    for impl in ("qlora_kit", "unsloth", "peft"):
        build = Build(impl=impl, model="tiny", checkpoint="")
        rows[impl] = first_fields(build, point) | {"tokens_per_s": 1.0}
    own = {"commit": "b", "gpu": "H100", "rows": [rows["qlora_kit"], rows["peft"]]}
    other = {
        "commit": "a",
        "gpu": "H100",
        "rows": [r | {"tokens_per_s": 2.0} for r in rows.values()],
    }
    found = table.with_peers(own, [other])["rows"]
    assert [row["impl"] for row in found] == ["qlora_kit", "peft", "unsloth"]
    assert [row.get("commit") for row in found] == [None, None, "a"]
    assert [row["tokens_per_s"] for row in found] == [1.0, 1.0, 2.0]
    with pytest.raises(SystemExit, match="different cards"):
        table.with_peers(own, [other | {"gpu": "H200"}])


def test_what_was_measured_outlives_a_later_failure() -> None:
    """A part that ran out of time says nothing of a point that another one has."""
    about = {"bench": "train", "commit": "a", "gpu": "x", "command": "c", "peaks": {}}
    build = Build(impl="unsloth", model="tiny", checkpoint="")
    row = first_fields(build, Point(batch=1, seq=8, policy="save"))
    good, bad = row | {"tokens_per_s": 1.0}, row | {"error": "no time left in this run"}
    for order in ([good, bad], [bad, good], [bad, good, bad]):
        (kept,) = table.merge([about | {"rows": [one]} for one in order])["rows"]
        assert kept.get("tokens_per_s") == 1.0
    assert table.merge([about | {"rows": [bad]}])["rows"] == [bad]


def test_one_row_of_unsloth_may_be_asked_for() -> None:
    """Ours and other peers are what they were."""
    rows = ("compile+tiled/unsloth", "compile/save")
    jobs = plan(CASES, Options(impls=("unsloth", "peft"), unsloth_rows=rows))
    found = {(j.build.impl, j.build.variant, p.policy) for j in jobs for p in j.points}
    assert {f"{variant}/{policy}" for impl, variant, policy in found if impl == "unsloth"} == set(
        rows
    )
    assert ("peft", "", "recompute_all") in found
    jobs = plan(CASES, Options(impls=("unsloth",), unsloth_rows=("small/compile/save",)))
    assert [p.cases for job in jobs for p in job.points] == [("small",)]


def test_rows_of_ours_may_be_asked_for() -> None:
    """By their number in a case; other cases keep theirs."""
    cases = [case for case in CASES if case.name in ("full", "long")]
    jobs = plan(cases, Options(impls=("qlora_kit",), ours_rows=("full/5", "full/3")))
    found = {(p.cases[0], p.policy) for job in jobs for p in job.points}
    full, long = cases
    assert found == {("full", full.ours[n].policy) for n in (4, 2)} | {
        ("long", one.policy) for one in long.ours
    }
    assert [job.build.embeddings_on_host for job in jobs if job.points[0].cases == ("full",)] == [
        True,
        False,
    ]
