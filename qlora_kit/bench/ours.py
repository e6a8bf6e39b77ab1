"""qlora_kit's side: load, attach, swap the decoder layers, and the Trainer's own optimizer.

The optimizer is what the Trainer creates for a run, so that whatever it does (flat state,
fused clipping) is in the step. `trainer` runs the same steps inside the Trainer, with the
collator, the logging and the checks of a real run, to tell what the loop itself costs.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.registry import METHODS
from qlora_kit.bench.layers import KnownPositions, policy_context
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.steps import RECORDED_AFTER, StepClock
from qlora_kit.bench.subject import (
    MAX_GRAD_NORM,
    Batch,
    Build,
    Point,
    Stage,
    Subject,
)
from qlora_kit.core.allocator import growing_segments
from qlora_kit.load.model import load
from qlora_kit.nn.host_embedding import keep_embeddings_on_host, lookup_waits
from qlora_kit.optim.create import flat_optimizer
from qlora_kit.plan.gpus import recorded_here
from qlora_kit.quant.config import QuantConfig
from qlora_kit.step.graph import StepGraphs
from qlora_kit.step.loss import causal_lm_loss, count_targets
from qlora_kit.step.prepare import MASKLESS, fused_inputs
from qlora_kit.train.arguments import training_arguments
from qlora_kit.train.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer

LOG_EVERY = 5
"""Updates between two log lines, as `qlora-kit train` has them."""

_ROW = {"input_ids": [1, 2], "labels": [1, 2]}


def environment(_build: Build) -> dict[str, str]:
    """Variables that have to be set before the process starts."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return offline | growing_segments()


class _Run:
    """Loss and gradients of the model under the policy of the moment, as the Trainer has them."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: list[nn.Parameter],
        arguments: TrainingArguments,
        step: str,
    ) -> None:
        self.model, self.parameters = model, parameters
        self.arguments, self.step = arguments, step
        self.fused = False
        self.graphs: StepGraphs | None = None
        self._positions = KnownPositions()
        self.replayed = 0

    @contextmanager
    def prepare(self, point: Point) -> Iterator[str]:
        """Sets up a point's policy; gives `fused` or `eager`."""
        with policy_context(
            self.model,
            self.arguments,
            point.policy,
            self.step,
            point.tile,
            keep_decoded=point.keep_decoded,
        ) as step:
            self.fused = step == "fused"
            self.graphs = None
            if self.fused and point.graph and not lookup_waits(self.model):
                most = recorded_here(self.model)
                self.graphs = StepGraphs(self._graph_loss, self.parameters, most_tokens=most)
            self.replayed = 0
            try:
                yield step
            finally:
                self.graphs = None  # gives the memory of recorded steps back
                self.fused = False

    def facts(self) -> dict[str, object]:
        """Whether steps were replayed from a CUDA graph."""
        return {"graph": self.replayed > 0}

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        return causal_lm_loss(self.model, fused_inputs(self._inputs(batch)))

    def backward(self, batch: Batch) -> Tensor:
        """Loss, detached, its gradients added; from a graph where the Trainer would take one."""
        if self.graphs is not None:
            items = count_targets(batch["labels"]).clamp_min(1)
            recorded = self.graphs.run(self._inputs(batch), items)
            if recorded is not None:
                self.replayed += 1
                return recorded
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def _inputs(self, batch: Batch) -> Batch:
        inputs: Batch = {**batch, "use_cache": False}
        if not self.fused:
            return inputs
        # Rows are padded on the right, if at all: what the Trainer's collator finds out.
        return {**self._positions.added(inputs), MASKLESS: True}

    def _graph_loss(self, inputs: Batch, items: Tensor) -> Tensor:
        return causal_lm_loss(self.model, fused_inputs(inputs), items)


def build(build: Build, stage: Stage) -> Subject:
    """Load or make the base and put an adapter on every linear.

    Args:
        build: what to build.
        stage: told when imports, loading and attaching end.

    Returns:
        The subject; its policy is set by `prepare`.
    """
    stage("imports")
    if not build.deterministic:
        torch.use_deterministic_algorithms(False)  # a job before may have asked for it
    model = _base(build)
    stage("loaded")
    model.train()
    if build.adapter is not None:
        adapter = load_adapter(model, build.adapter)
    else:
        config = METHODS[build.method](rank=build.rank, alpha=2 * build.rank)
        adapter = attach(model, config, seed=build.seed)
    if build.embeddings_on_host:
        keep_embeddings_on_host(model)
    parameters = [p for _, p in adapter.named_parameters() if p.requires_grad]
    stage("attached", f"{sum(p.numel() for p in parameters):,} trained, {parameters[0].dtype}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model, adapter, build, [_ROW], batch=1, steps=1, folder=folder, step="eager"
        )
        optimizer = trainer.create_optimizer()
    flat = flat_optimizer(optimizer)
    run = _Run(model, parameters, trainer.args, build.step)
    return Subject(
        model=model,
        loss=run.loss,
        parameters=parameters,
        optimizer=optimizer,
        prepare=run.prepare,
        backward=run.backward,
        facts=run.facts,
        clip=None if flat is None else lambda: flat.clip_grad_norm(MAX_GRAD_NORM),
        trainer=InTrainer(model, adapter, build, optimizer),
        save=lambda folder: adapter.save(folder, base_model=build.checkpoint),
    )


def _base(build: Build) -> PreTrainedModel:
    """The frozen model, from a checkpoint or of random weights."""
    if build.checkpoint:
        return load(build.checkpoint, dtype=build.dtype, device=build.device, attn="sdpa")[0]
    quant = QuantConfig() if build.bits == 4 else None
    config = config_of(build.model)
    return random_model(config, quant, device=build.device, dtype=build.torch_dtype)


def make_trainer(
    model: PreTrainedModel,
    adapter: AttachedAdapter,
    build: Build,
    rows: list[dict[str, Any]],
    *,
    batch: int,
    steps: int,
    folder: str,
    step: str,
    policy: str = "save",
    log_every: int = LOG_EVERY,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> Trainer:
    """The Trainer as `qlora-kit train` sets it up, for so many steps.

    Args:
        model: with the adapter.
        adapter: what is trained.
        build: optimizer and learning rate.
        rows: token lists.
        batch: rows per step.
        steps: updates.
        folder: for checkpoints, of which none is written.
        step: `fused` or `eager`.
        policy: what becomes of activations.
        log_every: updates between two log lines.
        callbacks: more of them.

    Returns:
        The Trainer.
    """
    config = RunConfig(
        model=ModelConfig(path=build.checkpoint or build.model),
        data=DataConfig(train="random tokens"),
        train=TrainConfig(
            max_steps=steps,
            batch_size=batch,
            optimizer=build.optimizer,
            learning_rate=build.learning_rate,
            schedule="constant",
            warmup_ratio=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            gradient_checkpointing=step == "eager" and policy == "recompute_all",
            log_every=log_every,
            deterministic=build.deterministic,
            loggers=(),
        ),
    )
    arguments = training_arguments(
        config, folder=Path(folder), rows=len(rows), device=str(model.device), metric=None
    )
    arguments.save_strategy = SaveStrategy.NO
    return Trainer(
        model,
        adapter,
        arguments,
        train_dataset=rows,
        data_collator=PadCollator(0, 8 if model.device.type == "cuda" else 1),
        callbacks=callbacks,
        step=step,
        activations=policy,
    )


class _Marks(TrainerCallback):
    """Marks the end of every update."""

    def __init__(self, device: str) -> None:
        self.clock = StepClock(device)

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_kwargs: Any) -> None:
        self.clock.mark()


@dataclass(frozen=True, slots=True)
class InTrainer:
    """The same steps inside the Trainer: a `Subject`'s `trainer`."""

    model: PreTrainedModel
    """With the adapter; its layers not fused."""
    adapter: AttachedAdapter
    """What is trained."""
    build: Build
    """Optimizer and learning rate."""
    optimizer: torch.optim.Optimizer
    """Of the bare loop, whose flat buffers hold the adapter."""

    def __call__(
        self,
        point: Point,
        step: str,
        steps: int,
        *,
        log_every: int = LOG_EVERY,
        change: Callable[[Trainer], None] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ) -> list[float]:
        """Milliseconds of so many updates inside the Trainer, a few more before them.

        Args:
            point: batch, sequence and policy.
            step: `fused` or `eager`.
            steps: timed updates.
            log_every: updates between two log lines.
            change: told of the Trainer before it trains, to compare another one with it.
            callbacks: more of them.

        Returns:
            One entry per timed update: batch made, moved, trained on, logged where it is due.
        """
        build, marks = self.build, _Marks(self.build.device)
        total = steps + 1 + RECORDED_AFTER
        generator = torch.Generator().manual_seed(build.seed)
        shape = (total * point.batch, point.seq)
        ids = torch.randint(3, self.model.config.vocab_size, shape, generator=generator).tolist()
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                self.model,
                self.adapter,
                build,
                [{"input_ids": row, "labels": row} for row in ids],
                batch=point.batch,
                steps=total,
                folder=folder,
                step=step,
                policy=point.policy,
                log_every=log_every,
                callbacks=(marks, *callbacks),
            )
            trainer.optimizer = self.optimizer
            if change is not None:
                change(trainer)
            try:
                trainer.train()
            finally:
                if trainer.fused is not None:
                    trainer.fused.remove()
                if step == "eager":
                    self.model.gradient_checkpointing_disable()
        return marks.clock.step_ms()[RECORDED_AFTER:]
