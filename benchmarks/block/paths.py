"""Ways through a decoder layer: the model's own code, torch.compile, and fused, by policy.

    python -m benchmarks.block.paths [--batch 4] [--seq 2048] [--layers 4] [--method lora]
                                     [--without-compiled] [--seconds 240] [--out FOLDER]

A few layers of an 8B model, random weights, NF4, LoRA r 16 on all linears; no embedding, no
head, no optimizer. Per path: the seconds of the first step (compiling included), then
milliseconds and GiB per layer of forward and backward. `kept_kb` are the bytes that a layer
leaves for its backward pass, per token: what was allocated behind the forward pass, its result
aside. `error` is the distance of the gradients from those of the first path, in norm: two
16-bit results differ by about 1%, and only much more would be a fault. `repeatable` is the
fused path with gradients that have the same bits in every run: attention's backward is another.

Paths that begin after `--seconds` are left out. Without a GPU all of it runs on a tiny model,
which tests the benchmark and nothing else.

Random 4-bit codes have a mean, 5% of their deviation. In a row of 4,096 that is a common direction
stronger than all others: four layers later every token is that direction, norms take its gradient
away, and what is left is rounding, nine tenths of it in four tokens. So the codes here are drawn
with next to none (`centre`).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness.record import write_record
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.registry import METHODS
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import SHAPES
from qlora_kit.bench.timing import device
from qlora_kit.block.compiled import POLICIES as COMPILED_POLICIES
from qlora_kit.block.compiled import compile_layers, why_not_compiled
from qlora_kit.block.install import fuse_blocks
from qlora_kit.block.policy import POLICIES
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.attention.transformers_door import register, unpadded_inputs
from qlora_kit.quant.config import QuantConfig

STEPS = 7
WARM_STEPS = 2
GIB = 2**30
_LEFT_OUT = 11
"""The NF4 code without which the others' mean is 0.5% of their deviation."""

Undo = Callable[[], None]
Gradients = dict[str, Tensor]


def make_model(layers: int, method: str) -> nn.Module:
    """The layers, adapted; tiny ones without a GPU."""
    config = copy(SHAPES["Llama-3.1-8B"])
    config.num_hidden_layers, config.vocab_size = layers, 256
    if device() == "cpu":
        config.hidden_size, config.intermediate_size, config.head_dim = 128, 256, 4
    dtype = torch.bfloat16
    model = random_model(config, QuantConfig(), device=device(), dtype=dtype)
    centre(model)
    start = {"init": "pissa"} if method == "pissa" else {}
    adapter = attach(model, METHODS["lora" if start else method](rank=16, alpha=32.0, **start))
    for name, parameter in adapter.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, 0.0, 0.02)
    model.set_attn_implementation(register())
    return model.train()


def centre(model: nn.Module) -> None:
    """Draw 4-bit codes anew, without a mean: of the positive ones 0.338 (11) is left out."""
    for module in model.modules():
        if isinstance(module, NF4Linear):
            packed = module.weight.data
            pair = torch.randint(0, 15, (2, *packed.shape), dtype=torch.uint8, device=packed.device)
            high, low = pair + (pair >= _LEFT_OUT)
            packed.copy_((high << 4) | low)


def own_code(model: nn.Module) -> Undo:
    """Nothing is changed, and nothing computed again."""
    return lambda: None


def own_checkpointing(model: nn.Module) -> Undo:
    """Checkpointing of transformers, non-reentrant."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    return getattr(model, f"{name}_checkpointing_disable")


def paths(compiled: bool) -> dict[tuple[str, str], Callable[[nn.Module], Undo]]:
    """(path, policy) to what prepares a model and gives back what undoes it."""
    found = {("eager", "save"): own_code, ("eager", "recompute_all"): own_checkpointing}
    for policy in COMPILED_POLICIES if compiled else ():
        found["compiled", policy] = lambda model, policy=policy: (
            compile_layers(model, policy, dynamic=False).remove
        )
    for policy in POLICIES:
        found["fused", policy] = lambda model, policy=policy: fuse_blocks(model, policy).remove
    for policy in ("recompute_elementwise", "recompute_all"):
        found["repeatable", policy] = lambda model, policy=policy: (
            fuse_blocks(model, policy, deterministic=True).remove
        )
    return found


class Clock:
    """Time between two places of the GPU's stream, or of the CPU's code."""

    def __init__(self) -> None:
        self._gpu = device() == "cuda"

    def mark(self) -> "torch.cuda.Event | float":
        """A place."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
        """Milliseconds from one to the other."""
        if isinstance(begin, float) or isinstance(end, float):
            return (end - begin) * 1e3
        end.synchronize()
        return begin.elapsed_time(end)


def allocated(peak: bool = False) -> int:
    """Bytes on the GPU; 0 without one."""
    if device() == "cpu":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def measure(model: nn.Module, batch: int, seq: int) -> tuple[dict[str, object], Gradients]:
    """Steps of one path: a row of the record, and the gradients of the last one."""
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    generator = torch.Generator(device()).manual_seed(0)
    shape = (batch, seq, hidden)
    x = torch.randn(shape, generator=generator, device=device(), dtype=torch.bfloat16)
    dy = torch.randn(shape, generator=generator, device=device(), dtype=torch.bfloat16)
    clock, times, kept, started = Clock(), [], 0, time.perf_counter()
    first_s = 0.0
    steps = STEPS if device() == "cuda" else 1
    for step in range(WARM_STEPS + steps):
        model.zero_grad(set_to_none=True)
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, begin = allocated(), clock.mark()
        y = model.model(inputs_embeds=x, use_cache=False, **unpadded_inputs()).last_hidden_state
        kept = max(allocated() - before - y.nbytes, 0)
        y.backward(dy)
        del y
        ms = clock.ms(begin, clock.mark())
        first_s = first_s or time.perf_counter() - started
        if step >= WARM_STEPS:
            times.append(ms / layers)
    tokens = batch * seq
    row: dict[str, object] = {
        "first_s": round(first_s, 2),
        "ms_median": statistics.median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "kept_kb": kept / layers / tokens / 1e3,
        "peak_gib": allocated(peak=True) / GIB,
        "tokens_per_s_32_layers": tokens / (32 * statistics.median(times) / 1e3),
    }
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return row, found


def distance(found: Gradients, wanted: Gradients) -> float:
    """Of two sets of gradients, relative, in norm."""
    wrong = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((wrong / sum(wanted[name].square().sum() for name in wanted)) ** 0.5)


def main(words: list[str] | None = None) -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--method", choices=("lora", "lora_fa"), default="lora")
    parser.add_argument("--without-compiled", action="store_true")
    parser.add_argument("--seconds", type=float, default=240, help="start no path after these")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record")
    arguments = parser.parse_args(words)
    batch, seq = (arguments.batch, arguments.seq) if device() == "cuda" else (2, 40)
    model = make_model(arguments.layers, arguments.method)
    reason = "asked for" if arguments.without_compiled else why_not_compiled(model)
    if reason is not None:
        print(f"without compiled layers: {reason}", flush=True)
    started, rows, wanted = time.perf_counter(), [], None
    for (path, policy), prepare in paths(reason is None).items():
        if time.perf_counter() - started > arguments.seconds:
            print(f"left out: {path} {policy}", flush=True)
            continue
        undo = prepare(model)
        row, found = measure(model, batch, seq)
        undo()
        wanted = found if wanted is None else wanted
        known = {"path": path, "policy": policy, "method": arguments.method}
        sizes = {"batch": batch, "seq": seq, "layers": arguments.layers}
        rows.append(known | sizes | row | {"error": distance(found, wanted)})
        print(f"{path} {policy}: {row['ms_median']:.2f} ms", flush=True)
    write_record("block_paths", rows, folder=arguments.out)
    print(f"\n{'path':10} {'policy':22} first s  ms/layer  kept KB  peak GiB  tok/s (32)   error")
    for row in rows:
        print(
            f"{row['path']:10} {row['policy']:22} {row['first_s']:7.1f} {row['ms_median']:9.3f} "
            f"{row['kept_kb']:8.1f} {row['peak_gib']:9.2f} {row['tokens_per_s_32_layers']:11,.0f} "
            f"{row['error']:7.2%}"
        )


if __name__ == "__main__":
    main()
