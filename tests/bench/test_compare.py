"""What counts as a regression, and what does not."""

import pytest

from qlora_kit.bench.compare import compare, report
from tests.bench.rows import record_of, row_of


def changed(**changes):
    old, new = record_of(row_of("qlora")), record_of(row_of("qlora", **changes))
    return {c.figure: c.worse for c in compare(old, new)}


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, {"allocated GiB": False, "tokens/s": False}),
        ({"peak_allocated_gib": 1.5 * 1.019}, {"allocated GiB": False, "tokens/s": False}),
        ({"peak_allocated_gib": 1.5 * 1.021}, {"allocated GiB": True, "tokens/s": False}),
        ({"peak_allocated_gib": 1.0}, {"allocated GiB": False, "tokens/s": False}),
        ({"tokens_per_s": 26_000 * 0.951}, {"allocated GiB": False, "tokens/s": False}),
        ({"tokens_per_s": 26_000 * 0.949}, {"allocated GiB": False, "tokens/s": True}),
        ({"tokens_per_s": 99_000.0}, {"allocated GiB": False, "tokens/s": False}),
        ({"oom": True}, {"ran": True}),
        ({"error": "killed"}, {"ran": True}),
    ],
)
def test_thresholds(changes, worse):
    assert changed(**changes) == worse


@pytest.mark.parametrize(
    "other", [{"policy": "save"}, {"batch": 4}, {"graphs": True}, {"optimizer": "adamw_torch"}]
)
def test_other_measurements_are_not_compared(other):
    assert changed(**other) == {}


def test_what_failed_before_is_not_compared():
    old = record_of(row_of("qlora", oom=True))
    assert compare(old, record_of(row_of("qlora"))) == []


def test_report_names_the_worst_first_and_another_card():
    old = record_of(row_of("lora"), row_of("qlora"))
    new = record_of(row_of("lora"), row_of("qlora", tokens_per_s=13_000.0)) | {"gpu": "L40S"}
    text = report(old, new, compare(old, new), limits="5%")
    assert "4 figures, 1 worse" in text
    assert "another card" in text
    assert text.splitlines()[2].strip().startswith("WORSE  -50.0%")


def test_a_machine_without_a_gpu_is_named():
    old = record_of(row_of("qlora"), bench="speed") | {"gpu": None}
    new = record_of(row_of("qlora"), bench="speed")
    text = report(old, new, compare(old, new), limits="5%")
    assert "on a machine without a GPU: 2 figures" in text
    assert "None" not in text
    assert "a machine without a GPU then, NVIDIA H100 80GB HBM3 now" in text
    assert "another card" not in report(old, old, [], limits="5%")
