"""Tiny models with adapters and random rows, shared by the tests of the training room."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer
from tests import tiny_models


def adapted(dropout: float = 0.0, **options: Any) -> tuple[PreTrainedModel, AttachedAdapter]:
    """A tiny Llama with LoRA of rank 4; always the same start."""
    model = tiny_models.build("llama")
    return model, attach(model, LoRA(rank=4, alpha=8, dropout=dropout, **options), seed=3)


def rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random rows of 4 to 20 tokens whose last third counts."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, 21, (), generator=generator))
        ids = torch.randint(3, tiny_models.VOCAB, (length,), generator=generator).tolist()
        counted = length // 3
        made.append({"input_ids": ids, "labels": [-100] * (length - counted) + ids[-counted:]})
    return made


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Arguments of a short, quiet run on the CPU."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "restore_callback_states_from_checkpoint": True,
        "seed": 5,
    }
    return TrainingArguments(str(folder), **settings | changes)


def make_trainer(
    folder: Path,
    *,
    count: int = 20,
    dropout: float = 0.0,
    group_by_length: bool = True,
    eval_rows: int = 0,
    callbacks: Any = (),
    **changes: Any,
) -> Trainer:
    """A trainer on a fresh tiny model; equal arguments give equal trainers."""
    model, adapter = adapted(dropout)
    return Trainer(
        model,
        adapter,
        arguments(folder, **changes),
        train_dataset=rows(count),
        eval_dataset=rows(eval_rows, seed=9) if eval_rows else None,
        data_collator=PadCollator(0),
        callbacks=callbacks,
        group_by_length=group_by_length,
    )


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of everything the adapter would save."""
    return {name: tensor.clone() for name, tensor in trainer.adapter.state_dict().items()}
