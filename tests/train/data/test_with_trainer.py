"""A plain `transformers.Trainer` reads the sets, packed ones included, and sees the same loss."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qlora_kit.train.config import DataConfig
from qlora_kit.train.data.collate import make_collator
from qlora_kit.train.data.dataset import build_dataset
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat


def first_loss(tmp_path, rows, *, packing, batch_size):
    """Training loss of one update over all rows, dropout off, the model unchanged."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(path), packing=packing, max_length=128, loss_on="all")
    dataset = build_dataset(config, tiny_models.tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tiny_models.saved("llama"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=-(-len(dataset) // batch_size),
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=make_collator(dataset, pad_to_multiple_of=8),
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], len(dataset)


def test_packed_and_unpacked_runs_have_the_same_loss(tmp_path):
    rows = [{"prompt": "p" * n, "completion": "c" * (n % 5 + 1)} for n in range(1, 13)]
    plain, examples = first_loss(tmp_path, rows, packing=False, batch_size=4)
    packed, packed_rows = first_loss(tmp_path, rows, packing=True, batch_size=2)
    assert packed_rows < examples == 12
    # float32 sums in another order, through one mean over all tokens
    assert packed == pytest.approx(plain, rel=400 * torch.finfo(torch.float32).eps)
