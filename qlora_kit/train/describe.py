"""Facts about a model and a training, as plain values for the record."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.nn.host_embedding import base_dtype
from qlora_kit.train.record import Stages
from qlora_kit.train.trainer import Trainer

HISTORY = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "tokens_per_s",
    "memory_gib",
    "memory_predicted_gib",
    "mfu",
    "penalty",
)
"""What is kept of every training log; held-out losses are kept too."""


def logical_parameters(model: PreTrainedModel) -> int:
    """Number of weights of a model, however they are stored.

    Args:
        model: quantized or not, with or without an adapter.

    Returns:
        What its configuration alone implies.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> logical_parameters(tiny) == sum(p.numel() for p in tiny.parameters())
        True
    """
    with torch.device("meta"):
        plain = type(model)(model.config)
    return sum(parameter.numel() for parameter in plain.parameters())


def describe_model(model: PreTrainedModel, adapter: AttachedAdapter) -> dict[str, Any]:
    """Kind and sizes of a model with its adapter.

    Args:
        model: with the adapter attached.
        adapter: what is trained.

    Returns:
        Plain values.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.adapters.inject import attach
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> describe_model(tiny, attach(tiny, LoRA(rank=2)))["adapted"]
        4
    """
    own = {tensor.data_ptr() for tensor in adapter.state_dict().values()}
    base = [parameter for parameter in model.parameters() if parameter.data_ptr() not in own]
    return {
        "type": model.config.model_type,
        "class": type(model).__name__,
        "parameters": logical_parameters(model),
        "trainable": adapter.num_trainable,
        "adapted": len(adapter.module_names),
        "base_bytes": sum(p.numel() * p.element_size() for p in base),
        "dtype": str(base_dtype(model)).removeprefix("torch."),
    }


def describe_training(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """How a training went.

    Args:
        trainer: after `train`.
        seconds: it took, evaluations and checkpoints included.

    Returns:
        Plain values; `history` holds one entry per log line.

    Example:
        >>> describe_training.__name__  # a whole use: qlora_kit.train.run
        'describe_training'
    """
    state = trainer.state
    history = [keep_history(entry) for entry in state.log_history]
    return {
        "updates": state.global_step,
        "epochs": state.epoch,
        "seconds": round(seconds, 3),
        "tokens": state.num_input_tokens_seen,
        "tokens_per_s": trainer.mean_tokens_per_s,
        "best_loss": state.best_metric,
        "best_update": state.best_global_step,
        "stopped_early": state.global_step < state.max_steps,
        "history": [entry for entry in history if len(entry) > 2],
        "ranks": None if trainer.ranks is None else trainer.ranks.allocator.history.to_dict(),
    }


def keep_history(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what is worth plotting of one log line.

    Args:
        entry: as the Trainer logs it.

    Returns:
        A smaller dictionary.

    Example:
        >>> keep_history({"step": 5, "loss": 1.0, "eval_loss": 1.2, "train_runtime": 3.0})
        {'step': 5, 'loss': 1.0, 'eval_loss': 1.2}
    """
    return {
        key: value
        for key, value in entry.items()
        if key in HISTORY or (key.startswith("eval") and key.endswith("_loss"))
    }


def memory_peaks(stages: Stages, host_peak_bytes: int) -> dict[str, int]:
    """Highest memory use over all stages.

    Args:
        stages: of the run.
        host_peak_bytes: highest host memory sampled.

    Returns:
        `host_peak_bytes`, and on a GPU `gpu_peak_bytes`.

    Example:
        >>> memory_peaks(Stages(torch.device("cpu")), 10)
        {'host_peak_bytes': 10}
    """
    peaks = {"host_peak_bytes": host_peak_bytes}
    on_gpu: Sequence[int] = [e["gpu_peak_bytes"] for e in stages.entries if "gpu_peak_bytes" in e]
    if on_gpu:
        peaks["gpu_peak_bytes"] = max(on_gpu)
    return peaks
