"""`python -m benchmarks.train.plot`: what several records leave standing, and its figure."""

from typing import Any

import pytest

from benchmarks.train import plot, table
from benchmarks.train.cases import CASES, Options, plan
from qlora_kit.bench.child import first_fields


def record_of(commit: str, *names: str, speed: float, impl: str = "qlora_kit") -> dict[str, Any]:
    """A record that measured some cases, as it would come from a GPU."""
    rows = []
    for job in plan(
        [case for case in CASES if case.name in names], Options(unsloth_variants=("compile",))
    ):
        for point in job.points if job.build.impl == impl else ():
            row = first_fields(job.build, point) | {"tokens_per_s": speed, "check_loss": 12.0}
            rows.append(row | {"peak_allocated_gib": 8.0})
    return {"gpu": "H100", "commit": commit, "rows": rows}


def speeds(record: dict[str, Any], case: str, impl: str = "qlora_kit") -> set[float]:
    """Those of a case's rows, all of them, faulty ones too."""
    rows = [row for row in record["rows"] if case in row["cases"] and row["impl"] == impl]
    return {row.get("tokens_per_s", 0.0) for row in rows}


def test_a_partial_record_hides_nothing() -> None:
    """What it measured counts from it, what it did not or could not stays as it was."""
    old = record_of("old", "full", "best", "small", speed=1.0)
    new = record_of("new", "full", "small", speed=2.0)
    for row in new["rows"]:
        if "small" in row["cases"]:
            row["error"] = row.pop("tokens_per_s") and "no time left in this run"
    assert speeds(new, "small") == {0.0}
    one = plot.standing([old, new])
    assert [speeds(one, case) for case in ("full", "best", "small")] == [{2.0}, {1.0}, {1.0}]
    assert plot.commits_of(one, "full") == "qlora_kit new"
    assert plot.commits_of(one, "best") == "qlora_kit old"


def test_rows_of_ours_in_a_case_are_of_one_commit() -> None:
    """A setting that the newest record has left out is not joined to those that it has."""
    old, new = (record_of(name, "best", speed=1.0) for name in ("old", "new"))
    kept = new["rows"].pop()
    assert kept["policy"] in {row["policy"] for row in old["rows"]}
    found = table.counted(plot.standing([old, new])["rows"], "best", "qlora_kit")
    assert {row["commit"] for row in found} == {"new"}
    assert len(found) == len(new["rows"]) == len(old["rows"]) - 1


def test_a_peers_row_counts_as_it_was_measured_last() -> None:
    """For whatever case; `full` and `lean` share Unsloth's."""
    old = record_of("old", "full", "lean", speed=1.0, impl="unsloth")
    new = record_of("new", "full", speed=2.0, impl="unsloth")
    copied = record_of("ours", "long", speed=3.0)
    copied["rows"] += [row | {"commit": "new"} for row in new["rows"]]
    assert old["rows"][0]["cases"] == ["full", "lean"]
    for one in (plot.standing([old, new]), plot.standing([old, copied])):
        assert speeds(one, "full", "unsloth") == speeds(one, "lean", "unsloth") == {2.0}
        assert plot.commits_of(one, "lean") == "Unsloth new"


def test_other_cards_are_left_out() -> None:
    """The newest record's card is drawn."""
    other = record_of("other", "best", speed=9.0) | {"gpu": "H200"}
    one = plot.standing([other, record_of("new", "full", speed=2.0)])
    assert speeds(one, "best") == set()
    assert one["gpu"] == "H100"


def test_a_case_about_two_methods_needs_both() -> None:
    """A panel of LoRA alone would say nothing of LoRA-FA; one point with no peer says nothing."""
    case = next(case for case in CASES if case.name == "lora_fa")
    rows = record_of("a", "lora_fa", speed=1.0)["rows"]
    assert {row["method"] for row in rows} == {"lora", "lora_fa"}
    assert plot.is_shown(case, rows)
    assert not plot.is_shown(case, [row for row in rows if row["method"] == "lora"])
    alone = next(case for case in CASES if case.name == "repeatable")
    assert not plot.is_shown(alone, record_of("a", "repeatable", speed=1.0)["rows"])


def test_the_records_here_leave_every_measured_case_standing() -> None:
    """Each case of ours that a record has measured; newest first, its first record's rows."""
    records = plot.all_records()
    one = plot.standing(records)
    for case in CASES:
        found = [
            (record["commit"], len(rows))
            for record in records
            if (rows := table.counted(record["rows"], case.name, "qlora_kit"))
        ]
        left = table.counted(one["rows"], case.name, "qlora_kit")
        assert len(left) == (found[-1][1] if found else 0), case.name
        assert {row["commit"] for row in left} <= {commit for commit, _ in found[-1:]}


def test_versions_of_a_part_that_differ_stay_with_its_rows() -> None:
    """Unsloth runs in an environment of its own."""
    about = {"bench": "train", "commit": "a", "command": "c", "peaks": {}}
    ours = about | record_of("a", "long", speed=1.0) | {"env": {"torch": "2", "peft": "1"}}
    theirs = about | record_of("a", "long", speed=1.0, impl="unsloth")
    theirs |= {"env": {"torch": "2", "peft": "2", "unsloth": "3"}}
    merged = table.merge([ours, theirs])
    assert merged["env"] == ours["env"]
    kept = [row.get("env") for row in merged["rows"] if row["impl"] == "qlora_kit"]
    assert kept == [None] * len(ours["rows"])
    others = [row["env"] for row in merged["rows"] if row["impl"] == "unsloth"]
    assert others == [{"peft": "2", "unsloth": "3"}] * len(others)
    assert others


def test_figure_of_several_records_is_repeatable(tmp_path: Any) -> None:
    """The same records, the same bytes."""
    pytest.importorskip("matplotlib")
    one = plot.standing([record_of("old", "best", speed=1.0), record_of("new", "full", speed=2.0)])
    for name in ("one.svg", "two.svg"):
        plot.draw(one, tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
    assert first == second
