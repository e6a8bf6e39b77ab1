"""A benchmark's process: out of memory is a row, the next point follows; other errors end it."""

import json
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from qlora_kit.bench import child
from qlora_kit.bench.session import read_rows
from qlora_kit.bench.subject import Build, Job, NotPossible, Point, Stage, Subject
from qlora_kit.bench.tables import tables_of
from tests.bench.rows import record_of

BUILD = Build(impl="failing", model="tiny", checkpoint="", device="cpu", dtype="float32")
POINTS = tuple(Point(batch=1, seq=seq, policy="save") for seq in (16, 64, 32))


def subject_that(fails) -> Subject:
    """One weight; the loss of rows of 64 tokens fails."""
    weight = nn.Parameter(torch.ones(2))

    def loss(batch):
        if batch["input_ids"].shape[1] == 64:
            raise fails
        return weight.sum() * 0.5

    optimizer = torch.optim.AdamW([weight])
    return Subject(model=nn.Module(), loss=loss, parameters=[weight], optimizer=optimizer)


@pytest.fixture
def library(monkeypatch):
    """A library whose `build` is the test's."""
    module = ModuleType("failing_library")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(child.BUILDERS, "failing", module.__name__)
    return module


def rows_of(tmp_path):
    file = tmp_path / "rows.jsonl"
    job = Job(build=BUILD, points=POINTS, warmup=1, steps=2, rows_file=str(file))
    child.run_job(job, Stage())
    return read_rows(file)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_out_of_memory_is_a_row_and_the_next_point_follows(library, tmp_path, error, capsys):
    library.build = lambda build, stage: subject_that(error)
    short, long, last = rows_of(tmp_path)
    assert [row["seq"] for row in (short, long, last)] == [16, 64, 32]
    assert [row["oom"] for row in (short, long, last)] == [False, True, False]
    assert "tokens_per_s" not in long
    assert min(short["tokens_per_s"], last["tokens_per_s"]) > 0
    assert "out of memory" in capsys.readouterr().out


def test_an_update_cut_short_leaves_no_state_behind(library, tmp_path):
    made = subject_that(torch.OutOfMemoryError("CUDA out of memory"))
    library.build = lambda build, stage: made
    rows_of(tmp_path)
    (entry,) = made.optimizer.state.values()
    assert int(entry["step"]) == 4  # of the last point alone: the check, a warm-up, two timed


def test_out_of_memory_while_loading_is_a_row_for_every_point(library, tmp_path):
    def build(build, stage):
        raise torch.OutOfMemoryError("CUDA out of memory")

    library.build = build
    assert [row["oom"] for row in rows_of(tmp_path)] == [True] * 3


def test_what_a_library_cannot_do_is_a_reason(library, tmp_path):
    def build(build, stage):
        raise NotPossible("needs a GPU")

    library.build = build
    assert {row["skipped"] for row in rows_of(tmp_path)} == {"needs a GPU"}


def test_another_error_ends_the_process(library, tmp_path):
    library.build = lambda build, stage: subject_that(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        rows_of(tmp_path)
    (kept,) = read_rows(tmp_path / "rows.jsonl")  # what was measured before
    assert kept["seq"] == 16


def test_such_a_row_is_in_the_table(library, tmp_path):
    library.build = lambda build, stage: subject_that(torch.OutOfMemoryError("CUDA out of memory"))
    rows = [row | {"impl": "qlora_kit"} for row in rows_of(tmp_path)]
    tables = tables_of(record_of(*json.loads(json.dumps(rows)), bench="speed"))
    cells = [cell for table in tables for row in table.rows for cell in row]
    assert cells.count("out of memory") == 1
