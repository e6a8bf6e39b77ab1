"""How long the first use of a 4-bit linear compiles, and how long later ones read the cache.

    python -m benchmarks.ops.first_use [--architecture sm_90a] [--dtype bfloat16] [--out FOLDER]

Needs NVRTC and no GPU. Every source that linears of one dtype can need on an architecture, with
an empty cache of its own: one after the other, as a process meets them; again from that cache; and
all wanted at once while threads compile them, as they do from when a model is loaded on
(`qlora_kit/ops/precompile.py`). What the driver takes to load a binary is not in it. NVRTC takes
all cores: the machine should have nothing else to do.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.harness.record import write_record
from qlora_kit.core.cores import usable_cores
from qlora_kit.ops import jit, precompile

TARGET_S, CACHED_TARGET_S = 10.0, 0.2
"""First use in all, and the same from the cache."""

DTYPES = ("bfloat16", "float16")
_FOLDERS = ("nf4_linear/", "nf4_dequantize/", "low_rank_gradients/")


def sources(architecture: str, dtype: str) -> list[str]:
    """What linears of a dtype can need where no strategy is forced.

    Args:
        architecture: a member of `jit.ARCHITECTURES`.
        dtype: bfloat16 or float16; others are `dense`'s, which has no source of its own.

    Returns:
        Paths below `kernels/`.

    Example:
        >>> "nf4_linear/portable.cu" in sources("sm_80", "bfloat16")
        True
    """
    files = precompile.needed(architecture, getattr(torch, dtype))
    return [file for file in files if file.startswith(_FOLDERS)]


def measure(files: list[str], architecture: str) -> dict[str, tuple[float, float]]:
    """Compile each source once, then take each from the cache.

    Args:
        files: paths below `kernels/`.
        architecture: a member of `jit.ARCHITECTURES`.

    Returns:
        For each, seconds of both.
    """
    with _empty_cache():
        first = {file: _seconds(file, architecture, cached=False) for file in files}
        return {file: (first[file], _seconds(file, architecture, cached=True)) for file in files}


def measure_beside(files: list[str], architecture: str) -> float:
    """Compile all sources by threads, and want each of them from the beginning on.

    Args:
        files: paths below `kernels/`.
        architecture: a member of `jit.ARCHITECTURES`.

    Returns:
        Seconds until all are there.
    """
    with _empty_cache():
        start = time.perf_counter()
        threads = precompile.compile_beside(files, architecture)
        for file in reversed(files):  # from the other end: nobody waits for what another does
            jit.compile_source(file, architecture)
        seconds = time.perf_counter() - start
        for thread in threads:
            thread.join()
    return seconds


@contextmanager
def _empty_cache() -> Iterator[None]:
    before = os.environ.get("QLORA_KIT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLORA_KIT_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["QLORA_KIT_CACHE"]
            else:
                os.environ["QLORA_KIT_CACHE"] = before


def _seconds(file: str, architecture: str, *, cached: bool) -> float:
    start = time.perf_counter()
    _, log = jit.compile_source(file, architecture)
    seconds = time.perf_counter() - start
    assert (log == "") == cached, f"{file}: {'compiled again' if cached else 'was in the cache'}"
    return seconds


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="sm_90a", choices=jit.ARCHITECTURES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["CUDA_CACHE_DISABLE"] = "1"  # NVRTC's own, where it has one
    from cuda.bindings import nvrtc

    files = sources(arguments.architecture, arguments.dtype)
    jit.compile_source(files[0], arguments.architecture, use_cache=False)  # loads the compiler
    runs, beside = [], []
    for _ in range(arguments.repeats):
        runs.append(measure(files, arguments.architecture))
        beside.append(measure_beside(files, arguments.architecture))
    _, *version = nvrtc.nvrtcVersion()
    common = {
        "architecture": arguments.architecture,
        "dtype": arguments.dtype,
        "nvrtc": ".".join(map(str, version)),
        "cores": usable_cores(),
    }
    columns = {file: [run[file] for run in runs] for file in files}
    columns["in all"] = [_total(run, "") for run in runs]
    columns["nf4_linear/hopper/ahead"] = [_total(run, "nf4_linear/hopper/ahead/") for run in runs]
    columns["nf4_linear"] = [_total(run, "nf4_linear/") for run in runs]
    rows: list[dict[str, object]] = []
    for name, pairs in columns.items():
        first, cached = ([pair[i] for pair in pairs] for i in (0, 1))
        row = {"source": name, "s_median": statistics.median(first), "s_all": first}
        row |= {"cached_s_median": statistics.median(cached), "cached_s_all": cached}
        rows.append(common | row)
        print(f"{name:45} {row['s_median']:7.2f} s   cached {row['cached_s_median']:6.3f} s")
    all_beside = statistics.median(beside)
    row = {"source": "in all, by threads", "s_median": all_beside, "s_all": beside}
    rows.append(common | row)
    first_all, cached_all = (
        statistics.median(pair[i] for pair in columns["in all"]) for i in (0, 1)
    )
    for name, seconds, target in (
        ("first use, one after the other", first_all, TARGET_S),
        ("first use, by threads", all_beside, TARGET_S),
        ("from the cache", cached_all, CACHED_TARGET_S),
    ):
        verdict = "pass" if seconds <= target else "miss"
        print(f"{name}: {seconds:.2f} s, target {target}: {verdict}")
    print(write_record("first_use", rows, folder=arguments.out))


def _total(run: dict[str, tuple[float, float]], prefix: str) -> tuple[float, float]:
    chosen = [pair for file, pair in run.items() if file.startswith(prefix)]
    return sum(pair[0] for pair in chosen), sum(pair[1] for pair in chosen)


if __name__ == "__main__":
    main()
