"""What an optimizer's update costs after the backward pass, ours beside the per-tensor ones.

    python -m benchmarks.optim.step [--layers 32] [--rank 16] [--out FOLDER]

Needs a GPU; on a CPU it runs a layer to test itself. Tensors are A and B of LoRA on the seven
linears of Llama 3.1 8B: 448 of them, 42 million values in float32. An update is what a training
loop does between the last backward pass and the next forward: 448 gradients as autograd leaves
them, clipping, the step, `zero_grad`. Variants take turns. Two times are taken of each:

- `ms`: from an idle GPU to the end of the update, what a step that waits pays;
- `gpu_ms`: on the GPU, with the host far ahead, as in a long step: only kernels count, and
  whatever makes the host wait in between;
- `host_ms`: until the call returns, the GPU being idle.

Bits are compared first: without clipping, ours are the library's own. A further row:
LoRA-FA's corrected gradient. (Rows `cast` of older records are of code that is gone.)
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.record import write_record
from qlora_kit.adapters.lora.config import LoRAFA
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.bench.timing import device, peaks, spread
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.base import FlatOptimizer
from qlora_kit.optim.bnb_adamw import FlatBnbAdamW
from qlora_kit.optim.corrected import CorrectedGradient

LINEARS = (
    (4096, 4096),
    (1024, 4096),
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (14336, 4096),
    (4096, 14336),
)
"""(N, K) of q, k, v, o, gate, up, down."""
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 0.3
WARM, ROUNDS = 4, 30
AHEAD_CYCLES = 60_000_000
"""A kernel of some 35 ms: the host has queued an update before it ends."""

Work = Callable[[], object]


def shapes(layers: int, rank: int) -> list[tuple[int, int]]:
    """Of all A and B, in the model's order."""
    pairs = [((rank, k), (n, rank)) for n, k in LINEARS]
    return [shape for _ in range(layers) for pair in pairs for shape in pair]


def parameters(sizes: list[tuple[int, int]]) -> list[nn.Parameter]:
    """The same values for every variant."""
    generator = torch.Generator(device()).manual_seed(0)
    return [
        nn.Parameter(torch.randn(size, generator=generator, device=device()) / 64) for size in sizes
    ]


def optimizers(paged: bool) -> dict[str, tuple[str, Callable[[list[nn.Parameter]], Any]]]:
    """Implementation and optimizer to what makes it; libraries per tensor come after ours."""
    import bitsandbytes as bnb

    def theirs(bits: int, paged: bool) -> Callable[[list[nn.Parameter]], Any]:
        return lambda p: bnb.optim.AdamW(p, **OPTIONS, optim_bits=bits, is_paged=paged)

    def ours(bits: int, paged: bool) -> Callable[[list[nn.Parameter]], Any]:
        return lambda p: FlatBnbAdamW(p, **OPTIONS, bits=bits, paged=paged)

    def kept(p: list[nn.Parameter]) -> FlatAdamW:
        made = FlatAdamW(p, **OPTIONS)
        for block in made.blocks:
            block.flat.keep_grad = True
        return made

    found: dict[str, tuple[str, Callable[[list[nn.Parameter]], Any]]] = {
        "ours, adamw": ("qlora_kit", lambda p: FlatAdamW(p, **OPTIONS)),
        "ours, adamw, buffer kept": ("qlora_kit", kept),
        "torch fused, adamw": ("torch", lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True)),
        "torch foreach, adamw": ("torch", lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=True)),
        "ours, 8 bit": ("qlora_kit", ours(8, False)),
        "bitsandbytes, 8 bit": ("bitsandbytes", theirs(8, False)),
    }
    if paged:
        found |= {
            "ours, paged 32 bit": ("qlora_kit", ours(32, True)),
            "bitsandbytes, paged 32 bit": ("bitsandbytes", theirs(32, True)),
            "ours, paged 8 bit": ("qlora_kit", ours(8, True)),
            "bitsandbytes, paged 8 bit": ("bitsandbytes", theirs(8, True)),
        }
    return found


class Update:
    """One variant with parameters and gradients of its own."""

    def __init__(self, params: list[nn.Parameter], optimizer: Any) -> None:
        self.params, self.optimizer = params, optimizer
        generator = torch.Generator(device()).manual_seed(1)
        self.gradients = [
            torch.randn(p.shape, generator=generator, device=p.device) / 1e3 for p in params
        ]

    def arrive(self) -> None:
        """What the backward pass leaves; not timed."""
        for parameter, gradient in zip(self.params, self.gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, clip: bool = True) -> None:
        """The update."""
        if clip and isinstance(self.optimizer, FlatOptimizer):
            self.optimizer.clip_grad_norm(MAX_NORM)
        elif clip:
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()
        for parameter in self.params:
            parameter.grad = None


def check_bits(sizes: list[tuple[int, int]], paged: bool) -> None:
    """Ours are the library's own, after three updates without clipping."""
    makers = optimizers(paged)
    pairs = [("ours, adamw", "torch fused, adamw"), ("ours, 8 bit", "bitsandbytes, 8 bit")]
    if paged:
        pairs += [(f"ours, paged {b} bit", f"bitsandbytes, paged {b} bit") for b in (32, 8)]
    for pair in pairs:
        updates = [
            Update(params, makers[name][1](params))
            for name in pair
            for params in [parameters(sizes)]
        ]
        for _ in range(3):
            for update in updates:
                update.arrive()
                update(clip=False)
        left, right = (update.params for update in updates)
        same = all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
        moved = not torch.equal(left[0], parameters(sizes[:1])[0])
        if not same and device() == "cpu" and pair[0] == "ours, adamw":
            continue  # torch's fused CPU kernel: other instructions, other last bits
        assert same, pair
        assert moved, pair


def wait() -> None:
    """Until the GPU is idle."""
    if device() == "cuda":
        torch.cuda.synchronize()


def measure(before: Work, work: Work) -> dict[str, float]:
    """One round of one variant: the three times."""
    before()
    wait()
    start = time.perf_counter()
    work()
    returned = time.perf_counter()
    wait()
    times = {
        "ms": (time.perf_counter() - start) * 1e3,
        "host_ms": (returned - start) * 1e3,
    }
    if device() == "cuda":
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times["gpu_ms"] = begin.elapsed_time(end)
    return times


def compare(variants: dict[str, tuple[Work, Work]], rounds: int) -> dict[str, dict[str, float]]:
    """Time all variants in turn; medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for index in range(WARM + rounds):
        for name, (before, work) in variants.items():
            times = measure(before, work)
            if index >= WARM:
                found[name].append(times)
    return {
        name: spread(sorted(t["ms"] for t in times))
        | {key: statistics.median(t[key] for t in times) for key in times[0] if key != "ms"}
        for name, times in found.items()
    }


def nothing() -> None:
    """Before a variant that needs no preparation."""


def other_work(layers: int, rank: int) -> dict[str, Any]:
    """The corrected gradient."""
    modules = [
        LoRALinear(
            nn.Linear(k, n, bias=False, device="meta").requires_grad_(False),
            f"m{i}",
            LoRAFA(rank=rank, corrected_gradient=True),
            seed=0,
        )
        for i, (n, k) in enumerate(LINEARS * layers)
    ]
    for module in modules:
        module.to_empty(device=device())
        nn.init.normal_(module.lora_A)
        module.base = nn.Identity()
        module.lora_B.grad = torch.randn_like(module.lora_B)
    correction = CorrectedGradient(modules)
    return {
        "ours, corrected gradient": (nothing, correction.apply),
    }


def main() -> None:
    """Check, measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32 if device() == "cuda" else 1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    gpu = device() == "cuda"
    sizes = shapes(arguments.layers, arguments.rank)
    limits = peaks() if gpu else {}
    check_bits(sizes, paged=gpu)
    print("bits: ours are those of torch and bitsandbytes")
    impl = {name: who for name, (who, _) in optimizers(gpu).items()}
    variants: dict[str, Any] = {}
    for name, (_, make) in optimizers(gpu).items():
        params = parameters(sizes)
        update = Update(params, make(params))
        variants[name] = (update.arrive, update)
    found = compare(variants, ROUNDS if gpu else 2)
    variants.clear()
    with torch.no_grad():
        extra = other_work(arguments.layers, arguments.rank)
        found |= compare(extra, ROUNDS if gpu else 2)
    values = sum(torch.Size(size).numel() for size in sizes)
    common = {
        "device": device(),
        "tensors": len(sizes),
        "values": values,
        "rank": arguments.rank,
        "max_norm": MAX_NORM,
    }
    rows: list[dict[str, object]] = []
    for name, times in found.items():
        who = impl.get(name, "torch" if name.startswith("per tensor") else "qlora_kit")
        rows.append({"impl": who, "variant": name, **common, **times})
    path = write_record("optim_step", rows, peaks=limits, folder=arguments.out)
    print(f"{len(sizes)} tensors, {values / 1e6:.1f} million values; ms, medians")
    print(f"{'':28} {'alone':>8} {'on GPU':>8} {'host':>8}")
    for name, times in found.items():
        on_gpu = times.get("gpu_ms", float("nan"))
        print(f"{name:28} {times['ms_median']:8.3f} {on_gpu:8.3f} {times['host_ms']:8.3f}")
    print(path)


if __name__ == "__main__":
    main()
