"""The one shape of a benchmark record: what was run, on what, and what came out.

    {"bench", "commit", "dirty", "command", "gpu", "driver", "cpu", "env", "peaks", "rows"}

`peaks` are rates that this very card sustained, `env` the versions of the libraries that
matter, `rows` one measurement each.
"""

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from qlora_kit import __version__

Row = dict[str, Any]
"""One measurement: names to what JSON can hold."""

_PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "triton",
    "liger-kernel",
    "unsloth",
    "unsloth_zoo",
    "trl",
    "cuda-core",
)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that matter, where they are installed.

    Returns:
        Package to version.

    Example:
        >>> list(versions())[:3]
        ['python', 'qlora_kit', 'torch']
    """
    found = {"python": platform.python_version(), "qlora_kit": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Name and memory of the GPU, and its driver; None of each where there is no GPU."""
    if not torch.cuda.is_available():
        return {"gpu": None, "driver": None, "gpu_memory_bytes": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "driver": _driver(),
        "gpu_memory_bytes": properties.total_memory,
    }


def _driver() -> str | None:  # needs a GPU
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def make_record(
    bench: str,
    rows: list[Row],
    *,
    commit: str | None,
    dirty: bool,
    command: str,
    peaks: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Put a record together.

    Args:
        bench: the benchmark's name.
        rows: one measurement each; the fields are those the benchmark writes.
        commit: of the code that was measured; None for an installed package, whose version
            `env` has.
        dirty: whether the code had changes besides.
        command: what was run.
        peaks: measured limits of the card, such as `bf16_tflops` and `copy_tbs`.

    Returns:
        Plain values, for JSON.

    Example:
        >>> record = make_record("speed", [], commit=None, dirty=False, command="bench speed")
        >>> sorted(record)[:4], record["rows"]
        (['bench', 'command', 'commit', 'cpu'], [])
    """
    return {
        "bench": bench,
        "commit": commit,
        "dirty": dirty,
        "command": command,
        **machine(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "env": versions(),
        "peaks": peaks or {},
        "rows": rows,
    }
