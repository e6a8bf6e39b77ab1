"""How fast each of torch's kernels attends, forward and backward, as the training step calls it.

    python -m benchmarks.ops.attention [--shapes 4x2048x32x8x128 ...] [--out FOLDER]

q, k and v are views of one projection's buffer, rotating over more memory than the L2 cache
holds; each kernel runs through the explicit pair, all beside each other as
qlora_kit/bench/timing.py describes. A shape is BxTxHqxHkxD, with `:n` for n documents in
it, of unequal lengths, or `:n=` of equal ones. Flops count the half that causality leaves, and
in the backward five products where the forward has two. `deterministic` is flash again, with
the switch on that makes its backward repeat. Before it is timed, each kernel's result is
compared with that of `chunked`.

Without a GPU it measures the CPU's kernels at sizes that test the benchmark.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.record import write_record
from qlora_kit.bench.timing import Call as Timed
from qlora_kit.bench.timing import Captured, device, peaks, spread
from qlora_kit.ops.attention.choose import BACKENDS, choose, force_attention, order
from qlora_kit.ops.attention.pair import attention_backward, attention_forward
from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents

SHAPES = {
    "cuda": (
        "4x2048x32x8x128",
        "1x2048x32x8x128",
        "1x32768x32x8x128",
        "1x8192x32x8x128:8",
        "1x8192x32x8x128:8=",
    ),
    "cpu": ("2x64x4x2x16", "1x128x4x2x16:8"),
}
L2_BYTES = 120_000_000
DTYPE = torch.bfloat16
SECONDS = 2.0
"""Per shape and pass."""
SLOW_TOKENS = 16_384
"""From here on one set of tensors is more than the cache, and one call a round is enough."""
AGREEMENT = 0.02
"""Relative difference to `chunked`: bfloat16 roundings are about a fifth of it."""


@dataclass(frozen=True)
class Shape:
    """What is attended to."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    lengths: tuple[int, ...] | None

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read BxTxHqxHkxD, with `:n` for unequal documents and `:n=` for equal ones."""
        sizes, _, documents = text.partition(":")
        b, t, heads, kv_heads, dim = map(int, sizes.split("x"))
        lengths = None
        if documents:
            count = int(documents.rstrip("="))
            weights = [1.0 if documents.endswith("=") else 1 + i % 4 for i in range(count)]
            ends = [round(t * sum(weights[: i + 1]) / sum(weights)) for i in range(count)]
            lengths = tuple(e - s for s, e in zip([0, *ends[:-1]], ends, strict=True)) * b
        return cls(b, t, heads, kv_heads, dim, lengths)

    def documents(self) -> Documents | None:
        """Where they start, on the device."""
        if self.lengths is None:
            return None
        starts = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        return Documents(starts, max(self.lengths)).to(device())

    def flops(self, which: str) -> float:
        """Multiply-adds, counted twice, of the forward's two or the backward's five products."""
        lengths = self.lengths or (self.tokens,) * self.batch
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        return (2 if which == "forward" else 5) * 2 * pairs * self.heads * self.dim

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v, views of one buffer, and a gradient of the output."""
        widths = [heads * self.dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        rows = self.batch * self.tokens
        buffer = torch.randn(rows, sum(widths), device=device(), dtype=DTYPE)
        q, k, v = (
            part.view(self.batch, self.tokens, -1, self.dim) for part in buffer.split(widths, 1)
        )
        return q, k, v, torch.randn(q.shape, device=device(), dtype=DTYPE)


def variants(shape: Shape, copies: int) -> dict[tuple[str, str], Timed]:
    """Every kernel that serves a shape, each pass of it, by name and pass."""
    rule, documents = AttentionRule(scale=shape.dim**-0.5), shape.documents()
    inputs = [shape.tensors() for _ in range(copies)]
    uneven = shape.lengths is not None and len(set(shape.lengths)) > 1
    call = Call.of(inputs[0][0], rule, documents=uneven)
    names = [name for name in order(call.device) if BACKENDS[name].refuses(call) is None]
    rules = {name: (name, rule) for name in names}
    if "flash" in rules:
        rules["deterministic"] = ("flash", replace(rule, deterministic=True))
    truth: tuple[Tensor, ...] | None = None
    found: dict[tuple[str, str], Timed] = {}
    for label, (name, how) in sorted(rules.items(), key=lambda item: item[0] != "chunked"):

        def forward(i: int, name: str = name, how: AttentionRule = how) -> tuple:
            q, k, v, _ = inputs[i]
            with force_attention(name):
                return attention_forward(q, k, v, how, documents)

        outs = [forward(i) for i in range(copies)]

        def backward(
            i: int, name: str = name, how: AttentionRule = how, outs: list = outs
        ) -> tuple:
            q, k, v, dout = inputs[i]
            with force_attention(name):
                return attention_backward(dout, q, k, v, *outs[i], how, documents)

        results = (outs[0][0], *backward(0))
        truth = truth or results
        worst = max(
            ((a.float() - b.float()).norm() / b.float().norm()).item()
            for a, b in zip(results, truth, strict=True)
        )
        assert worst < AGREEMENT, f"{label} is {worst:.3f} from chunked"
        found[label, "forward"], found[label, "backward"] = forward, backward
    print(f"           chosen automatically: {choose(call)}")
    return found


def measure(shape: Shape) -> list[dict[str, object]]:
    """Rows of one shape."""
    held = shape.batch * shape.tokens * (2 * shape.heads + 2 * shape.kv_heads) * shape.dim * 2
    copies = 1 if shape.tokens >= SLOW_TOKENS else 2
    if device() == "cuda":
        copies = max(copies, math.ceil(L2_BYTES / held))
    found = variants(shape, copies)
    rows: list[dict[str, object]] = []
    for which in ("forward", "backward"):
        captured = Captured()
        for (label, one), call in found.items():
            if one == which:
                captured.add(label, call, copies, copies)
        captured.time(copies, SECONDS / 4)  # until the card is warm
        for label, values in captured.time(copies, SECONDS).items():
            times = spread(values)
            speed = shape.flops(which) / times["ms_median"] / 1e9
            rows.append({"impl": label, "pass": which, **times, "tflops": speed})
    return rows


def main() -> None:
    """Measure, print, write the record."""
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument("--shapes", nargs="+", default=list(SHAPES[device()]), metavar="BxTxHqxHkxD")
    made.add_argument("--out", type=Path, default=None)
    arguments = made.parse_args()
    limits = peaks()
    rows: list[dict[str, object]] = []
    for text in arguments.shapes:
        shape = Shape.parse(text)
        found = measure(shape)
        for row in found:
            print(
                f"{text:>20} {row['impl']:14} {row['pass']:9} {row['ms_median']:9.3f} ms "
                f"{row['tflops']:6.1f} TFLOP/s"
            )
        sizes = {"batch": shape.batch, "seq": shape.tokens, "heads": shape.heads}
        sizes |= {"kv_heads": shape.kv_heads, "head_dim": shape.dim}
        common = {"op": "attention", "device": device(), "dtype": "bfloat16", **sizes}
        rows += [common | {"documents": shape.lengths} | row for row in found]
        if device() == "cuda":
            torch.cuda.empty_cache()
    for which in ("forward", "backward"):
        best = max(float(str(row["tflops"])) for row in rows if row["pass"] == which)
        print(f"{which}: at best {best:.3g} of {limits['bf16_tflops']:.3g} TFLOP/s of products")
    print(write_record("attention", rows, peaks=limits, folder=arguments.out))


if __name__ == "__main__":
    main()
