"""The fresh process of one length: a random NF4 model, and a few whole updates on one row.

    python -m benchmarks.context.child JOB.json

The row is written to the job's file, out of memory as a row of its own. Before the long updates
comes a short one, so that the optimizer's state and the libraries' workspaces are there when the
long row's peak comes, as they are in a run.
"""

import copy
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.steps import GIB, gpu_memory, is_out_of_memory, start_counting
from qlora_kit.bench.subject import MAX_GRAD_NORM, Stage
from qlora_kit.block.install import FusedBlocks, fuse_blocks
from qlora_kit.block.tiles import Tile, tile_tokens
from qlora_kit.core.memory import PeakMemory
from qlora_kit.nn.host_embedding import keep_embeddings_on_host
from qlora_kit.optim.bnb_adamw import FlatBnbAdamW
from qlora_kit.quant.config import QuantConfig
from qlora_kit.step.head_input import TARGET_POSITIONS, target_positions
from qlora_kit.step.loss import causal_lm_loss
from qlora_kit.step.prepare import MASKLESS, FusedModel, fused_inputs

SHORT = 1024
"""Tokens of the update before the long ones."""

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
"""What runs without a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one process trains."""

    model: str
    length: int
    rank: int
    layers: int | None
    """Instead of the model's own; the peak differs by the weights alone."""
    policy: str
    tile: Tile
    optimizer: str
    quantize_head: bool
    embeddings_on_host: bool
    cap_gib: float | None
    steps: int


def model_config(case: Case) -> PretrainedConfig:
    """The model's configuration, positions for the length, and as many layers as asked for."""
    config = copy.deepcopy(TINY if case.model == "tiny" else config_of(case.model))
    config.max_position_embeddings = max(config.max_position_embeddings, case.length)
    config.num_hidden_layers = case.layers or config.num_hidden_layers
    return config


def build(case: Case, device: str) -> tuple[PreTrainedModel, FusedBlocks, FlatBnbAdamW]:
    """The model with its adapter, its layers fused, and the optimizer of the adapter."""
    quant = QuantConfig()
    quant = quant.with_head() if case.quantize_head else quant
    dtype = torch.bfloat16
    model = random_model(model_config(case), quant, device=device, dtype=dtype)
    if case.embeddings_on_host:
        keep_embeddings_on_host(model)
    adapter = attach(model, LoRA(rank=case.rank, alpha=2.0 * case.rank), seed=0)
    for name, parameter in adapter.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, 0.0, 0.01)
    blocks = fuse_blocks(model.train(), case.policy, tile=tile_tokens(case.tile))
    FusedModel(model, blocks)
    parameters = [p for _, p in adapter.named_parameters() if p.requires_grad]
    paged = case.optimizer.startswith("paged")
    bits = 32 if case.optimizer.endswith("32bit") else 8
    optimizer = FlatBnbAdamW(parameters, lr=1e-4, weight_decay=0.0, bits=bits, paged=paged)
    return model, blocks, optimizer


def batch_of(length: int, vocab: int, device: str) -> dict[str, Any]:
    """One row of random tokens, all of them labels, as the Trainer's collator hands it over."""
    ids = torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(length))
    positions = target_positions(ids)
    found = {"input_ids": ids, "labels": ids, TARGET_POSITIONS: positions}
    batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in found.items()}
    return {**batch, "use_cache": False, MASKLESS: True}


def update(
    model: PreTrainedModel, optimizer: FlatBnbAdamW, batch: dict[str, Any]
) -> tuple[float, float]:
    """Forward, backward, clipping, AdamW: seconds, and the loss."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    loss = causal_lm_loss(model, fused_inputs(batch))
    loss.backward()
    optimizer.clip_grad_norm(MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait()
    return time.perf_counter() - began, float(loss)


def run(case: Case, stage: Stage) -> dict[str, object]:
    """Build and train.

    Args:
        case: what to train.
        stage: told what ends.

    Returns:
        The row.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row: dict[str, object] = {**asdict(case), "trained": False, "oom": False}
    start_counting(case.cap_gib)
    with PeakMemory(interval_s=0.05) as memory:
        try:
            model, blocks, optimizer = build(case, device)
            gc.collect()
            start_counting(case.cap_gib)
            on_gpu = torch.cuda.memory_allocated() if device == "cuda" else 0
            row["weights_gib"] = on_gpu / GIB
            stage("built", f"{on_gpu / GIB:.2f} GiB")
            vocab = model.config.vocab_size
            update(model, optimizer, batch_of(min(SHORT, case.length), vocab, device))
            stage("short", f"{min(SHORT, case.length)} tokens")
            batch = batch_of(case.length, vocab, device)
            for _ in range(case.steps):
                seconds, loss = update(model, optimizer, batch)
                row.setdefault("first_seconds", seconds)
                stage("update", f"{seconds:.1f} s, loss {loss:.3f}")
            row |= {"seconds": seconds, "tokens_per_s": case.length / seconds, "loss": loss}
            row |= {"trained": True, "checkpoints_gib": blocks.host.host_bytes / GIB}
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            row["oom"] = True
            stage("out of memory", str(error).splitlines()[0][:200])
        row |= gpu_memory()
    return row | {"host_gib": memory.peak_bytes / GIB}


def main() -> None:
    """Read the job, do it, write the row."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    row = run(Case(**job["case"]), Stage())
    Path(job["row_file"]).write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main()
