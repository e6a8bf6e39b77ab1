"""One job: a training of one method with the package's own Trainer, measured on held-out rows.

What `qlora-kit train` does, without its folder: load, attach, train, evaluate. Every job has a
copy of the base of its own (`stock.py`), so no method sees what another left behind.
"""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.methods.cases import BY_NAME, DEMO_SHAPE, Case, Job, Shape, Task, split_rows
from benchmarks.methods.stock import Stock
from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.adapters.selective.full import computing_dtype
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import config_of
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.errors import UserError
from qlora_kit.export.originals import original_weights
from qlora_kit.ops.autocast import autocast
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train.arguments import check_training, training_arguments
from qlora_kit.train.callbacks import Phases
from qlora_kit.train.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from qlora_kit.train.data.collate import PadCollator, make_collator
from qlora_kit.train.data.dataset import build_dataset
from qlora_kit.train.data.tokenized import TokenizedSet
from qlora_kit.train.evaluate import Evaluator, SetResult
from qlora_kit.train.trainer import Trainer

Row = dict[str, Any]


class Clock(TrainerCallback):
    """Milliseconds between the beginnings of steps; on a GPU nobody waits for it."""

    def __init__(self) -> None:
        """Start without a step."""
        self._marks: list[Any] = []

    def _mark(self) -> None:
        if not torch.cuda.is_available():
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        """Mark the beginning of an update."""
        self._mark()

    def milliseconds(self, warmup: int) -> list[float]:
        """Of every step after the first so many, but the last, whose end is not marked."""
        marks = self._marks[warmup:]
        if not torch.cuda.is_available():
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]


class Workshop:
    """Does jobs; between them it keeps the bases, the tokenizer and tokenized rows."""

    def __init__(
        self,
        model: str,
        tasks: Sequence[Task],
        shapes: Sequence[Shape],
        demo: Path,
        folder: Path,
    ) -> None:
        """Open the model; nothing is loaded yet.

        Args:
            model: path of the demo model.
            tasks: with their budgets.
            shapes: to time steps at.
            demo: folder of the data.
            folder: shared by the workers, for what the first of them makes.
        """
        self.model_path = model
        self.tasks = {task.name: task for task in tasks}
        self.shapes = {shape.name: shape for shape in shapes}
        self.paths = {task.name: split_rows(task, demo, folder) for task in tasks}
        self.on_gpu = torch.cuda.is_available()
        self.source = open_source(model)
        self.stock = Stock(self.source, folder)
        self._held = 0

    def prepare(self, bits: Collection[int]) -> None:
        """Make everything that workers share, before there are others.

        Args:
            bits: of the bases that there are jobs for.
        """
        for wanted in bits:
            self.stock.base(wanted)
        for task in self.tasks.values():
            for name in self.paths[task.name]:
                self._rows(task, name)

    def do(self, job: Job) -> Row:
        """Do a job.

        Args:
            job: what to do.

        Returns:
            A row of the record; with `error` if the job failed.
        """
        began = time.perf_counter()
        row: Row = {"what": job.what, "method": job.case, "task": job.task, "shape": job.shape}
        row |= {"rate": job.rate, "seed": job.seed}
        try:
            row |= self._speed(job) if job.what == "speed" else self._measured(job)
        except (UserError, RuntimeError, ValueError) as error:
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        self._clear()
        return row | {"seconds": round(time.perf_counter() - began, 2)}

    def _clear(self) -> None:
        """Give the GPU's memory back to the other workers."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _base(self, bits: int) -> PreTrainedModel:
        """A base to train; what the worker keeps beside it is not counted in peaks."""
        self.stock.base(bits)  # is read, if it was not
        self._held = torch.cuda.memory_allocated() if self.on_gpu else 0
        return self.stock.base(bits)

    # Training and measuring

    def _measured(self, job: Job) -> Row:
        """A base, tuning or reported row."""
        task = self.tasks[str(job.task)]
        case = BY_NAME[job.case] if job.case else None
        config = self._config(task, case, job)
        train_on, held_out = ("tuning", "validation") if job.what == "tune" else ("train", "test")
        set_seed(job.seed)
        model = self._base(4 if case is None else case.bits)
        row: Row = {}
        computing = None
        if case is not None:
            adapter = self._attach(model, case, job.seed, config)
            computing = computing_dtype(adapter.pieces)
            row = self._train(model, adapter, config, self._rows(task, train_on))
        rows = self._rows(task, held_out)
        evaluator = Evaluator(
            self.stock.tokenizer,
            config.eval,
            phases=Phases(Console(quiet=True)),
            pad_to_multiple_of=8 if self.on_gpu else 1,
            step=config.train.step,
            tile=config.train.tile,
        )
        with autocast(model.device, computing):
            result = evaluator.measure(model, rows, held_out)
        return row | _scores(result)

    def _config(self, task: Task, case: Case | None, job: Job) -> RunConfig:
        """The run that this job is; refused if `qlora-kit train` would refuse it."""
        choice = job.what == "tune"
        run = RunConfig(
            model=ModelConfig(path=self.model_path, bits=4 if case is None else case.bits),
            data=DataConfig(
                train=str(self.paths[task.name]["train"]),
                max_length=task.longest,
                system_prompt=task.system_prompt,
            ),
            method=case.method if case else "lora",
            train=TrainConfig(
                batch_size=task.batch,
                learning_rate=job.rate or 1e-3,
                warmup_ratio=0.05,
                seed=job.seed,
                log_every=max(1, task.updates // 6),
                loggers=(),
            ),
            eval=EvalConfig(
                task="perplexity" if choice else task.evaluation,
                samples=0,
                batch_size=task.eval_batch,
                max_new_tokens=task.new_tokens,
            ),
            plan="off",
            **(case.settings if case else {}),
        )
        check_training(run, on_gpu=self.on_gpu, has_eval=True)
        return run

    def _rows(self, task: Task, name: str) -> TokenizedSet:
        """Tokenized rows of one part of a task."""
        key = f"{task.name}-{name}"
        kept = self.stock.rows(key)
        if kept is not None:
            assert isinstance(kept, TokenizedSet)
            return kept
        path = self.paths[task.name][name]
        config = DataConfig(
            train=str(path),
            eval=str(path),
            max_length=task.longest,
            system_prompt=task.system_prompt,
            limit_eval=task.test_rows if name == "test" else None,
        )
        part = "train" if name in ("train", "tuning") else "eval"
        rows = build_dataset(config, self.stock.tokenizer, part)
        self.stock.keep(key, rows)
        return rows

    def _attach(
        self, model: PreTrainedModel, case: Case, seed: int, config: RunConfig | None = None
    ) -> AttachedAdapter:
        run = config or RunConfig(
            model=ModelConfig(path=self.model_path),
            data=DataConfig(train=""),
            method=case.method,  # type: ignore[arg-type]
            **case.settings,
        )
        settings = make_adapter_config(case.method, *run.settings)
        originals = self._originals if case.needs_originals else None
        return attach(model, settings, seed=seed, originals=originals)

    @cached_property
    def _originals(self) -> Callable[[str], Tensor]:
        """The weights that NF4 was made from, for LoftQ."""
        return original_weights(self.source)

    def _train(
        self,
        model: PreTrainedModel,
        adapter: AttachedAdapter,
        config: RunConfig,
        rows: TokenizedSet,
    ) -> Row:
        """Train as `qlora-kit train` does, with nothing saved."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(
                config,
                folder=Path(folder),
                rows=len(rows),
                device=str(model.device),
                autocast=computing_dtype(adapter.pieces),
            ).set_save(strategy="no")
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            trainer = Trainer(
                model,
                adapter,
                arguments,
                train_dataset=rows,
                data_collator=make_collator(rows, pad_to_multiple_of=8 if self.on_gpu else 1),
            )
            output = trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "trainable": adapter.num_trainable,
            "updates": trainer.state.global_step,
            "tokens": trainer.state.num_input_tokens_seen,
            "train_losses": [round(loss, 4) for loss in losses],
            "train_seconds": round(output.metrics["train_runtime"], 2),
            **self._left(trainer),
        }

    def _left(self, trainer: Trainer) -> Row:
        """How layers ran and the peak of memory; gives the model its own layers back."""
        fused = trainer.fused is not None
        if trainer.fused is not None:
            trainer.fused.remove()
        peak = torch.cuda.max_memory_allocated() - self._held if self.on_gpu else None
        return {"fused": fused, "peak_bytes": peak}

    # Speed

    def _speed(self, job: Job) -> Row:
        """Time steps of one shape, all tokens counting, by events that nobody waits for."""
        case, shape = BY_NAME[str(job.case)], self.shapes[str(job.shape)]
        set_seed(0)
        self._held = 0
        demo = shape.name == DEMO_SHAPE
        model = self._base(case.bits) if demo else self._random(case.bits, shape)
        adapter = self._attach(model, replace(case, settings=case.settings | case.timed), 0)
        autocast_to = computing_dtype(adapter.pieces)
        generator = torch.Generator().manual_seed(0)
        updates = shape.warmup + shape.steps + 1
        size = shape.batch * updates, shape.seq
        ids = torch.randint(5, model.config.vocab_size, size, generator=generator).tolist()
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=shape.batch,
                max_steps=updates,
                learning_rate=1e-4,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                optim="adamw_torch",
                remove_unused_columns=False,
                use_cpu=not self.on_gpu,
                bf16=autocast_to == torch.bfloat16,
            )
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            trainer = Trainer(
                model,
                adapter,
                arguments,
                train_dataset=[{"input_ids": row, "labels": row} for row in ids],
                data_collator=PadCollator(0, 1),
                callbacks=[clock],
            )
            trainer.train()
        took = clock.milliseconds(shape.warmup)
        median = statistics.median(took)
        return {
            "trainable": adapter.num_trainable,
            "ms": round(median, 3),
            "ms_min": round(min(took), 3),
            "ms_max": round(max(took), 3),
            "tokens_per_s": round(1e3 * shape.batch * shape.seq / median, 1),
            **self._left(trainer),
        }

    def _random(self, bits: int, shape: Shape) -> PreTrainedModel:
        """A model of a public shape with random weights."""
        return random_model(
            config_of(shape.name),
            QuantConfig() if bits == 4 else None,
            device="cuda" if self.on_gpu else "cpu",
            dtype=torch.bfloat16 if self.on_gpu else torch.float32,
        )


def _scores(result: SetResult) -> Row:
    """The figures of a held-out set; a loss that is not a number is None."""
    loss = result.loss if math.isfinite(result.loss) else None
    return {
        "set": result.name,
        "rows": result.rows,
        "loss": None if loss is None else round(loss, 5),
        "score": next(iter(result.scores.values()), None),
        "eval_seconds": round(result.seconds, 2),
    }


def reduced(task: Task, factor: float) -> Task:
    """A task with a share of its budget, for machines without a GPU.

    Args:
        task: the whole one.
        factor: share of updates and of rows to measure on, at most 1.

    Returns:
        The smaller task.

    Example:
        >>> from benchmarks.methods.cases import TASKS
        >>> reduced(TASKS[0], 0.1).updates
        6
    """
    if factor >= 1:
        return task
    return replace(
        task,
        updates=max(2, round(task.updates * factor)),
        tuning_updates=max(2, round(task.tuning_updates * factor)),
        validation_rows=max(4, round(task.validation_rows * factor)),
        test_rows=max(4, round(task.test_rows * factor)),
        eval_batch=min(task.eval_batch, 32),
    )
