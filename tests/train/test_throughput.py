"""Speed is the GPU's, whenever the host queued its work and whenever it reads a line."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_kit.train import trainer as trainer_module
from qlora_kit.train.callbacks import ConsoleProgress
from qlora_kit.train.expected import Expected
from qlora_kit.train.marks import mark
from qlora_kit.train.throughput import Throughput
from qlora_kit.train.trainer import Trainer
from tests.train.fake_gpu import QUEUEING_S, FakeGpu
from tests.train.helpers import make_trainer

SECONDS = (4.0, 1.0, 2.0, 0.5, 3.0, 1.5)
"""Of the updates, on the GPU."""
EVALUATION_S, CHECKPOINT_S = 40.0, 70.0


def on_gpu(
    gpu: FakeGpu, patch: pytest.MonkeyPatch, folder: Path, *, device: str, **changes: Any
) -> Trainer:
    """A trainer whose work lasts as long as the fake GPU says; `device` gives its clock."""
    trainer = make_trainer(folder, **changes)
    trainer.logs_late = True
    trainer.throughput = Throughput(device)
    trainer.expected = Expected(flops_per_token=1.0, gpu_flops=100.0)
    step, save, totals = trainer.training_step, trainer._save, trainer_module.loss_totals
    batches = trainer.args.gradient_accumulation_steps

    def slow_step(*values: Any) -> Any:
        gpu.queue(SECONDS[trainer.state.global_step] / batches)
        return step(*values)

    def slow_save(*values: Any) -> None:  # to a disk, while the GPU has nothing to do
        gpu.wait()
        gpu.host_s += CHECKPOINT_S
        save(*values)

    def slow_totals(*values: Any, **named: Any) -> Any:
        gpu.queue(EVALUATION_S)
        gpu.wait()
        return totals(*values, **named)

    patch.setattr(trainer, "training_step", slow_step)
    patch.setattr(trainer, "_save", slow_save)
    patch.setattr(trainer_module, "loss_totals", slow_totals)
    return trainer


def logged(trainer: Trainer) -> list[tuple[float, float]]:
    """Rate of every line beside what it ought to be."""
    found, tokens, step = [], 0, 0
    for line in trainer.state.log_history:
        if "tokens_per_s" not in line:
            continue
        seconds = sum(SECONDS[step : line["step"]])
        found.append((line["tokens_per_s"], (line["tokens"] - tokens) / seconds))
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] / 100, abs=1e-4)
        tokens, step = line["tokens"], line["step"]
    return found


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "no"},
        {"save_strategy": "no", "logging_steps": 2},
        {"save_strategy": "no", "gradient_accumulation_steps": 2},
        {"save_steps": 2},
        {"save_steps": 3, "eval_rows": 3, "eval_strategy": "steps", "eval_steps": 2},
        {"save_steps": 2, "eval_rows": 3, "eval_strategy": "steps", "eval_steps": 3}
        | {"logging_steps": 3},
    ],
)
def test_lines_say_what_the_gpu_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], device: str
) -> None:
    """By the GPU's events each line is right; by the host's clock lines are far off."""
    gpu = FakeGpu(monkeypatch)
    trainer = on_gpu(gpu, monkeypatch, tmp_path, device=device, **settings)
    trainer.train()
    found = logged(trainer)
    assert len(found) >= 2
    # Idle: what queueing costs, per batch and after each pause; rates are rounded to 0.1.
    slack = 4 * QUEUEING_S / min(SECONDS)
    right = [rate == pytest.approx(true, rel=slack, abs=0.06) for rate, true in found]
    if device == "cuda":
        assert all(right), found
        tokens = trainer.state.num_input_tokens_seen
        assert trainer.mean_tokens_per_s == pytest.approx(tokens / sum(SECONDS), rel=slack, abs=0.1)
    else:
        assert not all(right)
        if "save_steps" not in settings:  # nothing waits in between
            assert max(rate / true for rate, true in found) > 100


def test_a_mark_waits_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting marks leaves the host where it was; the time between them is the GPU's."""
    gpu = FakeGpu(monkeypatch)
    start = mark("cuda")
    gpu.queue(5.0)
    end = mark("cuda")
    assert gpu.host_s == 100.0 + QUEUEING_S
    assert (start.is_passed, end.is_passed) == (True, False)
    assert end.since(start) == pytest.approx(5.0 + QUEUEING_S)
    assert end.host_s - start.host_s == pytest.approx(QUEUEING_S)  # the host's clock says this
    assert end.is_passed
    assert gpu.host_s == gpu.free_s


def test_on_a_cpu_the_host_tells_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No event is made."""
    gpu = FakeGpu(monkeypatch)
    start = mark("cpu")
    gpu.host_s += 2.5
    assert mark("cpu").event is None
    assert mark("cpu").since(start) == 2.5


def test_the_bar_counts_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that were only queued do not count, or the bar would promise too much."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    gpu = FakeGpu(monkeypatch)
    args = TrainingArguments("out", use_cpu=True, report_to=[])
    monkeypatch.setattr(TrainingArguments, "device", "cuda")
    console = Console(file=io.StringIO(), force_terminal=True)
    progress, state, control = ConsoleProgress(console), TrainerState(max_steps=4), TrainerControl()
    progress.on_train_begin(args, state, control)
    bar = progress._progress
    assert bar is not None
    counts = []
    try:
        for state.global_step in (1, 2, 3, 4):
            gpu.queue(1.0)
            if state.global_step == 4:
                gpu.host_s += 2.5  # two updates are done by now
            progress.on_step_end(args, state, control)
            counts.append(bar.tasks[0].completed)
        assert counts == [0, 0, 0, 2]
        gpu.wait()
        progress.on_train_end(args, state, control)
        assert bar.tasks[0].completed == 4
    finally:
        progress.close()
