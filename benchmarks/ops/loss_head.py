"""What the loss of a batch costs: milliseconds and memory, beside all logits at once and Liger.

    python -m benchmarks.ops.loss_head [--tokens 8192] [--hidden 4096] [--vocab 128256]
                                       [--chunks 256 512 1024 2048] [--seconds 2] [--out FOLDER]

Two tables. `head`: loss and gradient of the hidden states from a frozen bfloat16 head, forward
and backward: ours at several chunk sizes (its own choice is marked), the same chunks with the
elementwise work in plain torch as it was before (`plain torch`), all logits at once, Liger's
fused linear cross-entropy if it is installed, and the head's two products alone over the same
chunks, which nothing can beat. Peak memory is what a step allocates above head and hidden
states. Variants run in turn; medians count. A trained and an NF4 head follow, ours alone.

`cross_entropy`: the op on one chunk of logits, beside a copy of the bytes it cannot avoid, each
logit read and each gradient written once; with one and two rows to a processor, kept there or
read twice, and without the gradient, which reads only. Without a GPU it all runs on small
operands, which tests the benchmark and nothing else.
"""

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness.record import write_record
from benchmarks.ops.nf4_dequantize import DTYPE, measure
from qlora_kit.bench.timing import Call, device, peaks, spread
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.nn.loss_head import chunk_tokens_for, head_loss
from qlora_kit.ops.backend import force_backend
from qlora_kit.ops.cross_entropy import cuda
from qlora_kit.ops.cross_entropy.op import cross_entropy, cross_entropy_
from qlora_kit.quant.config import QuantConfig

Step = Callable[[], Tensor]
"""Runs forward and backward; returns the gradient of the hidden states."""

TOLERANCE = 2**-6
"""Of gradients against those of all logits, in norm: a few roundings to bfloat16."""

ROUNDS = 30
GIB = 2**30


class Problem:
    """Hidden states, targets and a head."""

    def __init__(self, tokens: int, hidden: int, vocab: int) -> None:
        """Make random ones.

        Args:
            tokens: whose loss is taken.
            hidden: H.
            vocab: V.
        """
        self.tokens, self.size, self.vocab = tokens, hidden, vocab
        made = {"device": device(), "dtype": DTYPE}
        self.head = nn.Linear(hidden, vocab, bias=False, **made).requires_grad_(False)
        self.states = torch.randn(tokens, hidden, **made).requires_grad_()
        self.targets = torch.randint(0, vocab, (tokens,), device=device())

    def finish(self, loss: Tensor) -> Tensor:
        """Backward of a sum over the tokens, normalised; the states' gradient."""
        self.states.grad = None
        (loss / self.tokens).backward()
        assert self.states.grad is not None
        return self.states.grad

    def ours(self, chunk: int | None, head: nn.Module | None = None, backend: str = "") -> Step:
        """The loss head, on the given chunk size, head and backend."""

        def run() -> Tensor:
            def loss() -> Tensor:
                chosen = self.head if head is None else head
                return head_loss(chosen, self.states, self.targets, chunk_tokens=chunk).total

            if not backend:
                return self.finish(loss())
            with force_backend(backend):
                return self.finish(loss())

        return run

    def full(self) -> Tensor:
        """All logits at once, in float32 as transformers takes them."""
        logits = self.head(self.states).float()
        return self.finish(F.cross_entropy(logits, self.targets, reduction="sum"))

    def products(self, chunk: int) -> Step:
        """The head's two products over the chunks, nothing between them."""

        def run() -> Tensor:
            states, weight = self.states.detach(), self.head.weight
            found = torch.empty_like(states)
            logits = states.new_empty(chunk, self.vocab)
            for start in range(0, self.tokens, chunk):
                x = states[start : start + chunk]
                part = torch.mm(x, weight.T, out=logits[: len(x)])
                torch.mm(part, weight, out=found[start : start + chunk])
            return found

        return run

    def liger(self) -> Step:
        """Liger's fused linear cross-entropy."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        function = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda: self.finish(function(self.head.weight, self.states, self.targets))


def variants(problem: Problem, chunks: list[int]) -> dict[str, Step]:
    """Every way to the same gradient."""
    own = chunk_tokens_for(problem.vocab)
    found: dict[str, Step] = {}
    for chunk in sorted({*chunks, own}):
        found[f"ours, chunks of {chunk}" + (" (chosen)" if chunk == own else "")] = problem.ours(
            chunk
        )
    found["plain torch, same chunks"] = problem.ours(own, backend="reference")
    found["products alone, same chunks"] = problem.products(own)
    found["all logits"] = problem.full
    if find_spec("liger_kernel") is not None and device() == "cuda":
        found["liger"] = problem.liger()
    return found


def other_heads(problem: Problem) -> dict[str, Step]:
    """A trained head, and one in NF4."""
    trained = nn.Linear(problem.size, problem.vocab, bias=False, device=device(), dtype=DTYPE)
    nf4 = NF4Linear.from_linear(problem.head, QuantConfig())

    def run_trained() -> Tensor:
        trained.weight.grad = None
        return problem.ours(None, trained)()

    return {"ours, trained head": run_trained, "ours, NF4 head": problem.ours(None, nf4)}


def check(problem: Problem, found: dict[str, Step]) -> None:
    """Every variant's gradient is that of all logits."""
    wanted = problem.full().clone()
    for name, step in found.items():
        if name.startswith("products"):
            continue
        error = float((step().float() - wanted.float()).norm() / wanted.float().norm())
        assert error <= TOLERANCE, f"{name}: gradient off by {error:.2e}"


def peak_gib(step: Step) -> float:
    """What a step allocates beyond what is there already."""
    if device() == "cpu":
        return 0.0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def milliseconds(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Sorted times of each step, run in turn, the host far ahead of the GPU."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.monotonic() + seconds * len(steps)
    for turn in range(ROUNDS):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_once(steps[name]))
        if time.monotonic() > end and turn >= 5:
            break
    return {name: sorted(values[2:]) for name, values in times.items()}  # the first two warm up


def _once(step: Step) -> float:
    if device() == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # about 10 ms: launches are queued meanwhile
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def head_rows(problem: Problem, chunks: list[int], seconds: float) -> list[dict[str, object]]:
    """Time and memory of the whole head."""
    found = variants(problem, chunks)
    check(problem, found)
    rows = []
    for steps in (found, other_heads(problem)):
        memory = {name: peak_gib(step) for name, step in steps.items()}
        for name, values in milliseconds(steps, seconds).items():
            row: dict[str, object] = {"op": "head", "impl": name, "device": device()}
            row |= {"dtype": "bfloat16", "tokens": problem.tokens, "hidden": problem.size}
            row |= {"vocab": problem.vocab, **spread(values), "peak_gib": memory[name]}
            rows.append(row)
    return rows


def op_calls(sets: list[Tensor]) -> dict[str, Call]:
    """The op on one of several chunks of logits, which become gradients at the first call."""
    rows, vocab = sets[0].shape
    targets = torch.randint(0, vocab, (rows,), device=device())
    losses = torch.empty(rows, device=device())

    def planned(blocks: int, keep: bool) -> Call:
        options = (1.0, None, 0.0, None)

        def run(i: int) -> None:
            cuda.run(sets[i], targets, *options, losses, True, None, blocks=blocks, keep=keep)

        return run

    calls: dict[str, Call] = {
        "ours": lambda i: cross_entropy_(sets[i], targets),
        "capped": lambda i: cross_entropy_(sets[i], targets, softcap=30.0),
        "losses only": lambda i: cross_entropy(sets[i], targets),
    }
    if device() == "cuda":
        for blocks in (1, 2):
            calls[f"{blocks} to a processor"] = planned(blocks, keep=True)
            calls[f"{blocks}, rows read twice"] = planned(blocks, keep=False)
    return calls


def op_rows(vocab: int, chunks: list[int], seconds: float) -> list[dict[str, object]]:
    """The op on chunks of logits, beside a copy."""
    rows = []
    for chunk in chunks:
        sets = [torch.randn(chunk, vocab, device=device(), dtype=DTYPE) for _ in range(2)]
        moved = 2 * chunk * vocab * DTYPE.itemsize
        for row in measure(op_calls(sets), len(sets), moved, seconds):
            common = {"op": "cross_entropy", "device": device(), "dtype": "bfloat16"}
            rows.append(common | {"tokens": chunk, "vocab": vocab} | row)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """Print both tables."""
    for row in rows:
        if row["op"] == "head":
            print(
                f"head          {row['impl']:32} {row['ms_median']:8.2f} ms "
                f"({row['ms_p10']:.2f} to {row['ms_p90']:.2f})  {row['peak_gib']:6.2f} GiB"
            )
    for row in rows:
        if row["op"] == "cross_entropy":
            print(
                f"op {row['tokens']:5} rows {row['impl']:19} {row['ms_median']:8.4f} ms "
                f"{row['tbs']:5.2f} TB/s  {row['of_copy']:6.1%} of a copy"
            )


def main() -> None:
    """Measure, print, write the record."""
    gpu = device() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192 if gpu else 96)
    parser.add_argument("--hidden", type=int, default=4096 if gpu else 64)
    parser.add_argument("--vocab", type=int, default=128_256 if gpu else 1000)
    default = [256, 512, 1024, 2048] if gpu else [32]
    parser.add_argument("--chunks", type=int, nargs="+", default=default)
    parser.add_argument("--seconds", type=float, default=2.0, help="per variant, about")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    limits = peaks()
    rows = op_rows(arguments.vocab, arguments.chunks, arguments.seconds)
    if gpu:
        torch.cuda.empty_cache()
    problem = Problem(arguments.tokens, arguments.hidden, arguments.vocab)
    rows += head_rows(problem, arguments.chunks, arguments.seconds)
    file = write_record("loss_head", rows, peaks=limits, folder=arguments.out)
    show(rows)
    print(f"copy: {limits['copy_tbs']:.2f} TB/s, products: {limits['bf16_tflops']:.0f} TFLOP/s")
    print(file)


if __name__ == "__main__":
    main()
