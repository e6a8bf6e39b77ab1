"""Log lines: the same values under the same steps, late or not; and nothing waits in between."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from qlora_kit.core.errors import NonFiniteError
from qlora_kit.train.checkpoints import STATE_FILE
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.log_lines import sent_to_host
from qlora_kit.train.trainer import Trainer
from tests.train.helpers import adapted, arguments, make_trainer, rows

READS = ("_local_scalar_dense", "nonzero", "equal")
"""Ops that give the host a value, or a shape, of a tensor: on a GPU they wait for it."""
TIMED = ("tokens_per_s", "memory_gib")


class Reads(TorchDispatchMode):
    """Records who reads tensors; on a CPU nobody waits, but the same code does on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.found[self._reader()] += 1
        return func(*args, **(kwargs or {}))

    def _reader(self) -> str:
        frames = [f for f in reversed(traceback.extract_stack()) if "torch/" not in f.filename]
        places = [f"{Path(f.filename).stem}.{f.name}" for f in frames[2:]]
        if "prepare.__call__" in places:
            return "collator"  # its tensors are on the host
        return next(p for p in places if "<" not in p)


class Watch(TrainerCallback):
    """Keeps the reads of updates after the first ones, in which models are asked and checked."""

    def __init__(self, reads: Reads, after: int = 2) -> None:
        self.reads, self.after = reads, after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            self.reads.found.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reads.found["end"] += 1


class ReadsLoss(TrainerCallback):
    """What must not happen: somebody looks at a gradient in every update."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        float(next(p.grad for p in kwargs["model"].parameters() if p.grad is not None).sum())


def fused(folder: Path, callbacks: Any = (), **changes: Any) -> Trainer:
    model, adapter = adapted()
    return Trainer(
        model,
        adapter,
        arguments(folder, **{"max_steps": 8, "save_strategy": "no"} | changes),
        train_dataset=rows(40),
        data_collator=PadCollator(0),
        callbacks=callbacks,
        step="fused",
    )


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_nothing_is_read_but_log_lines(tmp_path: Path, every: int, accumulated: int) -> None:
    """Between the first updates and the end: one read per value of a line, and none else."""
    reads = Reads()
    trainer = fused(
        tmp_path,
        [Watch(reads)],
        logging_steps=every,
        gradient_accumulation_steps=accumulated,
        lr_scheduler_type="cosine",
    )
    trainer.logs_late = True
    with reads:
        trainer.train()
    left = dict(reads.found)
    assert left.pop("end") == 1
    assert left.pop("collator", 0) > 0
    ended = left.pop("trainer._finalize_training", 0)  # the whole run's loss, after the last update
    assert ended == 1
    # The line of update 2 is read behind update 3 where each has one. Each has three tensors.
    lines = {1: 7, 3: 2, 100: 0}[every]
    assert left == ({"log_lines.read": 3 * lines} if lines else {})


def test_the_test_sees_reads(tmp_path: Path) -> None:
    """A callback that looks at a gradient is caught, and Transformers' filter would be."""
    reads = Reads()
    trainer = fused(tmp_path, [Watch(reads), ReadsLoss()], logging_steps=100)
    trainer.logs_late = True
    trainer.args.logging_nan_inf_filter = True
    with reads:
        trainer.train()
    assert reads.found["test_log_lines.on_pre_optimizer_step"] == 6
    assert reads.found["trainer._run_epoch"] == 2 * 6


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    """What was logged, but for what depends on the clock."""
    keep = [h for h in trainer.state.log_history if "train_runtime" not in h]
    drop = (*TIMED, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{k: v for k, v in h.items() if k not in drop} for h in keep]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logging_steps": 2},
        {"logging_steps": 3, "gradient_accumulation_steps": 2},
        {"count": 5, "max_steps": 7},  # epochs end in between
        {"eval_rows": 3, "eval_strategy": "steps", "eval_steps": 2},
        {"logging_strategy": "epoch", "count": 4, "max_steps": 6},
    ],
)
def test_late_lines_are_the_same_lines(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Values, steps and order; in the history and in every checkpoint's."""
    made = {}
    for late in (False, True):
        trainer = make_trainer(tmp_path / str(late), **settings)
        trainer.logs_late = late
        output = trainer.train()
        files = sorted((tmp_path / str(late)).glob(f"checkpoint-*/{STATE_FILE}"))
        assert files
        states = [type(trainer.state).load_from_json(str(file)) for file in files]
        seen = [(s.global_step, len(s.log_history), s.num_input_tokens_seen) for s in states]
        made[late] = lines(trainer), seen, output.training_loss
        assert all(h["tokens_per_s"] > 0 for h in trainer.state.log_history if "loss" in h)
    assert made[True] == made[False]
    assert made[True][0]
    trainer = make_trainer(tmp_path / "other", **settings | {"learning_rate": 2e-2})
    trainer.train()
    assert lines(trainer) != made[True][0]  # the comparison can fail


class _When(TrainerCallback):
    """At which update each line was seen, and what the state said then."""

    def __init__(self) -> None:
        self.ended = 0
        self.seen: list[tuple[int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.seen.append((state.global_step, self.ended))


def test_a_line_is_one_update_late_and_never_overtaken(tmp_path: Path) -> None:
    """Read behind the next update; at once before a checkpoint (3, 6) and at the end (7)."""
    when = _When()
    trainer = make_trainer(tmp_path, callbacks=[when], max_steps=7)
    trainer.logs_late = True
    trainer.train()
    assert when.seen == [(1, 2), (2, 3), (3, 3), (4, 5), (5, 6), (6, 6), (7, 7)]


class _Poison(TrainerCallback):
    """Makes the next loss a NaN."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    if parameter.requires_grad:
                        parameter.fill_(torch.nan)


@pytest.mark.parametrize(("after", "checkpoints"), [(3, ["checkpoint-3"]), (5, ["checkpoint-3"])])
def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, after: int, checkpoints: list[str]
) -> None:
    """Named by the update it belongs to, and before a checkpoint could hold it."""
    trainer = make_trainer(tmp_path, callbacks=[_Poison(after)], max_steps=9)
    trainer.logs_late = True
    with pytest.raises(NonFiniteError, match=f"before update {after + 1}"):
        trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == checkpoints


def test_a_stopped_run_leaves_no_line_behind(tmp_path: Path) -> None:
    """A line on its way when a run ends in an error is not the next run's first."""
    trainer = make_trainer(tmp_path, callbacks=[_Poison(1)], max_steps=4, save_strategy="no")
    trainer.logs_late = True
    with pytest.raises(NonFiniteError):
        trainer.train()
    trainer._line = trainer._take_line(torch.tensor(1.0), None, 0.1, 0.0)
    with pytest.raises(NonFiniteError):
        trainer.train()
    steps = [h["step"] for h in trainer.state.log_history]
    assert steps == sorted(set(steps))


def test_values_on_their_way_are_copies() -> None:
    """What happens to a tensor after it was sent is not seen."""
    loss = torch.tensor(2.0)
    sent, arrived = sent_to_host({"loss": loss, "rate": 0.5})
    loss.zero_()
    assert (float(sent["loss"]), sent["rate"], arrived) == (2.0, 0.5, None)


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_are_not_waited_for(tmp_path: Path, pinned: bool) -> None:
    """From pinned memory, all the way to the loader that moves them."""
    model, adapter = adapted()
    args = arguments(tmp_path, save_strategy="no")
    args.dataloader_pin_memory = pinned
    trainer = Trainer(model, adapter, args, train_dataset=rows(4), data_collator=PadCollator(0))
    assert not trainer.args.logging_nan_inf_filter
    assert not trainer.logs_late  # on a CPU
    args.dataloader_pin_memory = False  # nothing to pin for
    assert trainer.get_train_dataloader()._non_blocking is pinned
