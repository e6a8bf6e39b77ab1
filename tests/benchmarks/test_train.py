"""`python -m benchmarks.train`: its plan, its processes, its rows and its verdicts."""

import json
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import nn

from benchmarks.train import __main__ as command
from benchmarks.train import plot, table
from benchmarks.train.cases import CASES, IMPLS, LONG, Options, plan, scaled
from qlora_kit.bench.child import first_fields, run_job, run_point
from qlora_kit.bench.random_checkpoint import checkpoint_bytes, write_checkpoint
from qlora_kit.bench.session import read_rows
from qlora_kit.bench.shapes import MODELS
from qlora_kit.bench.steps import RECORDED_AFTER
from qlora_kit.bench.subject import Build, Job, Point, Stage, Subject
from qlora_kit.block.install import FusedBlocks

FIELDS = {
    *("impl", "model", "batch", "seq", "method", "rank", "policy", "optimizer", "cap_gib"),
    *("tokens_per_s", "peak_allocated_gib", "peak_reserved_gib", "host_gib", "oom"),
}
"""Of every measured row, as the record's contract has them; MFU and prediction come later."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint("tiny", folder, storage="nf4", device="cpu", dtype=torch.float32)
    return folder


def build_of(checkpoint, impl, **changes):
    values = {"impl": impl, "model": "tiny", "checkpoint": str(checkpoint), "rank": 4}
    return Build(**values, **{"device": "cpu", "dtype": "float32"} | changes)


def rows_of(tmp_path, build, *policies, **changes):
    """Rows of a job that is run in this process."""
    file = tmp_path / "rows.jsonl"
    points = tuple(Point(batch=2, seq=24, policy=p, cases=("full",)) for p in policies)
    job = Job(build=build, points=points, warmup=1, steps=2, rows_file=str(file), **changes)
    run_job(job, Stage())
    return read_rows(file)


# The plan


def test_every_case_has_a_plan():
    jobs = plan(CASES, Options())
    assert {name for job in jobs for p in job.points for name in p.cases} == {
        case.name for case in CASES
    }
    assert {job.build.impl for job in jobs} == set(IMPLS)
    assert all(p.cap_gib == 44.0 for job in jobs for p in job.points)


def test_a_point_of_two_cases_is_measured_once():
    jobs = plan(CASES, Options(impls=("qlora_kit",)))
    points = [(job.build.method, job.build.model, p) for job in jobs for p in job.points]
    keys = [(m, name, replace(p, cases=())) for m, name, p in points]
    assert len(keys) == len(set(keys))
    shared = [p for m, _, p in points if m == "lora" and p.policy == "recompute_all"]
    assert ("full", "lora_fa") in {p.cases for p in shared}
    # one process per model and way to build it, long rows aside: loading is paid for once
    kinds = {(job.build, job.points[0].batch * job.points[0].seq > LONG) for job in jobs}
    assert len(jobs) == len(kinds)


def test_unsloth_gets_a_process_for_each_shape():
    jobs = plan(CASES, Options(impls=("unsloth",)))
    assert all(len({(p.batch, p.seq) for p in job.points}) == 1 for job in jobs)
    assert {"compile", "eager"} <= {job.build.variant for job in jobs}
    fresh = plan(CASES, Options(impls=("qlora_kit",), fresh=True))
    assert all(len(job.points) == 1 for job in fresh)


def test_cases_are_run_in_the_order_that_was_asked_for(monkeypatch, tmp_path):
    """What is worth most comes first, where a run may be cut short."""
    seen = []
    monkeypatch.setattr(command, "measure", lambda _session, jobs, _arguments: seen.extend(jobs))
    monkeypatch.setattr(command, "finish", lambda *_: 0)
    command.main(["--model", "tiny", "--cases", "lean", "best", "--impls", "qlora_kit"])
    assert [job.points[0].cases[0] for job in seen] == ["lean", "best"]
    seen.clear()
    command.main(["--model", "tiny", "--cases", "best", "lean", "--impls", "qlora_kit"])
    assert [job.points[0].cases[0] for job in seen] == ["best", "lean"]


@pytest.mark.parametrize(
    ("policy", "layers", "wanted"),
    [
        ("save", 2, "save"),
        ("save:16,recompute_all:16", 32, "save:16,recompute_all:16"),
        ("save:16,recompute_all:16", 80, "save:40,recompute_all:40"),
        ("save:8,recompute_all:24", 2, "save:1,recompute_all:1"),
        ("offload:28,save:4", 2, "offload:1,save:1"),
        ("save:30,offload:1,recompute_all:1", 3, "save:1,offload:1,recompute_all:1"),
    ],
)
def test_mixtures_fit_the_model(policy, layers, wanted):
    assert scaled(policy, layers) == wanted


# The checkpoint


def test_checkpoint_is_the_same_for_ours_and_for_bitsandbytes(checkpoint, tmp_path):
    """First losses agree, and tell another checkpoint from this one."""
    ours, theirs = (
        rows_of(tmp_path / impl, build_of(checkpoint, impl), "save")[0]["check_loss"]
        for impl in ("qlora_kit", "peft")
        if not (tmp_path / impl).mkdir()
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    other = tmp_path / "other"
    write_checkpoint("tiny", other, storage="bf16", device="cpu", dtype=torch.float32)
    (tmp_path / "wrong").mkdir()
    (wrong,) = rows_of(tmp_path / "wrong", build_of(other, "qlora_kit"), "save")
    assert abs(wrong["check_loss"] - theirs) > 1e-3


def test_checkpoint_size_is_known_before(checkpoint):
    size = (checkpoint / "model.safetensors").stat().st_size
    assert checkpoint_bytes("tiny", "nf4") < size < 3 * checkpoint_bytes("tiny", "nf4")
    assert checkpoint_bytes("Llama-3.1-8B", "bf16") == pytest.approx(16.06e9, rel=0.001)
    assert checkpoint_bytes("Llama-3.1-8B", "nf4") == pytest.approx(5.7e9, rel=0.01)


# One process


def test_rows_of_ours(checkpoint, tmp_path, monkeypatch):
    """Every policy gives a row, the layers really run fused, and the Trainer is timed."""
    calls = []
    run = FusedBlocks.run
    monkeypatch.setattr(
        FusedBlocks, "run", lambda self, *args: calls.append(self.policies) or run(self, *args)
    )
    rows = rows_of(
        tmp_path, build_of(checkpoint, "qlora_kit"), "save", "recompute_all", trainer=True
    )
    layers, steps = 2, 1 + 1 + 2  # check, warm-up, timed
    bare = 2 * (RECORDED_AFTER + 2)  # before and after the Trainer
    inside = 1 + RECORDED_AFTER + 2 * 2
    assert len(calls) == 2 * layers * (steps + bare + inside)
    assert {policy for policies in calls for policy in policies} == {"save", "recompute_all"}
    for row in rows:
        assert set(row) >= FIELDS
        assert row["step"] == "fused"
        assert row["graph"] is False  # not without a GPU
        assert row["tokens_per_s"] > 0
        assert row["oom"] is False
        assert row["trainer_overhead"] > -1
        assert row["check_loss"] == pytest.approx(rows[0]["check_loss"], abs=1e-5)
        assert "skipped" not in row


def test_rows_of_the_eager_step(checkpoint, tmp_path):
    build = build_of(checkpoint, "qlora_kit", step="eager", method="lora_fa")
    full, none = rows_of(tmp_path, build, "recompute_all", "offload")
    assert full["step"] == "eager"
    assert full["check_loss"] > 0
    assert "no policy offload" in none["skipped"]
    assert "tokens_per_s" not in none


@pytest.mark.parametrize("impl", ["peft_liger", "unsloth"])
def test_peers_that_need_a_gpu_are_skipped_with_a_reason(checkpoint, tmp_path, impl):
    (row,) = rows_of(tmp_path, build_of(checkpoint, impl), "save")
    assert "GPU" in row["skipped"]
    assert "tokens_per_s" not in row


def test_peers_do_not_pretend_to_know_lora_fa(checkpoint, tmp_path):
    (row,) = rows_of(tmp_path, build_of(checkpoint, "peft", method="lora_fa"), "save")
    assert "lora_fa" in row["skipped"]


class Failing(nn.Module):
    """Raises an error in its loss from the n-th call on."""

    def __init__(self, error, after):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.error, self.left = error, after

    def loss(self, batch):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.weight.sum() * batch["input_ids"].float().mean()


def failing_subject(error, after=2):
    model = Failing(error, after)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    return Subject(model=model, loss=model.loss, parameters=parameters, optimizer=optimizer)


def one_point(subject, checkpoint):
    job = Job(build=build_of(checkpoint, "peft"), points=(), warmup=1, steps=2)
    point = Point(batch=1, seq=8, policy="save", cases=("full",))
    return run_point(subject, job, point, Stage(), vocab=64)


def test_out_of_memory_is_a_result(checkpoint):
    """The row says so, gradients are dropped, and the next point runs."""
    subject = failing_subject(torch.OutOfMemoryError("CUDA out of memory. Tried to ..."))
    row = one_point(subject, checkpoint)
    assert row["oom"] is True
    assert "tokens_per_s" not in row
    assert subject.parameters[0].grad is None
    subject.model.left = 99
    assert one_point(subject, checkpoint)["tokens_per_s"] > 0


def test_any_other_error_is_not_out_of_memory(checkpoint):
    with pytest.raises(RuntimeError, match="shapes"):
        one_point(failing_subject(RuntimeError("shapes do not fit")), checkpoint)


def test_restart_undoes_what_was_learned(checkpoint):
    subject = failing_subject(RuntimeError(), after=9)
    with torch.no_grad():
        subject.parameters[0].zero_()
    subject.restart()
    subject.loss({"input_ids": torch.ones(2)}).backward()
    subject.update()
    assert subject.parameters[0].any()
    subject.restart()
    assert not subject.parameters[0].any()


# The command


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    """Fresh processes, table and record; a point that fails costs itself alone."""
    words = ["--model", "tiny", "--steps", "2", "--warmup", "1", "--out", str(tmp_path)]
    words += ["--work", str(tmp_path / "work"), "--cases", "full", "--profile"]
    peers = ["--impls", "qlora_kit", "peft", "unsloth", "--unsloth-variants", "compile"]
    policies = ["--policies", "nonsense", "save"]
    assert command.main([*words, *peers, *policies]) == 1
    (file,) = (tmp_path / "train").glob("*.json")
    record = json.loads(file.read_text())
    rows = {(row["impl"], row["policy"]): row for row in record["rows"]}
    assert "nonsense" in rows["qlora_kit", "nonsense"]["error"]
    assert "GPU" in rows["unsloth", "unsloth"]["skipped"]
    for key in (("qlora_kit", "save"), ("peft", "recompute_all")):
        assert set(rows[key]) >= FIELDS | {"mfu", "predicted_gib"}
        assert 0 < rows[key]["mfu"] < 1
        assert rows[key]["loss_agrees"] is True
    assert record["peaks"]["bf16_tflops"] > 0
    printed = capsys.readouterr().out
    assert "failed: " in printed
    assert "skipped: Unsloth needs a GPU" in printed
    assert not list((tmp_path / "work").iterdir())  # the checkpoint is gone
    table.main([str(file)])


def test_without_a_gpu_only_the_tiny_model_makes_sense(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        command.main(["--cases", "full"])


def test_profile_means_ours_unless_named():
    assert command.options(command.parse(["--profile"])).profile == ("qlora_kit",)
    assert command.options(command.parse(["--profile", "unsloth"])).profile == ("unsloth",)
    assert command.options(command.parse([])).profile == ()
    assert command.options(command.parse(["--cap-gib", "0"])).cap_gib is None


# The table


def made_rows(speed=14_000.0, peak=8.0, unsloth=10_600.0, off=0.0):
    """Rows of the case `full`, as they would come from a GPU."""
    rows = []
    for job in plan([CASES[0]], Options(unsloth_variants=("compile",))):
        for point in job.points:
            ours = job.build.impl == "qlora_kit"
            row = first_fields(job.build, point)
            row |= {"tokens_per_s": speed if ours else unsloth, "step": "fused"}
            row |= {"peak_allocated_gib": peak if ours else 7.8, "mfu": 0.5}
            row |= {"check_loss": 12.0 + (off if ours else 0.0)}
            rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [True, True, True]),
        ({"speed": 13_000.0}, [False, False, True]),
        ({"unsloth": 12_000.0}, [True, False, True]),
        ({"peak": 9.5}, [True, True, False]),
        ({"off": 0.2}, [None, None, None]),  # a wrong loss meets nothing
    ],
)
def test_targets_are_judged(changes, wanted):
    rows = made_rows(**changes)
    text = table.report(rows)
    assert [met for _, met in table.judge(CASES[0], rows)] == wanted
    assert ("MISSED" in text) is (False in wanted)
    assert ("LOSS DIFFERS" in text) is ("off" in changes)


def test_the_best_row_that_fits_counts():
    rows = made_rows()
    best = replace(CASES[0], target=replace(CASES[0].target, peak_gib=9.0))
    rows.append(rows[0] | {"policy": "save", "tokens_per_s": 20_000.0, "peak_allocated_gib": 30.0})
    assert table.judge(best, rows)[0][0].endswith("14,000")


def test_a_graphs_memory_is_what_it_reserves():
    """A CUDA graph's memory does not show as allocated."""
    rows = [row for row in made_rows(peak=8.0) if "offload_attention" not in row["policy"]]
    rows[0] |= {"graph": True, "peak_reserved_gib": 9.5}
    assert [met for _, met in table.judge(CASES[0], rows)] == [True, True, False]
    rows[0]["graph"] = False
    assert [met for _, met in table.judge(CASES[0], rows)] == [True, True, True]


def test_out_of_memory_and_failures_are_said():
    rows = made_rows()
    changes = cycle([{"oom": True}, {"error": "killed by SIGKILL"}, {"skipped": "no GPU"}])
    ours = [row for row in rows if row["impl"] == "qlora_kit"]
    for row, change in zip(ours, changes, strict=False):
        row |= change
        del row["tokens_per_s"]
    text = table.report(rows)
    assert "out of memory" in text
    assert "failed: killed by SIGKILL" in text
    assert "skipped: no GPU" in text
    assert "not measured" in text


def test_another_shape_is_not_judged():
    rows = [row | {"seq": 1024} for row in made_rows()]
    assert table.judge(CASES[0], rows) == []


def test_lora_fa_is_compared_with_lora():
    rows = made_rows()
    rows.append(rows[0] | {"method": "lora_fa", "tokens_per_s": 15_400.0})
    assert table.lora_fa_over_lora(rows) == [
        "  LoRA-FA, recompute_all: 1.100 x LoRA's tokens/s, +0.00 GiB"
    ]


def test_records_of_one_commit_merge():
    head = {"bench": "train", "commit": "a", "gpu": "H100", "command": "x", "peaks": {"p": 1.0}}
    old, new = made_rows(), made_rows(speed=1.0)[:1]
    merged = table.merge([head | {"rows": old}, head | {"rows": new, "peaks": {"p": 3.0}}])
    assert len(merged["rows"]) == len(old)
    assert merged["rows"][0]["tokens_per_s"] == 1.0
    assert merged["peaks"] == {"p": 2.0}
    with pytest.raises(SystemExit, match="commit"):
        table.merge([head | {"rows": []}, head | {"commit": "b", "rows": []}])


def test_figure_is_repeatable(tmp_path):
    pytest.importorskip("matplotlib")
    record = {"gpu": "H100", "commit": "abc", "rows": made_rows()}
    for name in ("one.svg", "two.svg"):
        plot.draw(record, tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
    assert one == two
    assert b"Unsloth" in one or b"svg" in one
    with pytest.raises(SystemExit, match="no row"):
        plot.draw({**record, "rows": []}, tmp_path / "three.svg")


def test_models_have_the_sizes_of_their_names():
    for name, wanted in {"Llama-3.1-8B": 8.03e9, "Llama-3.3-70B": 70.6e9}.items():
        assert checkpoint_bytes(name, "bf16") / 2 == pytest.approx(wanted, rel=0.01)
    assert MODELS["tiny"].num_hidden_layers == 2
