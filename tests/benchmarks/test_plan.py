"""`benchmarks.plan`: what is left to measure, records in one, and the edge of a budget."""

import json
from dataclasses import replace

import pytest

from benchmarks.plan import __main__ as grid
from benchmarks.plan import edge, host
from benchmarks.plan.cases import GRID, Case, jobs, key_of, missing, together
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.subject import first_fields, read_jobs, write_jobs
from qlora_kit.core.units import GIB
from qlora_kit.plan.budget import Budget, needed_bytes
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.predict import CONTEXT
from qlora_kit.plan.search import Planner

CASES = (
    Case(model="tiny", sizes=((1, 64, "save"), (5, 4096, "recompute_all")), rank=8),
    Case(model="tiny", method="full", bits=16, sizes=((1, 64, "save"),)),
)


def planned(device="cuda"):
    return jobs(CASES, device=device, warmup=2, steps=3)


def rows_of(made, **changes):
    pairs = [(job, point) for job in made for point in job.points]
    return [
        first_fields(job.build, p) | {"graph": p.graph, "tokens_per_s": 1.0} | changes
        for job, p in pairs
    ]


def test_small_batches_are_recorded_before_they_are_timed():
    (small, large), (full,) = (job.points for job in planned())
    assert small.graph
    assert small.warmup == 3
    assert not large.graph
    assert large.warmup is None
    assert not full.graph  # nor are they in training
    assert not any(point.graph for job in planned("cpu") for point in job.points)


def test_what_a_record_has_is_not_measured_again():
    made = planned()
    rows = rows_of(made)
    assert missing(made, rows) == []
    assert missing(made, []) == made
    assert missing(made, [{**row, "tokens_per_s": 1.0, "graph": False} for row in rows]) == [
        replace(made[0], points=made[0].points[:1])
    ]  # a step without its graph is another measurement
    failed = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]
    assert missing(made, failed) == made


def test_records_become_one():
    made = planned()
    new, old = rows_of(made, commit="new"), rows_of(made, commit="old")
    without = {**old[0], "graph": False}
    failed = {k: v for k, v in old[1].items() if k != "tokens_per_s"} | {"error": "killed"}
    found = together([new[:1], [without, *old]])
    assert [row["commit"] for row in found] == ["new", "old", "old", "old"]
    assert len({key_of(row) for row in found}) == 4
    assert failed not in together([new, [failed]])
    assert together([[failed], new[:1]]) == [new[0], failed]


def test_the_grid_covers_what_the_issue_names():
    made = jobs(GRID, device="cuda", warmup=2, steps=3)
    points = [(job.build, point) for job in made for point in job.points]
    assert len({key_of(first_fields(*pair)) for pair in points}) == len(points) >= 45
    words = {word.split(":")[0] for _, p in points for word in p.policy.split(",")}
    assert words >= {"save", "recompute_mlp", "offload", "offload_attention", "recompute_all"}
    assert {build.method for build, _ in points} == {"lora", "lora_fa", "full"}
    assert {p.seq for _, p in points} >= {512, 2048, 65536}
    assert {p.batch for _, p in points} >= {1, 2, 4, 8, 16}
    assert {build.model.split("-")[0] for build, _ in points} == {"Llama", "Qwen3", "Gemma"}


def test_an_estimate_adds_up():
    lines = grid.estimate(planned()).splitlines()
    assert len(lines) == 3
    each = [float(line.split(" s ")[0].split()[-1]) for line in lines]
    last = float(lines[-1].split()[-2])
    assert last == pytest.approx(20 + 2 * 3 + sum(each), abs=1)


def test_records_of_two_cards_stay_apart(tmp_path):
    files = []
    for gpu in ("one", "two"):
        files.append(tmp_path / f"{gpu}.json")
        files[-1].write_text(json.dumps({"gpu": gpu, "commit": "c", "rows": []}))
    with pytest.raises(SystemExit, match="two is not one"):
        grid.main(["--again", *map(str, files)])


# The edge of a budget


def planner(one):
    return Planner(config_of(one.model), find_gpu("h100"), Budget.of(one.budget))


def test_three_sizes_of_three_classes():
    (one,) = edge.TINY
    found = edge.sizes_of(one)
    made = planner(one)
    assert list(found) == list(edge.CLASSES)
    fits, tight, refused = found.values()
    assert made.fits(fits)
    assert not made.fits(fits.with_tokens(seq=fits.seq + 64))
    assert tight.tokens >= 1.03 * fits.tokens
    assert refused.tokens > tight.tokens
    for name, setup in found.items():
        prediction = made.predict(setup)
        assert edge.class_of(prediction, made.budget.gpu_bytes) == name
        assert edge.class_of(prediction, needed_bytes(prediction)) == "fits"
        assert edge.class_of(prediction, needed_bytes(prediction) - 1) == "tight"
        least = prediction.peak_bytes + prediction.outside
        assert edge.class_of(prediction, least - 1) == "refused"


def test_the_limit_is_what_train_sets(tmp_path):
    """A budget without the CUDA context, which torch does not count."""
    made = edge.jobs(edge.TINY, device="cpu")
    write_jobs(tmp_path / "jobs", made)
    assert read_jobs(tmp_path / "jobs") == made
    (job,) = made
    assert {round(p.cap_gib * GIB) + CONTEXT for p in job.points} == {800 << 20}
    assert [p.cases for p in job.points] == [("fits",), ("tight",)]


def row(said, **changes):
    (job,) = edge.jobs(edge.TINY)
    values = {"cases": [said], "tokens_per_s": 1.0, "graph": True, "growing_segments": True}
    return first_fields(job.build, job.points[0]) | values | changes


def test_what_must_not_be_is_told():
    fits = row("fits")
    dead = {k: v for k, v in row("fits", oom=True).items() if k != "tokens_per_s"}
    ran = row("tight")
    assert edge.wrong([fits, ran]) == []
    assert edge.wrong([fits, dead, ran]) == [dead]
    text = edge.table([fits, dead, ran, row("refused", oom=True), row("fits", error="killed")])
    lines = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert lines["fits"] == ["2", "1"]
    assert lines["does not fit"] == ["1", "1"]
    assert lines["refused"] == ["0", "1"]
    assert "ran out of memory: 1 (must be 0)" in text


def test_the_planner_of_today_is_asked(tmp_path, capsys):
    record = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": 80 * GIB}
    record["rows"] = [row("tight", tokens_per_s=1.0)]
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record))
    assert edge.main(["--again", str(file)]) == 0
    (found,) = json.loads(file.read_text())["rows"]
    assert found["class"] == "fits"  # whatever was said when it was planned
    assert found["predicted_gib"] < found["needed_gib"] <= found["budget_gib"]
    assert "must be 0" in capsys.readouterr().out


def test_graphs_are_measured_beside_steps_without():
    """Each batch with a graph has its row without, but for the 8B model's, which needs none."""
    for job in host.jobs("cuda"):
        sizes = [(p.batch, p.seq, p.policy) for p in job.points if p.graph]
        without = {(p.batch, p.seq, p.policy) for p in job.points if not p.graph}
        assert set(sizes) <= without or job.build.model == "Llama-3.1-8B"
    (toy,) = host.jobs("cpu")
    assert toy.build.device == "cpu"


def test_the_hosts_record_is_predicted_anew(tmp_path, capsys):
    row_ = {"impl": "qlora_kit", "model": "tiny", "method": "lora", "bits": 4, "rank": 8, "seq": 64}
    row_ |= {"batch": 1, "policy": "save", "optimizer": "adamw_8bit", "masters": "library"}
    row_ |= {"graphs": False, "host_us_per_op": 11.0, "ms_median": 5.0, "tokens_per_s": 12800.0}
    row_ |= {"peak_allocated_gib": 0.1, "peak_reserved_gib": 0.2}
    record = {"gpu": "NVIDIA H200", "gpu_memory_bytes": 140 * GIB, "rows": [row_, {**row_}]}
    del record["rows"][1]["ms_median"]
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record))
    assert host.main(["--again", str(file)]) == 0
    assert json.loads(file.read_text())["rows"][0]["predicted_limit"] == "host"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "11.00" in lines[1]
