"""Paged optimizers: one long row in a stream of short ones, with the state paged and not.

    python -m benchmarks.context.spike [--card-gib 23] [--long 24576] [--fixed-segments]

Memory of the GPU beyond `--card-gib` is taken away first, by the driver and not by torch: as on
a smaller card, what does not fit is not there. Each kind of optimizer trains the same stream in
a process of its own. State that is not paged lies on the GPU during the long row, and the row
runs out of memory; paged state goes to the host for as long as the row needs its place, and
comes back for the update. The seconds of every update are recorded: what paging costs, and when.

Without a GPU a tiny model runs and nothing is paged, which tests the benchmark and nothing else.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.context.child import Case, batch_of, build, update
from benchmarks.harness.record import ROOT, write_record
from qlora_kit.bench.process import run_process
from qlora_kit.bench.steps import GIB, is_out_of_memory
from qlora_kit.bench.subject import Stage
from qlora_kit.core.allocator import FIXED, growing_segments, segments_grow

OPTIMIZERS = ("adamw_32bit", "paged_adamw_32bit")
SHORT = 1024


def take_away(card_gib: float) -> None:  # needs a GPU
    """Leave so much of the GPU's memory, as the driver counts it, for the rest of the process."""
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    size = int(free - card_gib * GIB)
    assert size > 0, f"the GPU has {free / GIB:.1f} GiB free of {total / GIB:.1f}"
    runtime = ctypes.CDLL(None)
    place = ctypes.c_void_p()
    try:
        allocate = runtime.cudaMalloc
    except AttributeError:  # the runtime is loaded, but not for everybody to see
        major = (torch.version.cuda or "12").split(".")[0]
        allocate = ctypes.CDLL(f"libcudart.so.{major}").cudaMalloc
    code = allocate(ctypes.byref(place), ctypes.c_size_t(size))
    assert code == 0, f"cudaMalloc of {size / GIB:.1f} GiB gave {code}"


def stream(long: int) -> list[int]:
    """Tokens of each row."""
    return [SHORT] * 4 + [long] + [SHORT] * 3 + [long, SHORT]


def run(optimizer: str, card_gib: float, long: int, rank: int) -> dict[str, object]:
    """Train the stream.

    Args:
        optimizer: one of `OPTIMIZERS`.
        card_gib: memory of the card.
        long: tokens of the long rows.
        rank: of the adapter, whose state is to be large.

    Returns:
        The row: which updates came through, and their seconds.
    """
    gpu, stage = torch.cuda.is_available(), Stage()
    if gpu:
        take_away(card_gib)
    case = Case(
        model="Llama-3.1-8B" if gpu else "tiny",
        length=long,
        rank=rank,
        layers=None,
        policy="recompute_all",
        tile=None,
        optimizer=optimizer,
        quantize_head=False,
        embeddings_on_host=False,
        cap_gib=None,
        steps=1,
    )
    device = "cuda" if gpu else "cpu"
    model, _, adamw = build(case, device)
    lengths, seconds, detail = stream(long), [], ""
    for length in lengths:
        try:
            batch = batch_of(length, model.config.vocab_size, device)
            took, _loss = update(model, adamw, batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            detail = str(error).splitlines()[0][:200]
            stage("out of memory", f"at {length} tokens: {detail}")
            break
        seconds.append(took)
        free = torch.cuda.mem_get_info()[0] / GIB if gpu else 0.0
        peak = torch.cuda.max_memory_allocated() / GIB if gpu else 0.0
        stage("update", f"{length:6} tokens, {took:6.2f} s; peak {peak:.2f}, free {free:.2f} GiB")
    return {
        "test": "one long row in a stream of short ones",
        "optimizer": optimizer,
        "rank": rank,
        "card_gib": card_gib,
        "lengths": lengths,
        "seconds": seconds,
        "tried": len(lengths),
        "survived": len(seconds),
        "lost": len(lengths) - len(seconds),
        "detail": detail,
        "state_gib": 8 * sum(p.numel() for p in model.parameters() if p.requires_grad) / GIB,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB if gpu else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if gpu else None,
        "expandable_segments": segments_grow(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Both optimizers; 0 if the paged one came through, and on a GPU only that one."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--card-gib", type=float, default=23.0)
    parser.add_argument("--long", type=int, default=24576 if gpu else 64)
    parser.add_argument("--rank", type=int, default=256 if gpu else 4)
    parser.add_argument("--fixed-segments", action="store_true", help="torch's own allocator")
    parser.add_argument("--limit-seconds", type=float, default=240)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        optimizer, file = arguments.child
        row = run(optimizer, arguments.card_gib, arguments.long, arguments.rank)
        Path(file).write_text(json.dumps(row), encoding="utf-8")
        return 0
    rows = []
    for optimizer in OPTIMIZERS:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "row.json"
            words = [sys.executable, "-m", "benchmarks.context.spike", "--child", optimizer]
            words += [str(file), "--card-gib", str(arguments.card_gib)]
            words += ["--long", str(arguments.long), "--rank", str(arguments.rank)]
            print(optimizer, flush=True)
            outcome = run_process(
                words,
                limit_seconds=arguments.limit_seconds,
                folder=ROOT,
                environment=FIXED if arguments.fixed_segments else growing_segments(),
            )
            if not file.exists():
                print("   failed:", outcome.reason, *outcome.tail[-15:], sep="\n     ")
                return 1
            rows.append(json.loads(file.read_text(encoding="utf-8")))
    for row in rows:
        print(f"{row['optimizer']:18} {row['survived']} of {row['tried']} updates")
    print(write_record("paging", rows, folder=arguments.out))
    plain, paged = rows
    return 0 if paged["lost"] == 0 and (plain["lost"] > 0 or not gpu) else 1


if __name__ == "__main__":
    sys.exit(main())
