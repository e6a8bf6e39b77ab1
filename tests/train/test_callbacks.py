"""What a run shows: a bar in a terminal, plain lines elsewhere."""

import io
from pathlib import Path

from rich.console import Console

from qlora_kit.train.callbacks import ConsoleProgress, Phases, memory_bytes, tensorboard_callback
from qlora_kit.train.record import result_from_dict
from qlora_kit.train.summary import print_end, print_results
from tests.train import sample_record
from tests.train.helpers import make_trainer


def console(*, terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=width), stream


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    """One line per log, held-out losses too, no control characters."""
    out, stream = console(terminal=False)
    make_trainer(
        tmp_path,
        max_steps=2,
        eval_rows=3,
        eval_strategy="steps",
        eval_steps=2,
        callbacks=[ConsoleProgress(out)],
    ).train()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step     1/2  loss ")
    assert "tok/s" in lines[0]
    assert "GiB" in lines[0]
    assert "eval_loss" in lines[2]
    assert "\x1b" not in stream.getvalue()


def test_one_bar_in_a_terminal(tmp_path: Path) -> None:
    """The bar ends full and carries the newest values."""
    out, stream = console(terminal=True)
    make_trainer(tmp_path, max_steps=2, callbacks=[ConsoleProgress(out)]).train()
    text = stream.getvalue()
    assert "2/2" in text
    assert "tok/s" in text


def test_phases_pass_items_through() -> None:
    """Tracking changes nothing about what is tracked."""
    for terminal in (True, False):
        out, stream = console(terminal=terminal)
        assert list(Phases(out).track([3, 1, 2], "before: eval")) == [3, 1, 2]
        assert "before: eval" in stream.getvalue()


def test_tensorboard_gets_speed_and_memory(tmp_path: Path) -> None:
    """The Trainer's logs, with ours, end up in the run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    make_trainer(tmp_path / "run", max_steps=2, callbacks=[tensorboard_callback(logs)]).train()
    events = EventAccumulator(str(logs))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/tokens_per_s", "train/memory_gib", "train/learning_rate"} <= tags


def test_summary_fits_80_columns() -> None:
    """Before and after side by side; the report's path is last and whole."""
    out, stream = console(terminal=False, width=80)
    record = sample_record.record()
    record["outputs"]["report"] = "runs/" + "long/" * 30 + "report.html"
    results = [[result_from_dict(v) for v in record[key]] for key in ("before", "after")]
    print_results(out, *results)
    print_end(out, record)
    lines = stream.getvalue().rstrip().splitlines()
    assert lines[-1] == f"report   {record['outputs']['report']}"
    assert max(len(line) for line in lines[:-1]) <= 80
    text = " ".join(" ".join(lines).split())
    for piece in ("62.4% 82.8%", "413 tokens/s", "KL 0.00021"):
        assert piece in text


def test_memory_is_counted() -> None:
    """At least what this process surely holds."""
    assert memory_bytes("cpu") > 10_000_000
