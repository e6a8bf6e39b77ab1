"""The loop on a GPU: exact resume in bfloat16, 8-bit and paged optimizers, memory running out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import UserError
from qlora_kit.nn.host_embedding import keep_embeddings_on_host
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


class _NoWaiting(TrainerCallback):
    """From the fifth update on, lets torch refuse what waits for the GPU."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:  # models asked, gradients checked, steps recorded
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps - 1:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("width", [None, 24])
def test_no_update_waits_for_the_gpu(
    tmp_path: Path, accumulated: int, width: int | None, on_host: bool
) -> None:
    """Batches, steps with and without a CUDA graph, clipping, AdamW, a log line each time; also
    with embeddings in host memory."""
    model = tiny_models.build("llama", dtype=torch.bfloat16, tie_word_embeddings=not on_host)
    adapter = attach(model.to("cuda"), LoRA(rank=4), seed=3)
    if on_host:
        keep_embeddings_on_host(model)
    made = rows(40)
    if width is not None:  # one shape: recorded
        made = [{"input_ids": [*range(3, 3 + width)], "labels": [*range(3, 3 + width)]}] * 40
    settings = {"use_cpu": False, "max_steps": 9, "save_strategy": "no", "optim": "adamw_8bit"}
    trainer = Trainer(
        model,
        adapter,
        arguments(tmp_path, **settings, gradient_accumulation_steps=accumulated),
        train_dataset=made,
        data_collator=PadCollator(0, 8),
        callbacks=[_NoWaiting()],
    )
    assert trainer.logs_late
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [h["step"] for h in trainer.state.log_history if "loss" in h]
    assert found == [*range(1, 10)]
    assert trainer.graphs is not None
    assert trainer.graphs._recorded or width is None


def test_embeddings_in_host_memory_train_the_same_adapter(tmp_path: Path) -> None:
    """To the bit, most updates replayed: the rows of a recorded step are those of its batch."""
    found = []
    try:
        for on_host in (False, True):
            model = tiny_models.build("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
            adapter = attach(model.to("cuda"), LoRA(rank=4), seed=3)
            if on_host:
                keep_embeddings_on_host(model)
            settings = {"use_cpu": False, "full_determinism": True, "save_strategy": "no"}
            made = [[*range(start, start + 24)] for start in range(3, 43)]
            trainer = Trainer(
                model,
                adapter,
                arguments(tmp_path, **settings, max_steps=8),
                train_dataset=[{"input_ids": row, "labels": row} for row in made],
                data_collator=PadCollator(0, 8),
            )
            trainer.train()
            assert trainer.graphs is not None
            assert trainer.graphs._recorded
            found.append(state(trainer))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class _Work(TrainerCallback):
    """Gives the GPU so many cycles to wait in each update, which the host does not notice."""

    def __init__(self, cycles: int) -> None:
        self.cycles = cycles

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda._sleep(self.cycles)


def test_log_lines_have_the_gpus_time(tmp_path: Path) -> None:
    """40 million cycles are 13 ms or more on any card (3 GHz); no line may say less."""
    trainer = make(tmp_path, max_steps=9, full_determinism=False)  # a checkpoint at 3, 6 and 9
    trainer.add_callback(_Work(40_000_000))
    trainer.train()
    lines = [h for h in trainer.state.log_history if "loss" in h]
    tokens = [0, *(line["tokens"] for line in lines)]
    seconds = [
        (after - before) / line["tokens_per_s"]
        for before, after, line in zip(tokens, tokens[1:], lines, strict=False)
    ]
    assert len(seconds) == 9
    assert min(seconds) > 0.013
    # The first line also has what comes before the Trainer starts its own clock.
    assert sum(seconds[1:]) < trainer.state.log_history[-1]["train_runtime"]


def test_torch_sees_what_waits(tmp_path: Path) -> None:
    """The same with a batch that is waited for: refused."""
    trainer = make(tmp_path, max_steps=9, save_strategy="no", full_determinism=False)
    trainer.accelerator.dataloader_config.non_blocking = False
    trainer.add_callback(_NoWaiting())
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
