"""What `train.deterministic` undoes of transformers' full determinism, and only where asked."""

import os

import pytest
import torch
from transformers import TrainingArguments

from qlora_kit.train.repeatable import CUBLAS, repeat_cheaply


@pytest.mark.parametrize(
    ("asked", "filled", "workspace"), [(True, False, ":4096:8"), (False, True, ":16:8")]
)
def test_only_what_was_asked_for_is_undone(monkeypatch, tmp_path, asked, filled, workspace):
    monkeypatch.setenv(CUBLAS, ":16:8")
    settings = torch.utils.deterministic
    monkeypatch.setattr(settings, "fill_uninitialized_memory", True)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, full_determinism=asked)
    repeat_cheaply(args)
    assert settings.fill_uninitialized_memory is filled
    assert os.environ[CUBLAS] == workspace
