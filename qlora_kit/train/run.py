"""A whole fine-tuning run: load, measure, train, measure again, save, merge, check, report.

`run_training` is what `qlora-kit train` calls and what a Python user calls to get
the same. Everything that can be refused is refused before the model is loaded; the
record (`run.json`) is written last, so that its presence means "finished".
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.registry import make_adapter_config
from qlora_kit.adapters.selective.full import computing_dtype
from qlora_kit.checkpoint.source import Source, open_source
from qlora_kit.core.allocator import use_growing_segments
from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import SourceError
from qlora_kit.core.memory import PeakMemory
from qlora_kit.core.units import format_bytes
from qlora_kit.export.originals import original_weights
from qlora_kit.load.model import load
from qlora_kit.load.tokenizer import load_tokenizer
from qlora_kit.nn.host_embedding import base_dtype
from qlora_kit.ops.autocast import autocast
from qlora_kit.plan.read import read_config
from qlora_kit.train.arguments import check_training, is_on_gpu, training_arguments, update_count
from qlora_kit.train.callbacks import ConsoleProgress, Phases, extra_callbacks, quiet_transformers
from qlora_kit.train.checkpoints import whole_checkpoints
from qlora_kit.train.classify import name_classes
from qlora_kit.train.config import RunConfig
from qlora_kit.train.data.collate import MixedCollator, make_collator
from qlora_kit.train.data.dataset import build_dataset, eval_names
from qlora_kit.train.data.tokenized import TokenizedSet
from qlora_kit.train.describe import describe_model, describe_training, memory_peaks
from qlora_kit.train.ends import settle_ends
from qlora_kit.train.evaluate import Evaluator, SetResult
from qlora_kit.train.expected import expected_of
from qlora_kit.train.finish import merge_and_check
from qlora_kit.train.limits import explain_memory_errors
from qlora_kit.train.planning import (
    RunPlan,
    advice,
    bounded_evaluation,
    enforce,
    gpu_of,
    largest_batch,
    plan_run,
)
from qlora_kit.train.record import Stages, environment, result_from_dict
from qlora_kit.train.report import write_report
from qlora_kit.train.summary import count, print_end, print_results, print_start
from qlora_kit.train.trainer import Trainer
from qlora_kit.train.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run produced."""

    output: Path
    """The run's folder."""
    adapter: Path
    """The adapter, in PEFT's format."""
    merged: Path | None
    """The merged model, if asked for."""
    report: Path
    """The report, one HTML file."""
    before: tuple[SetResult, ...]
    """Measurements of the base; empty if not asked for."""
    after: tuple[SetResult, ...]
    """Measurements of the trained model."""
    record: dict[str, Any]
    """Everything in `run.json`."""


def run_training(config: RunConfig, *, console: Console | None = None) -> RunResult:
    """Do a whole run.

    Args:
        config: the run.
        console: where progress and results go; standard output if None.

    Returns:
        Results and where they lie.

    Raises:
        UserError: the configuration, the data, the model or the memory does not allow it.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run_training(RunConfig(model=ModelConfig(path="no/such/model"),
        ...     data=DataConfig(train="rows.jsonl"), output="runs/none"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: ...
    """
    use_growing_segments()
    run = _Run(config, console or Console())
    with explain_memory_errors(config, run.memory_advice), quiet_transformers():
        return run.go()


class _Run:
    """The state of one run, stage by stage."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.space = Workspace(Path(config.output))
        self.phases = Phases(console)
        self.plan: RunPlan | None = None
        self.lengths: list[int] = []
        self.folder = Path()

    def go(self) -> RunResult:
        config = self.config
        on_gpu = is_on_gpu(config.model.device)
        self.space.check(config)
        check_training(config, on_gpu=on_gpu, has_eval=bool(eval_names(config.data)))
        source, tokenizer = self._open()
        set_seed(config.train.seed)
        stages = Stages(torch.device("cuda" if on_gpu else "cpu"))
        with PeakMemory(interval_s=0.05) as memory:
            with stages.stage("data"):
                sets = self._data(tokenizer)
            self._make_plan(sets["train"], stages, on_gpu=on_gpu)
            self.space.open(config)
            with stages.stage("load"):
                model, tokenizer = self._load(sets["train"])
            self._measure_with(tokenizer, model)
            adapter = self._attach(model, source)
            self._print_start(model, adapter, sets)
            with adapter.disabled():
                before = self._before(model, sets, stages)
            with stages.stage("train"):
                training, widest = self._train(model, adapter, sets)
            peak = stages.entries[-1].get("gpu_peak_bytes")
            judged = self.plan.judge(peak, widest) if self.plan and peak else None
            with stages.stage("after"):
                after = self._measure(model, sets, "after")
            self._save(adapter, source)
            merge = None
            if config.export.merge:
                merge = merge_and_check(
                    config, self.space, model, sets, base=self._base_name(), stages=stages
                )
        record = {
            "format": 1,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": asdict(config),
            "environment": environment(model.device),
            "model": describe_model(model, adapter),
            "data": {name: data.report.to_dict() for name, data in sets.items()},
            "training": training,
            "before": [asdict(result) for result in before],
            "after": [asdict(result) for result in after],
            "merge": merge,
            "stages": stages.entries,
            "seconds": round(stages.total_seconds, 3),
            "memory": memory_peaks(stages, memory.peak_bytes),
            "plan": judged,
            "outputs": self.space.outputs(merged=config.export.merge),
        }
        return self._finish(record, before, after)

    def _open(self) -> tuple[Source, PreTrainedTokenizerBase]:
        """The model's folder, its headers read, and its tokenizer."""
        model = self.config.model
        source = open_source(model.path, revision=model.revision)
        tokenizer = load_tokenizer(source.folder)
        if tokenizer is None:
            raise SourceError(
                f"{model.path} has no tokenizer. Copy the tokenizer files of the original model "
                "beside the weights."
            )
        self.folder = source.folder
        return source, tokenizer

    def _make_plan(self, train: TokenizedSet, stages: Stages, *, on_gpu: bool) -> None:
        """Plan the run where it is on a GPU, before its model is there; hold it to its budget."""
        self.pad = 8 if on_gpu else 1
        self.lengths = list(train.lengths)
        enforce(self.config)
        if (gpu := gpu_of(self.config)) is None:
            return
        model = read_config(self.folder)
        with stages.stage("plan"):
            self.plan = plan_run(self.config, model, self.lengths, gpu, multiple=self.pad)
        if self.plan is not None:
            self.config = self.plan.apply(self.config)

    def memory_advice(self) -> str | None:
        """What would fit, after memory ran out."""
        if not self.lengths:
            return None
        return advice(self.config, read_config(self.folder), self.lengths, multiple=self.pad)

    def _data(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, TokenizedSet]:
        config = self.config
        sets: dict[str, TokenizedSet] = {}
        for name in ("train", *eval_names(config.data)):
            sets[name] = build_dataset(
                config.data,
                tokenizer,
                name,
                task=config.model.task,
                labels=sets["train"].label_names if sets else config.model.labels,
                seed=config.train.seed,
            )
        return sets

    def _load(self, train: TokenizedSet) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model_config = self.config.model
        classes = len(train.label_names) if train.label_names else None
        model, tokenizer = load(
            model_config.path,
            quant=self.config.base_quant,
            dtype=model_config.dtype,
            device=model_config.device,
            task=model_config.task,
            num_labels=classes,
            revision=model_config.revision,
            attn=None if model_config.attention == "auto" else model_config.attention,
        )
        assert tokenizer is not None
        if train.label_names:
            name_classes(model, train.label_names)
        return model, tokenizer

    def _attach(self, model: PreTrainedModel, source: Source) -> AttachedAdapter:
        config = self.config
        settings = make_adapter_config(config.method, *config.settings)
        originals = None
        if isinstance(settings, LoRA) and settings.init == "loftq":  # starts at what these lost
            classes = config.model.task == "sequence_classification"
            originals = original_weights(source, task_type="SEQ_CLS" if classes else None)
        adapter = attach(model, settings, seed=config.train.seed, originals=originals)
        settle_ends(model, config.model)
        self.computing = computing_dtype(adapter.pieces)
        return adapter

    def _measure_with(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
        rows, width = largest_batch(self.config, self.lengths, self.pad)
        self.most_tokens = rows * width
        self.evaluator = Evaluator(
            tokenizer,
            self.config.eval,
            phases=self.phases,
            pad_to_multiple_of=self.pad,
            most_tokens=self.most_tokens,
            step=self.config.train.step,
            tile=self.config.train.tile,
        )

    def _measure(
        self, model: PreTrainedModel, sets: dict[str, TokenizedSet], moment: str
    ) -> list[SetResult]:
        with autocast(model.device, self.computing):
            return [
                self.evaluator.measure(model, data, name, label=f"{moment}: {name}")
                for name, data in sets.items()
                if name != "train"
            ]

    def _before(
        self, model: PreTrainedModel, sets: dict[str, TokenizedSet], stages: Stages
    ) -> list[SetResult]:
        if not self.config.eval.before:
            return []
        saved = self.space.read_before()
        if saved is not None:
            return [result_from_dict(values) for values in saved]
        with stages.stage("before"):
            results = self._measure(model, sets, "before")
        text = json.dumps([asdict(result) for result in results], indent=1)
        atomic_write_text(self.space.before, text + "\n")
        return results

    def _print_start(
        self, model: PreTrainedModel, adapter: AttachedAdapter, sets: dict[str, TokenizedSet]
    ) -> None:
        config, report = self.config, sets["train"].report
        facts = describe_model(model, adapter)
        stored, given = config.quant.bits_per_weight, 8 * base_dtype(model).itemsize
        bits = stored if config.model.bits == 4 else given
        held_out = ", ".join(f"{name} {len(data):,}" for name, data in sets.items())
        base = f"{count(facts['parameters'])} parameters, {format_bytes(facts['base_bytes'])}"
        parts = count(facts["trainable"]), facts["adapted"]
        lost = f"{report.truncated:,} cut, {report.dropped:,} dropped"
        updates = update_count(config.train, len(sets["train"]))
        rows = f"{config.train.batch_size} rows"
        if config.train.gradient_accumulation > 1:
            rows += f" × {config.train.gradient_accumulation}"
        lines = {
            "model": f"{config.model.path} ({facts['type']}, {base}, {bits:.3g} bits per weight)",
            "adapter": f"{config.method}, {parts[0]} trained parameters in {parts[1]} modules",
            "data": f"{held_out}; {report.tokens:,} tokens to train on ({lost})",
            "updates": f"{updates:,} of {rows}",
            "device": f"{model.device}, computing in {facts['dtype']}",
            "output": str(self.space.folder),
        }
        if self.plan is not None:
            lines["plan"] = self.plan.line
        print_start(self.console, list(lines.items()))

    def _train(
        self, model: PreTrainedModel, adapter: AttachedAdapter, sets: dict[str, TokenizedSet]
    ) -> tuple[dict[str, Any], tuple[int, int]]:
        """Train; also rows and tokens of the largest batch that came."""
        config, train = self.config, sets["train"]
        held_out = {name: data for name, data in sets.items() if name != "train"}
        single = len(held_out) == 1
        metric = None
        if held_out:
            metric = "eval_loss" if single else f"eval_{next(iter(held_out))}_loss"
        arguments = training_arguments(
            bounded_evaluation(config, held_out.values(), self.most_tokens),
            folder=self.space.checkpoints,
            rows=len(train),
            device=str(model.device),
            half=base_dtype(model) == torch.float16,
            metric=metric,
            autocast=self.computing,
        )
        flatten = config.model.attention == "flash_attention_2"
        plain = make_collator(next(iter(held_out.values()), train), pad_to_multiple_of=self.pad)
        packed = make_collator(train, pad_to_multiple_of=self.pad, flatten=flatten)
        progress = ConsoleProgress(self.console)
        trainer = Trainer(
            model,
            adapter,
            arguments,
            train_dataset=train,
            eval_dataset=next(iter(held_out.values())) if single else held_out or None,
            data_collator=MixedCollator(packed, plain),
            callbacks=[progress, *extra_callbacks(config.train, self.space.logs)],
            group_by_length=config.train.group_by_length and not train.packed,
            base_model=self._base_name(),
            step=config.train.step,
            activations=config.train.activations,
            tile=config.train.tile,
            keep_decoded=config.train.keep_decoded or 0,
            expected=expected_of(model, train, self.plan.peak_bytes if self.plan else None),
        )
        try:
            output = trainer.train(resume_from_checkpoint=True if config.resume else None)
        except KeyboardInterrupt:
            progress.close()
            left = whole_checkpoints(self.space.checkpoints)
            hint = f"{left[-1].name} is whole: continue with resume=true" if left else ""
            self.console.print(f"stopped. {hint}", highlight=False)
            raise
        finally:
            progress.close()
            if trainer.fused is not None:
                trainer.fused.remove()
        described = describe_training(trainer, output.metrics["train_runtime"])
        return described, trainer.throughput.widest

    def _save(self, adapter: AttachedAdapter, source: Source) -> None:
        base, revision = self._base_name(), self.config.model.revision
        adapter.save(self.space.adapter, base_model=base, revision=revision, overwrite=True)
        if self.config.method == "full":  # a model needs its tokenizer
            source.copy_side_files(self.space.adapter)

    def _base_name(self) -> str:
        """The base as an adapter should name it: absolute for a local path, else the hub id."""
        path = Path(self.config.model.path)
        return str(path.resolve()) if path.exists() else self.config.model.path

    def _finish(
        self, record: dict[str, Any], before: list[SetResult], after: list[SetResult]
    ) -> RunResult:
        write_report(record, self.space.report)
        atomic_write_text(self.space.record, json.dumps(record, indent=1) + "\n")
        print_results(self.console, before, after)
        print_end(self.console, record)
        return RunResult(
            output=self.space.folder,
            adapter=self.space.adapter,
            merged=self.space.merged if self.config.export.merge else None,
            report=self.space.report,
            before=tuple(before),
            after=tuple(after),
            record=record,
        )
