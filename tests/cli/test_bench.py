"""`qlora-kit bench`: its words, its records, its exit codes."""

import json

import pytest
import torch

from qlora_kit.bench.run import TINY_NOTE
from qlora_kit.cli.bench import BENCHES
from qlora_kit.cli.main import main
from tests.bench.rows import record_of, row_of


def write(path, record):
    path.write_text(json.dumps(record), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("what", ["", *BENCHES])
def test_help_fits_80_columns(what, capsys):
    try:
        code = main(["bench", *what.split(), "--help"])
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr().out
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mem"], "Did you mean"),
        (["memory", "--method", "qlora"], "--methods"),
        (["memory", "--methods", "qlorra"], "unknown method"),
        (["memory", "--from", "nowhere.json"], "cannot read"),
        (["speed", "--models", "no-such-shape"], "neither a folder"),
        (["speed", "--policies", "saves"], "unknown policy"),
        (["latency", "--shapes", "8"], "BATCHxSEQUENCE"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


def test_reports_are_made_again_from_a_record(tmp_path, capsys):
    old = write(tmp_path / "old.json", record_of(row_of("full"), row_of("qlora")))
    assert main(["bench", "memory", "--from", old, "--out", str(tmp_path / "out")]) == 0
    assert "QLoRA" in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"record.json", "report.md", "report.html"}


@pytest.mark.parametrize(
    ("speed", "threshold", "code"), [(26_000, "5", 0), (24_000, "5", 1), (24_000, "10", 0)]
)
def test_a_regression_is_an_exit_code(tmp_path, capsys, speed, threshold, code):
    old = write(tmp_path / "old.json", record_of(row_of("qlora")))
    new = write(tmp_path / "new.json", record_of(row_of("qlora", tokens_per_s=float(speed))))
    words = ["--from", new, "--compare", old, "--speed-threshold", threshold]
    assert main(["bench", "speed", *words, "--out", str(tmp_path / "out")]) == code
    assert ("WORSE" in capsys.readouterr().out) is (code == 1)


def test_nothing_in_common_is_said(tmp_path, capsys):
    old = write(tmp_path / "old.json", record_of(row_of("qlora", batch=9)))
    new = write(tmp_path / "new.json", record_of(row_of("qlora")))
    words = ["--from", new, "--compare", old, "--out", str(tmp_path / "out")]
    assert main(["bench", "memory", *words]) == 2
    assert "in common" in capsys.readouterr().err


def test_records_of_something_else_are_refused(tmp_path, capsys):
    old = write(tmp_path / "old.json", record_of(bench="latency"))
    assert main(["bench", "memory", "--from", old]) == 2
    assert "'latency'" in capsys.readouterr().err


def test_sizes(tmp_path, capsys):
    assert main(["bench", "sizes", "--out", str(tmp_path / "sizes.md")]) == 0
    text = capsys.readouterr().out
    assert "| GPT-3 |" in text
    assert (tmp_path / "sizes.md").read_text() == text


@pytest.mark.slow
def test_memory_on_a_machine_without_a_gpu(tmp_path, capsys, monkeypatch):
    """Fresh processes, rows as they come, and a report that says plainly what it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--methods", "full", "qlora", "--share", "--warmup", "1", "--steps", "2"]
    out = tmp_path / "out"
    assert main(["bench", "memory", *words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert TINY_NOTE in printed
    assert TINY_NOTE in (out / "report.html").read_text()
    lines = (out / "rows.jsonl").read_text().splitlines()
    record = json.loads((out / "record.json").read_text())
    assert len(lines) == len(record["rows"]) == 6
    assert record["gpu"] is None
    for row in record["rows"]:
        assert row["model"] == "tiny"
        assert row["tokens_per_s"] > 0
        assert len(row["losses"]) == 3
        assert row["components_gib"]["trained"] > 0
        assert row["peak_allocated_gib"] is None
    again = ["--from", str(out / "record.json"), "--compare", str(out / "record.json")]
    assert main(["bench", "memory", *again, "--out", str(out)]) == 0


@pytest.mark.slow
def test_speed_beside_peers_without_a_gpu(tmp_path, capsys, monkeypatch):
    """Losses become curves, and what a library cannot do here is a row with its reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--methods", "qlora", "--policies", "save", "--peers", "--share"]
    words += ["--warmup", "1", "--steps", "4", "--out", str(tmp_path)]
    assert main(["bench", "speed", *words]) == 0
    printed = capsys.readouterr().out
    assert "a tiny model of 2 x 64 tokens runs instead of Llama-3.2-1B" in printed
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    by_library = {row["impl"]: row for row in rows}
    assert set(by_library) == {"qlora_kit", "peft", "peft_liger", "unsloth"}
    assert "needs a GPU" in by_library["unsloth"]["skipped"]
    assert len(by_library["qlora_kit"]["losses"]) == 5
    page = (tmp_path / "report.html").read_text()
    chart = page[page.index("<h3>Loss</h3>") :].split("</figure>")[0]
    assert chart.count("<polyline") == 1 + ("losses" in by_library["peft"])
    assert "skipped: Unsloth needs a GPU" in page
