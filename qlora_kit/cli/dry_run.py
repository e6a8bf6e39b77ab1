"""`qlora-kit train --dry-run`: everything a run decides, without a weight and without a step.

The model is built on the meta device from its configuration alone, swapped and
adapted by the same code as in a run, so the counts are those of the run. The data
is read and tokenized for real: most mistakes are there.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.cli.run_config import to_yaml
from qlora_kit.core.units import format_bytes
from qlora_kit.train.config import ModelConfig, RunConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_kit.train.data.tokenized import TokenizedSet

Rows = list[tuple[str, str]]


def dry_run(config: RunConfig) -> None:
    """Print what a run would do.

    Args:
        config: the run.

    Raises:
        UserError: as the run itself would, for a model, data or target that does not fit.
    """
    from qlora_kit.train.arguments import check_training
    from qlora_kit.train.data.dataset import eval_names

    print("# the complete run file")
    print(to_yaml(config))
    device, dtype = _device(config.model)
    has_eval = bool(eval_names(config.data))
    check_training(config, on_gpu=device.startswith("cuda"), has_eval=has_eval)
    folder = _model_folder(config.model)
    _table("machine", [("device", f"{device}, computing in {_short(dtype)}")])
    sets = _data(config)
    labels = sets["train"].label_names
    _table("model", _model_rows(config, folder, dtype, len(labels)))
    for name, data in sets.items():
        from qlora_kit.train.data.preview import describe

        _table(f"data: {name}", describe(data.report))
    _table("run", _run_rows(config, len(sets["train"])))
    _print_plan(config, folder, sets["train"], on_gpu=device.startswith("cuda"))
    print("dry run: nothing was trained or written")


def _device(model: ModelConfig) -> "tuple[str, torch.dtype]":
    """Device and compute dtype, resolved as the loader does."""
    import torch

    device = model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if model.dtype != "auto":
        return device, getattr(torch, model.dtype)
    return device, torch.bfloat16 if device.startswith("cuda") else torch.float32


def _model_folder(model: ModelConfig) -> str:
    """A local folder with the configuration, or the hub id: weights are not fetched for this."""
    if not Path(model.path).exists():
        return model.path
    from qlora_kit.checkpoint.source import open_source

    return str(open_source(model.path).folder)


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a run's base, without its weights.

    Args:
        model: names a folder, a `.gguf` file or a hub id.

    Returns:
        The tokenizer.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_model_folder(model), revision=model.revision)


def _data(config: RunConfig) -> dict[str, "TokenizedSet"]:
    """Every set of the run, read and tokenized."""
    from qlora_kit.train.data.dataset import build_dataset, eval_names

    tokenizer = load_tokenizer(config.model)
    sets: dict[str, TokenizedSet] = {}
    for name in ("train", *eval_names(config.data)):
        known = sets["train"].label_names if sets else config.model.labels
        sets[name] = build_dataset(
            config.data,
            tokenizer,
            name,
            task=config.model.task,
            labels=known,
            seed=config.train.seed,
        )
    return sets


def _meta_model(config: RunConfig, folder: str, num_labels: int) -> "PreTrainedModel":
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    base = AutoConfig.from_pretrained(folder, revision=config.model.revision)
    if hasattr(base, "quantization_config"):
        del base.quantization_config  # what it stores is counted below, from the run's settings
    with torch.device("meta"):
        if config.model.task == "sequence_classification":
            base.num_labels = num_labels
            return AutoModelForSequenceClassification.from_config(base)
        return AutoModelForCausalLM.from_config(base)


def _model_rows(config: RunConfig, folder: str, dtype: "torch.dtype", num_labels: int) -> Rows:
    import torch

    from qlora_kit.adapters.inject import attach
    from qlora_kit.adapters.registry import make_adapter_config
    from qlora_kit.nn.swap import quantizable, swap

    model = _meta_model(config, folder, num_labels)
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = [
        ("base", f"{config.model.path} ({model.config.model_type})"),
        ("parameters", f"{total:,}"),
    ]
    if config.model.bits == 4:
        quant = config.base_quant or config.quant
        names = quantizable(model, quant)
        swap(model, dict.fromkeys(names, quant), dtype=dtype)
        stored = [p.numel() for p in model.parameters() if p.dtype == torch.uint8]
        text = f"{format_bytes(sum(stored))} in {len(names)} modules"
        rows.append((f"NF4 at {config.quant.bits_per_weight:.2f} bits", text))
    rest = sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8)
    rows.append((f"{_short(dtype)} weights", format_bytes(rest * dtype.itemsize)))
    adapter = attach(model, make_adapter_config(config.method, *config.settings))
    count = adapter.num_trainable
    width = getattr(torch, adapter.config.dtype).itemsize
    state = 2 if "8bit" in config.train.optimizer else 8
    rows += [
        ("adapter", f"{config.method}, {count:,} trained parameters ({count / total:.2%})"),
        ("its weights, gradients", format_bytes(2 * count * width)),
    ]
    if "adam" in config.train.optimizer:
        rows.append(("its optimizer", f"{format_bytes(count * state)} ({config.train.optimizer})"))
    return rows


def _run_rows(config: RunConfig, examples: int) -> Rows:
    from qlora_kit.train.arguments import update_count

    train = config.train
    per_update = train.batch_size * train.gradient_accumulation
    output = Path(config.output)
    free = shutil.disk_usage(next(p for p in (output, *output.resolve().parents) if p.exists()))
    return [
        ("rows per update", f"{per_update}"),
        ("updates", f"{update_count(train, examples):,}"),
        ("output", f"{output} ({format_bytes(free.free)} free)"),
    ]


def _print_plan(config: RunConfig, folder: str, train: "TokenizedSet", *, on_gpu: bool) -> None:
    """The planner's table for this data, where a run would be planned."""
    from qlora_kit.plan.read import read_config
    from qlora_kit.plan.table import memory_table
    from qlora_kit.train.planning import gpu_of, plan_run

    gpu = gpu_of(config) if on_gpu else None
    if gpu is None:
        return
    made = plan_run(config, read_config(folder, revision=config.model.revision), train.lengths, gpu)
    if made is not None:
        print(f"# plan\n  {made.line}\n")
        print(memory_table(made.predicted, made.planner.budget))
        print()


def _short(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _table(title: str, rows: Rows) -> None:
    print(f"# {title}")
    for name, value in rows:
        print(f"  {name:<24}{value}")
    print()
