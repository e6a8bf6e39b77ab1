"""`python -m benchmarks.memory.claim`: what belongs into the claim table, and where it is kept."""

import json

import pytest

from benchmarks.memory import claim, plot
from qlora_kit.bench.grid import merged, without_known
from qlora_kit.bench.methods import METHODS, method_of
from qlora_kit.bench.subject import first_fields
from tests.bench.rows import record_of, row_of


def points():
    jobs = merged(claim.rounds(claim.MODELS, 2048))
    return jobs, [first_fields(job.build, p) for job in jobs for p in job.points]


def test_every_method_is_in_the_table_with_and_without_recomputing():
    _, rows = points()
    found = {(r["model"], method_of(r), r["policy"]) for r in rows}
    for model in claim.MODELS:
        assert {m for name, m, _ in found if name == model} == set(METHODS)
        for method in ("full", "lora", "lora_fa", "qlora", "qlora_fa"):
            assert {(model, method, p) for p in ("save", "recompute_all")} <= found


def test_one_process_per_model_and_method_and_large_batches_for_the_main_ones():
    jobs, rows = points()
    assert len(jobs) == len(claim.MODELS) * len(METHODS)
    assert {method_of(r) for r in rows if r["batch"] == 4} == {"full", "qlora", "lora"}
    assert {r["graphs"] for r in rows if method_of(r) == "qlora" and r["batch"] == 1} == {
        True,
        False,
    }


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"error": "killed"}, 1)])
def test_the_record_goes_to_the_results(tmp_path, monkeypatch, capsys, changes, code):
    asked = []

    def run(bench, rounds, folder, **limits):
        asked.append((bench, rounds, limits["limits"].total))
        return record_of(row_of("full"), row_of("qlora", **changes))

    monkeypatch.setattr(claim, "run_bench", run)
    assert claim.main(["--models", "Llama-3.1-8B", "--out", str(tmp_path)]) == code
    (file,) = (tmp_path / "memory").glob("*.json")
    assert json.loads(file.read_text())["rows"][0]["method"] == "full"
    assert asked[0][0] == "memory"
    assert asked[0][2] == 400
    assert "full, mixed precision" in capsys.readouterr().out


def test_figure_shows_the_leanest_rows_and_is_repeatable(tmp_path):
    pytest.importorskip("matplotlib")
    fat = row_of("qlora", peak_allocated_gib=9.0)
    graph = row_of("qlora", graph=True, peak_allocated_gib=0.1, peak_reserved_gib=0.1)
    saving = row_of("qlora", policy="save")
    lean = row_of("qlora", predicted_gib=1.4)
    record = record_of(row_of("full"), fat, graph, lean, saving)
    assert plot.chosen(record["rows"])[1:] == [lean, saving]
    for name in ("one.svg", "two.svg"):
        plot.draw([record], 1, tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
    assert one == two
    with pytest.raises(SystemExit, match="no row"):
        plot.draw([record_of()], 1, tmp_path / "three.svg")


def test_a_record_is_completed_with_what_it_lacks(tmp_path, monkeypatch):
    """Its rows are handed on with their commit, and only some models get large batches."""
    file, asked = tmp_path / "old.json", {}
    file.write_text(json.dumps({"commit": "old", "rows": [row_of("qlora")]}))

    def run(bench, rounds, folder, **others):
        asked.update(others, rounds=rounds)
        return record_of(row_of("full"))

    monkeypatch.setattr(claim, "run_bench", run)
    words = ["--have", str(file), "--large", "Llama-3.2-1B", "--together", "--out", str(tmp_path)]
    assert claim.main(words) == 0
    assert asked["together"] is True
    assert [row["commit"] for row in asked["earlier"]] == ["old"]
    made = claim.rounds(claim.MODELS, 2048, ["Llama-3.2-1B"])
    assert {o.models for o in made if 4 in o.batches} == {("Llama-3.2-1B",)}
    assert not any(4 in o.batches for o in claim.rounds(claim.MODELS, 2048, []))
    left = without_known(merged(made), points()[1])
    assert left  # rows without a result are no measurements
    done = [row | {"tokens_per_s": 1.0} for row in points()[1]]
    assert without_known(merged(made), done) == []
