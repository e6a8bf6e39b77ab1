"""What a QLoRA step of real model shapes needs: peak memory and tokens/s.

    python -m benchmarks.memory.fit [--models Llama-3.1-8B ...] [--seq 2048] [--out FOLDER]

Random weights, batch 1, r 16 on all linears, 8-bit AdamW, activations recomputed
in the backward, loss on every token: the settings a small card would use. Each
model runs in a process of its own; running out of memory is recorded as such.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness.record import write_record
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import SHAPES

RANK = 16
WARMUP, STEPS = 2, 5


def measure(name: str, method: str, seq: int, cap_gib: float | None) -> dict[str, object]:
    """One model: some training steps, their peak memory and median time."""
    import bitsandbytes

    from qlora_kit.adapters.config import METHODS
    from qlora_kit.adapters.inject import attach
    from qlora_kit.quant.config import QuantConfig
    from qlora_kit.step.loss import causal_lm_loss

    total = torch.cuda.get_device_properties(0).total_memory
    if cap_gib is not None:
        torch.cuda.set_per_process_memory_fraction(cap_gib * 2**30 / total)
    row: dict[str, object] = {
        "impl": "qlora_kit",
        "model": name,
        "batch": 1,
        "seq": seq,
        "method": method,
        "rank": RANK,
        "policy": "recompute all",
        "optimizer": "adamw_8bit",
        "cap_gib": cap_gib,
        "oom": False,
    }
    try:
        model = random_model(SHAPES[name], QuantConfig(), device="cuda", dtype=torch.bfloat16)
        row["weights_gib"] = torch.cuda.memory_allocated() / 2**30
        adapter = attach(model, METHODS[method](rank=RANK, alpha=2 * RANK))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        parameters = [p for _, p in adapter.named_parameters() if p.requires_grad]
        optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)
        tokens = torch.randint(0, SHAPES[name].vocab_size, (1, seq), device="cuda")
        seconds = []
        for step in range(WARMUP + STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            loss = causal_lm_loss(model, {"input_ids": tokens, "labels": tokens})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            if step >= WARMUP:
                seconds.append(time.perf_counter() - start)
        row["tokens_per_s"] = seq / statistics.median(seconds)
        row["loss"] = loss.item()
    except torch.cuda.OutOfMemoryError:
        row["oom"] = True
    row["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


def main() -> None:
    """Measure every model in its own process, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=["lora"])
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--cap-gib", type=float, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, method = arguments.models[0], arguments.methods[0]
        print(json.dumps(measure(name, method, arguments.seq, arguments.cap_gib)))
        return
    rows = []
    for name in arguments.models:
        for method in arguments.methods:
            command = [sys.executable, "-m", "benchmarks.memory.fit", "--child"]
            command += ["--models", name, "--methods", method, "--seq", str(arguments.seq)]
            command += [] if arguments.cap_gib is None else ["--cap-gib", str(arguments.cap_gib)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} {method} failed:\n{done.stderr[-3000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            speed = row.get("tokens_per_s", 0.0)
            print(
                f"{name:14} {method:8} 1 x {arguments.seq}  weights {row['weights_gib']:6.2f} GiB  "
                f"peak {row['peak_allocated_gib']:6.2f} GiB  {speed:8.0f} tokens/s"
                + ("  out of memory" if row["oom"] else "")
            )
    print(write_record("train", rows, folder=arguments.out))


if __name__ == "__main__":
    main()
