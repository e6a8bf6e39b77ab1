"""How long a model takes from files to a GPU, and where the time goes.

    python -m benchmarks.load.load [--peers] [--limit-seconds 540] [--out FOLDER]
    python -m benchmarks.load.load --peers --ways bf16-nf4 --runs 1 --together    # two minutes

Makes a random checkpoint of a real shape once, in 16 bits and as stored NF4, puts its files
into the page cache before every load, and loads it in processes of their own:

- `qlora_kit`: `qk.load` into NF4, from 16 bits and from stored NF4, and into 16 bits;
- `qlora_kit_transformers_door`: `AutoModelForCausalLM` with our `NF4Config`;
- `qlora_kit_plain_copies`: ours, but with transformers' own copies to the GPU;
- with `--peers`: bitsandbytes through transformers (`peft`), and Unsloth if it is installed.

Seconds do not include imports and the making of a CUDA context, which have columns of their
own. Host memory is what grows in anonymous memory during the load; pinned buffers, which are
the driver's, are not in it (ours are 128 MiB). Ours is measured once more with timers and a
trace: that row says where time goes, not how long it takes. `--cold` adds a load from the disk.
With `--together` the processes of a round import at once and load one at a time
(qlora_kit/bench/turns.py); rows say `turns`, and their `import_s` compares nothing. A run that is
interrupted writes a record of the rows it has.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.harness.interrupt import interruptible
from benchmarks.harness.record import ROOT, write_record
from benchmarks.load.rates import rates
from qlora_kit.bench.process import run_process
from qlora_kit.bench.random_checkpoint import Storage, checkpoint_bytes, write_checkpoint
from qlora_kit.bench.shapes import MODELS
from qlora_kit.bench.turns import VARIABLE as TURNS

RUNS = 3
CHILD_SECONDS = 120.0
KEPT_SECONDS = 10.0
"""Of the limit, for the record and the table."""

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to load, from one folder."""

    impl: str
    """A key of `child.WAYS`."""
    source: Storage
    """What the folder holds: bf16 or nf4."""
    target: str
    """What the base becomes: bf16 or nf4."""
    runs: int = RUNS
    breakdown: bool = False
    """Timed and traced; see the module's text."""
    cold: bool = False
    """Files are dropped from the page cache first."""

    @property
    def way(self) -> str:
        """From what into what."""
        return f"{self.source}-{self.target}"


def cases(
    peers: bool,
    cold: bool,
    ways: Sequence[str] = (),
    runs: int = RUNS,
    impls: Sequence[str] = (),
) -> list[Case]:
    """What is run, the question first: if time runs out, the rest is left.

    Args:
        peers: theirs as well.
        cold: from the disk, too.
        ways: those alone, as `bf16-nf4`; none for all.
        runs: at most so many of each.
        impls: those alone; none for all.

    Returns:
        One case per row of the table.
    """
    found = [
        Case("qlora_kit", "bf16", "nf4"),
        Case("qlora_kit", "bf16", "nf4", 1, breakdown=True),
        Case("qlora_kit_transformers_door", "bf16", "nf4", 1),
        Case("qlora_kit_plain_copies", "bf16", "nf4", 1),
        Case("qlora_kit", "nf4", "nf4"),
        Case("qlora_kit", "bf16", "bf16"),
        Case("qlora_kit", "nf4", "nf4", 1, breakdown=True),
    ]
    if peers:
        found += [Case("peft", "bf16", "nf4")]
        found += [Case("unsloth", "bf16", "nf4")] if find_spec("unsloth") else []
        found += [Case("peft", "nf4", "nf4", 1), Case("peft", "bf16", "bf16", 1)]
    if cold:
        found += [Case("qlora_kit", "bf16", "nf4", 1, cold=True)]
    chosen = [case for case in found if not ways or case.way in ways]
    chosen = [case for case in chosen if not impls or case.impl in impls]
    return [replace(case, runs=min(case.runs, runs)) for case in chosen]


def warm(folder: Path) -> float:
    """Read every file once, so that all are in the page cache; GB/s."""
    files = sorted(folder.glob("*.safetensors"))

    def read(path: Path) -> int:
        buffer, total = bytearray(16 << 20), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
        return total

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        moved = sum(pool.map(read, files))
    return moved / (time.perf_counter() - began) / 1e9


def drop(folder: Path) -> None:
    """Take the files out of the page cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(
    model: str, root: Path, device: str, sources: Sequence[Storage] = ("bf16", "nf4")
) -> dict[str, Path]:
    """The checkpoints by what they hold; one that is whole is kept."""
    folders: dict[str, Path] = {}
    for source in sources:
        folder = root / f"{model}-{source}"
        if not (folder / "config.json").is_file():
            needed = checkpoint_bytes(model, source)
            root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(root).free
            if free < 1.05 * needed:
                sys.exit(f"{root} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed.")
            began = time.perf_counter()
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            size = write_checkpoint(model, folder, storage=source, device=device, dtype=dtype)
            seconds = time.perf_counter() - began
            print(f"{folder}: {size / 1e9:.2f} GB written in {seconds:.0f} s", flush=True)
        folders[source] = folder
    began = time.perf_counter()
    os.sync()  # nothing is written while loads are timed
    print(f"on the disk after {time.perf_counter() - began:.0f} s more", flush=True)
    if device == "cuda":
        torch.cuda.empty_cache()
    return folders


def run(
    case: Case, folder: Path, device: str, seconds: float, scratch: Path, *, turns: bool = False
) -> Row:
    """One load in a process of its own, which takes turns with others if so asked."""
    if case.cold:
        drop(folder)
    else:
        warm(folder)
    job = scratch / (f"{case.impl}-{case.way}-{case.breakdown}.json" if turns else "job.json")
    answer = job.with_suffix(".row")
    answer.unlink(missing_ok=True)
    fields = {"impl": case.impl, "target": case.target, "breakdown": case.breakdown}
    job.write_text(json.dumps({**fields, "folder": str(folder), "device": device}))
    outcome = run_process(
        [sys.executable, "-m", "benchmarks.load.child", str(job)],
        limit_seconds=seconds,
        folder=ROOT,
        environment={"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        | ({TURNS: str(scratch / "turns")} if turns else {}),
        show=False,
    )
    row: Row = {
        "impl": case.impl,
        "source": case.source,
        "target": case.target,
        "cache": "cold" if case.cold else "warm",
        "breakdown": case.breakdown,
    }
    if outcome.code or not answer.is_file():
        return row | {"failed": outcome.reason or "no answer"}
    return row | json.loads(answer.read_text())


def line(row: Row) -> str:
    """One load, in a line."""
    title = f"{row['impl']:27} {row['source']} -> {row['target']:4} {row['cache']:4}"
    if "failed" in row:
        return f"{title} failed: {row['failed']}"
    found = {key: value for key, value in row.items() if isinstance(value, float)}
    gpu = ""
    if "gpu_model_gib" in found:
        gpu = (
            f"   gpu {found['gpu_model_gib']:5.2f} peak {found['gpu_peak_allocated_gib']:5.2f} "
            f"reserved {found['gpu_peak_reserved_gib']:5.2f} GiB"
        )
    return (
        f"{title} {found['load_s']:6.2f} s   host +{found['host_peak_gib']:5.2f} GiB{gpu}"
        f"   (imports {found['import_s']:.1f} s, context {found['context_s']:.1f} s)"
        + ("   with timers" if row["breakdown"] else "")
    )


def breakdown(row: Row) -> str:
    """Where one load's time went: the host's by phase, the GPU's by kind."""
    lines = [f"where {row['load_s']:.2f} s go, {row['source']} -> {row['target']}:"]
    for title, key in (("host", "phases_s"), ("gpu busy", "gpu_busy_s")):
        parts = row.get(key)
        if isinstance(parts, dict):
            said = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
            lines.append(f"  {title}: {said}")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Medians over the runs of each way."""
    groups: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        seconds = row.get("load_s")
        if isinstance(seconds, float) and not row["breakdown"]:
            key = (row["impl"], row["source"], row["target"], row["cache"])
            groups.setdefault(key, []).append(seconds)
    lines = []
    for (impl, source, target, cache), seconds in groups.items():
        each = " ".join(f"{value:.2f}" for value in seconds)
        lines.append(
            f"{impl:27} {source} -> {target:4} {cache:4} {statistics.median(seconds):6.2f} s"
            f"   [{each}]"
        )
    return "\n".join(lines)


def in_order(
    chosen: Sequence[Case], one: Callable[..., Row], left: Callable[[], float]
) -> Iterator[Row]:
    """Rows of one load after the other; what there is no time for is left out."""
    for case in chosen:
        for _ in range(case.runs):
            if left() < CHILD_SECONDS / 6:
                print(f"no time left for {case.impl} {case.way}")
                break
            row = one(case, min(CHILD_SECONDS, left()))
            yield row
            if "failed" in row:
                break


def together(
    chosen: Sequence[Case], one: Callable[..., Row], left: Callable[[], float]
) -> Iterator[Row]:
    """Rows of rounds: a process of each case, which load one at a time."""
    for count in range(max(case.runs for case in chosen)):
        if left() < CHILD_SECONDS / 6:
            print(f"no time left for round {count + 1}")
            return
        pool = ThreadPoolExecutor(len(chosen))
        try:
            begun = [
                pool.submit(one, case, left(), turns=True) for case in chosen if count < case.runs
            ]
            yield from (done.result() for done in as_completed(begun))
        finally:  # of an interrupted run nobody waits for the rest
            pool.shutdown(wait=False, cancel_futures=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="Llama-3.1-8B")
    parser.add_argument("--peers", action="store_true", help="bitsandbytes, and Unsloth if here")
    parser.add_argument("--cold", action="store_true", help="also from the disk")
    ways = sorted({case.way for case in cases(peers=True, cold=True)})
    parser.add_argument("--impls", nargs="+", default=[], help="these alone, of those above")
    parser.add_argument("--ways", nargs="+", choices=ways, default=[], help="these alone")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, at most")
    parser.add_argument("--together", action="store_true", help="import at once, load in turns")
    parser.add_argument("--limit-seconds", type=float, default=540.0)
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints go")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--out", type=Path, default=None, help="of the record")
    return parser.parse_args()


def main() -> None:
    """Make the checkpoints, run every case while there is time, print and record."""
    arguments = parse()
    end = time.monotonic() + arguments.limit_seconds - KEPT_SECONDS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    root = arguments.folder or Path(tempfile.gettempdir()) / "qlora-kit-bench-load"
    chosen = cases(arguments.peers, arguments.cold, arguments.ways, arguments.runs, arguments.impls)
    if not chosen:
        sys.exit("nothing is left to be loaded")
    sources: dict[Storage, None] = dict.fromkeys(case.source for case in chosen)
    folders = make(arguments.model, root, device, list(sources))
    first = folders[chosen[0].source]
    print(f"into the page cache at {warm(first):.1f} GB/s", flush=True)
    peaks = rates(first)
    if device == "cuda":
        torch.cuda.empty_cache()
    print("  ".join(f"{name} {value:.1f}" for name, value in peaks.items()), flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:

        def one(case: Case, seconds: float, *, turns: bool = False) -> Row:
            row = run(case, folders[case.source], device, seconds, Path(scratch), turns=turns)
            return {"model": arguments.model, **row}

        ways = together if arguments.together else in_order
        try:
            for row in ways(chosen, one, lambda: end - time.monotonic()):
                rows.append(row)
                print(line(row), flush=True)
        except KeyboardInterrupt:
            print("stopped: interrupted", flush=True)
    for folder in () if arguments.keep else folders.values():
        shutil.rmtree(folder)
    print(write_record("load", rows, peaks=peaks, folder=arguments.out))
    for row in rows:
        if "phases_s" in row:
            print(breakdown(row))
    print(summary(rows))


if __name__ == "__main__":
    interruptible()
    main()
