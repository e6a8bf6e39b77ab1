"""A linear whose rows have different adapters: both forms, beside one adapter and the base.

    python -m benchmarks.ops.adapter_rows [--cases 8:1:4 8:512:4 ...] [--size 4096] [--rank 16]
        [--seconds 0.5] [--limit 60] [--out FOLDER]

A case is rows, tokens of each, adapters among them. `masked` and `grouped` are the forms of
adapters/multi_adapter/batch_rows.py, whose limits follow from here; `chosen` is the one it takes.
On a GPU the base is NF4 in bfloat16 and calls are replayed as a CUDA graph, on a CPU it is
dense in float32. Both forms are compared with one adapter at a time before they are timed.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness.record import write_record
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.multi_adapter.batch_rows import BatchRows, Mixed
from qlora_kit.adapters.multi_adapter.pieces import HeldPair, SharedLinear
from qlora_kit.bench.timing import Captured, device, peaks, spread
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig

CASES = {
    "cuda": ("8:1:2", "8:1:8", "64:1:64", "8:32:8", "8:512:4", "8:512:8", "16:512:16", "64:64:64"),
    "cpu": ("8:1:2", "8:1:4", "8:1:8", "8:8:4", "8:64:2", "8:64:4", "8:64:8", "32:1:16"),
}
SIZE = {"cuda": 4096, "cpu": 1024}
FORMS = ("masked", "grouped")
CALLS = {"cuda": 20, "cpu": 1}


def shared(size: int, rank: int, adapters: int) -> SharedLinear:
    """A square linear under adapters called 0, 1, ..."""
    gpu = device() == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    dense = nn.Linear(size, size, bias=False, device=device(), dtype=dtype)
    piece = SharedLinear(NF4Linear.from_linear(dense, QuantConfig()) if gpu else dense, "linear")
    for name in range(adapters):
        a = torch.randn(rank, size, device=device(), dtype=dtype) / size**0.5
        b = torch.randn(size, rank, device=device(), dtype=dtype) / rank**0.5
        piece.hold(str(name), HeldPair(LowRank(a, b, 2.0), a.device))
    return piece.requires_grad_(False)


def answer(piece: SharedLinear, x: Tensor, rows: BatchRows, form: str | None, _: int) -> Tensor:
    """One call; the form is set each time, because the piece is shared by the variants."""
    if form is not None:
        rows.form = "masked" if form == "masked" else "grouped"
    return piece(x)


def check(piece: SharedLinear, x: Tensor, rows: BatchRows) -> None:
    """Both forms agree with one adapter at a time."""
    wanted = torch.empty_like(piece.base(x))
    for row, name in enumerate(rows.names):
        piece.choose(name)
        wanted[row] = piece(x[row : row + 1])[0]
    piece.choose(rows)
    # a few roundings to the result's dtype, and float32 sums of K terms in another order
    eps = 4 * torch.finfo(x.dtype).eps + x.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    limit = eps * wanted.abs().max()
    for form in FORMS:
        found = answer(piece, x, rows, form, 0)
        assert (found - wanted).abs().max() <= limit, form
        assert (found.roll(1, 0) - wanted).abs().max() > 10 * limit or len(rows.names) == 1


def measure(case: str, size: int, rank: int, seconds: float) -> list[dict[str, object]]:
    """Time one case; a row for each variant."""
    count, tokens, adapters = map(int, case.split(":"))
    pieces = {name: shared(size, rank, adapters) for name in ("base", "one", "mixed")}
    x = torch.randn(count, tokens, size, device=device()).to(pieces["base"].pair("0").a.dtype)
    rows = BatchRows([str(row % adapters) for row in range(count)])
    check(pieces["mixed"], x, rows)
    pieces["one"].choose("0")
    captured = Captured()
    for name in ("base", "one", *FORMS):
        form = name if name in FORMS else None
        call = partial(answer, pieces["mixed" if form else name], x, rows, form)
        captured.add(name, call, CALLS[device()], 1)
    times = captured.time(CALLS[device()], seconds)
    pairs = {name: piece for name in rows.names if (piece := pieces["mixed"].pair(str(name)))}
    auto = Mixed(BatchRows(rows.names), {str(n): p for n, p in pairs.items()}, "linear", x.dtype)
    chosen = FORMS[auto.takes_grouped(tokens, x.device)]
    base = statistics.median(times["base"])
    return [
        {"case": case, "size": size, "rank": rank, "impl": name, "chosen": name == chosen}
        | {"device": device(), "of_base": statistics.median(values) / base, **spread(values)}
        for name, values in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES[device()], metavar="ROWS:TOKENS:N")
    parser.add_argument("--size", type=int, default=SIZE[device()])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.5, help="per case, about")
    parser.add_argument("--limit", type=float, default=60.0, help="no case starts later")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    found: list[dict[str, object]] = []
    with torch.no_grad():
        for case in arguments.cases:
            if time.perf_counter() - start > arguments.limit:
                print(f"{case} and what comes after it left out: {arguments.limit:.0f} s are over")
                break
            found += (made := measure(case, arguments.size, arguments.rank, arguments.seconds))
            for row in made:
                mark = "  <- chosen" if row["chosen"] else ""
                print(
                    f"{case:>10} {row['impl']:8} {row['ms_median']:9.4f} ms "
                    f"{row['of_base']:6.2f} of the base{mark}",
                    flush=True,
                )
    print(write_record("adapter_rows", found, peaks=peaks(), folder=arguments.out))


if __name__ == "__main__":
    main()
