"""The training loop: `transformers.Trainer`, with what an adapter on a frozen base needs.

What is different from the parent, and why:

- The loss is computed at the positions that count only (`step/loss.py`), normalised by
  the number of predicted tokens of all accumulated batches.
- A checkpoint holds the adapter, the optimizer, the schedule and the random state,
  never the base. It appears whole or not at all, and resuming gives the same bits as
  never having stopped: the order of rows depends on seed and epoch alone
  (`sampling.py`), everything else is restored.
- Evaluation weighs tokens, not batches, and never gathers logits.
- The first update checks that the adapter receives gradients at all.
- AdamW and clipping work on flat buffers (`update.py`).
- AdaLoRA's term in the loss and its ranks are followed (`rank_allocation.py`).
- Logs carry tokens per second, the share of the GPU's rate, memory and what was planned, and
  hold nothing up (`log_lines.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.block.tiles import Tile
from qlora_kit.core.atomic import atomic_directory
from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.host_embedding import base_dtype
from qlora_kit.plan.gpus import recorded_here
from qlora_kit.step.graph import StepGraphs
from qlora_kit.step.loss import causal_lm_loss, count_targets
from qlora_kit.step.prepare import FusedCollator, fused_inputs, prepare_model
from qlora_kit.train.callbacks import GradientGuard
from qlora_kit.train.checkpoints import (
    STATE_FILE,
    last_checkpoint,
    prune_checkpoints,
    repage_state,
    restore_adapter,
)
from qlora_kit.train.expected import Expected
from qlora_kit.train.held_out import loss_totals
from qlora_kit.train.log_lines import LoggingTrainer, let_run_ahead
from qlora_kit.train.rank_allocation import RankAllocation
from qlora_kit.train.repeatable import repeat_cheaply
from qlora_kit.train.sampling import EpochSampler, RowSet, SortedSampler, row_lengths
from qlora_kit.train.throughput import Throughput

Batch = dict[str, Tensor]


class Trainer(LoggingTrainer):
    """A `transformers.Trainer` for an adapter on a frozen, quantized or 16-bit base.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.adapters.inject import attach
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> adapter = attach(tiny, LoRA(rank=2))
        >>> args = TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        ...     logging_strategy="no", save_strategy="no")
        >>> row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])}
        >>> trainer = Trainer(tiny, adapter, args, train_dataset=[row])
        >>> trainer.train().global_step
        1
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: AttachedAdapter,
        args: TrainingArguments,
        *,
        train_dataset: RowSet | None = None,
        eval_dataset: RowSet | Mapping[str, RowSet] | None = None,
        data_collator: Callable[[list[Any]], Batch] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        group_by_length: bool = True,
        base_model: str | None = None,
        step: str = "auto",
        activations: str = "auto",
        tile: Tile = "auto",
        keep_decoded: int = 0,
        expected: Expected | None = None,
    ) -> None:
        """Prepare to train an adapter.

        Args:
            model: a causal language model or a sequence classifier, adapter attached.
            adapter: what was attached; the only part of the model that is saved.
            args: Transformers' own arguments; `let_run_ahead` settles some of them.
            train_dataset: rows of token lists; see `train.data`.
            eval_dataset: held-out rows, or several named sets of them.
            data_collator: makes a padded batch of rows.
            callbacks: more Transformers callbacks.
            group_by_length: batch rows of similar length together.
            base_model: folder or hub id written into saved adapters; None: what the model says.
            step: how the model's layers run; see `step/prepare.py`.
            activations: what fused layers keep for the backward, see `block/policy.py`; `auto`
                is `recompute_all` with gradient checkpointing, else `recompute_elementwise`.
            tile: tokens that fused layers treat at a time; see `block/tiles.py`.
            keep_decoded: fused layers, from the first on, whose 4-bit weights stay decoded.
            expected: adds MFU and planned memory to the logs; None for neither.

        Raises:
            AdapterError: nothing in the adapter is trainable.
            ConfigError: `step` is `fused` and the model's layers cannot.
        """
        self.adapter = adapter
        self.base_model = base_model
        self.group_by_length = group_by_length
        self.ranks = RankAllocation.of(adapter)
        trainable = list(adapter.named_parameters())
        if not trainable:
            raise AdapterError(
                "the adapter has no trainable parameters. Attach it before making the Trainer."
            )
        let_run_ahead(args)
        causal = "SequenceClassification" not in type(model).__name__
        self.fused = prepare_model(model, args, step, activations, tile) if causal else None
        if self.fused is not None and keep_decoded:
            self.fused.keep_decoded(keep_decoded, base_dtype(model))
        if self.fused is not None and data_collator is not None:
            data_collator = FusedCollator(data_collator)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[GradientGuard(trainable), *callbacks],
        )
        repeat_cheaply(args)
        if self.ranks is not None:
            self.add_callback(self.ranks)
        self.remove_callback(transformers.PrinterCallback)
        self.causal = causal
        alone = args.world_size == 1 and self.accelerator.scaler is None
        alone = alone and self.fused is not None and self.fused.never_waits
        self.graphs = None
        if alone:
            most, parameters = recorded_here(model), [p for _, p in trainable]
            self.graphs = StepGraphs(self._graph_loss, parameters, most_tokens=most)
        # True: the loss is a sum over tokens divided by `num_items_in_batch`, so it is not
        # divided again by the number of accumulated batches.
        self.model_accepts_loss_kwargs = self.causal
        self.throughput = Throughput(args.device)
        self.expected = expected
        self.logs_late = args.device.type == "cuda"

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return None
        return EpochSampler(
            row_lengths(dataset),
            batch_size=self._train_batch_size * self.args.world_size,
            group_by_length=self.group_by_length,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        if self.args.world_size > 1:
            sampler: Sampler[int] | None = super()._get_eval_sampler(eval_dataset)
            return sampler
        return SortedSampler(row_lengths(eval_dataset))

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one batch; see `transformers.Trainer.compute_loss`.

        Args:
            model: the model, possibly wrapped for several devices.
            inputs: a collated batch.
            return_outputs: also return an (empty) dictionary of outputs.
            num_items_in_batch: predicted tokens of all accumulated batches.

        Returns:
            () float32, or a pair with the outputs.
        """
        if self.causal:
            loss = causal_lm_loss(
                self.accelerator.unwrap_model(model),
                fused_inputs(inputs),
                num_items_in_batch,
                label_smoothing=self.args.label_smoothing_factor,
                forward=model,
            )
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
            return (loss, {}) if return_outputs else loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _graph_loss(self, inputs: Batch, num_items: Tensor) -> Tensor:
        self.model.train()  # a recorded step stays in the mode it was recorded in
        loss: Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=num_items)
        return loss

    def _get_num_items_in_batch(
        self, batch_samples: list[Batch], device: torch.device
    ) -> Tensor | int | None:
        if not self.causal or not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = torch.stack([count_targets(batch["labels"]) for batch in batch_samples]).sum()
        count = count.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp_min(1)

    def training_step(
        self,
        model: nn.Module,
        inputs: Batch,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one batch; counts its tokens.

        Args:
            model: the model.
            inputs: a collated batch.
            num_items_in_batch: predicted tokens of all accumulated batches.

        Returns:
            () the detached loss.
        """
        self.throughput.count(inputs["input_ids"], inputs.get("attention_mask"))
        if self.graphs is not None and isinstance(num_items_in_batch, Tensor):
            recorded = self.graphs.run(self._prepare_inputs(inputs), num_items_in_batch)
            if recorded is not None:
                return self.with_penalty(recorded)
        return self.with_penalty(super().training_step(model, inputs, num_items_in_batch))

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return 0: Transformers' estimate counts packed bytes as weights."""
        return 0

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Token-weighted loss and perplexity (or accuracy) of held-out rows.

        Args:
            dataloader: collated batches.
            description: ignored.
            prediction_loss_only: ignored; logits are never kept.
            ignore_keys: ignored.
            metric_key_prefix: put before every metric's name.

        Returns:
            Metrics only; predictions are None.
        """
        with self.throughput.outside():
            batches = map(fused_inputs, dataloader)
            totals = loss_totals(self.model, batches, causal=self.causal)
        if self.args.world_size > 1:
            totals = totals.summed(self.accelerator)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in totals.metrics().items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=max(1, totals.rows)
        )

    # Checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest whole one.
            trial: hyperparameter search trial.
            ignore_keys_for_eval: ignored; logits are never kept.

        Returns:
            Transformers' `TrainOutput`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(Path(self.args.output_dir)))
        self.throughput.start()
        self._line = None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.adapter.save(folder, base_model=self.base_model, overwrite=True, resumable=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.outside():
            self._flush_tokens()
            if self.args.world_size > 1:  # every process writes its part: no single rename
                super()._save_checkpoint(model, trial)
                return
            run_folder = Path(self._get_output_dir(trial))
            final = run_folder / f"checkpoint-{self.state.global_step}"
            if self.state.best_global_step:
                best = run_folder / f"checkpoint-{self.state.best_global_step}"
                if best == final or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
            with atomic_directory(final, overwrite=True) as folder:
                self._save(str(folder))
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
                self._record_callbacks()
                self.state.save_to_json(str(folder / STATE_FILE))
            prune_checkpoints(
                run_folder, self.args.save_total_limit, self.state.best_model_checkpoint
            )

    def _record_callbacks(self) -> None:
        stateful = [*self.callback_handler.callbacks, self.control]
        for callback in stateful:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(self.adapter, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            repage_state(self.optimizer)

    def _load_best_model(self) -> None:
        restore_adapter(self.adapter, Path(self.state.best_model_checkpoint))
