"""The loop on a GPU: exact resume in bfloat16, 8-bit and paged optimizers, memory running out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_kit.adapters.config import LoRA
from qlora_kit.adapters.inject import attach
from qlora_kit.core.errors import UserError
from qlora_kit.train.config import DataConfig, ModelConfig, RunConfig
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.limits import explain_memory_errors
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.train.helpers import arguments, rows, state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(folder: Path, **changes: Any) -> Trainer:
    model = tiny_models.build("llama", dtype=torch.bfloat16).to("cuda")
    adapter = attach(model, LoRA(rank=4, dropout=0.2), seed=3)
    settings = {"use_cpu": False, "full_determinism": True, "max_steps": 6, "save_steps": 3}
    return Trainer(
        model,
        adapter,
        arguments(folder, **settings | changes),
        train_dataset=rows(20),
        data_collator=PadCollator(0, 8),
    )


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_resume_gives_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    """Stopped after three updates and resumed by a fresh trainer."""
    try:
        whole = make(tmp_path / "a", optim=optimizer)
        whole.train()
        make(tmp_path / "b", optim=optimizer, num_train_epochs=1).train()
        for path in (tmp_path / "b").glob("checkpoint-6"):
            path.rename(tmp_path / "done")
        resumed = make(tmp_path / "b", optim=optimizer)
        resumed.train(resume_from_checkpoint=True)
        wanted, found = state(whole), state(resumed)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_running_out_is_advice() -> None:
    """The real allocator's error becomes the run's own words."""
    run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
    advice = pytest.raises(UserError, match=r"out of memory .*train\.batch_size=4")
    with advice, explain_memory_errors(run):
        torch.empty(1 << 50, device="cuda", dtype=torch.uint8)
