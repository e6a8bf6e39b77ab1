"""The one shape of a benchmark record, and where it is written.

A record says what was run, on what, and what came out; the README's claims point
at the newest one of each benchmark:

    benchmarks/results/<bench>/<machine>-<yyyymmdd>-<commit>.json
    {"bench", "commit", "dirty", "command", "gpu", "driver", "env", "peaks", "rows"}
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

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


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _short(word: str) -> str:
    """A command's word without the folders of this machine."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | None]:
    """Name of the GPU and its driver; of the processor where there is no GPU."""
    if torch.cuda.is_available():
        driver = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {"gpu": torch.cuda.get_device_name(0), "driver": driver.splitlines()[0]}
    return {"gpu": None, "driver": None}


def write_record(
    bench: str,
    rows: list[dict[str, object]],
    *,
    peaks: dict[str, float] | None = None,
    folder: Path | None = None,
) -> Path:
    """Write one record.

    Args:
        bench: the benchmark's name, which is also its folder.
        rows: one measurement each; the fields are those the benchmark writes.
        peaks: measured limits of the card, such as `bf16_tflops` and `copy_tbs`.
        folder: where to; None for benchmarks/results. `QLORA_KIT_COMMIT` names the
            commit where there is no git.

    Returns:
        The file.
    """
    commit = os.environ.get("QLORA_KIT_COMMIT") or _run("git", "rev-parse", "--short", "HEAD")
    where = machine()
    gpu = where["gpu"] or f"cpu-{os.cpu_count()}x"
    record = {
        "bench": bench,
        "commit": commit,
        "dirty": bool(_run("git", "status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(_short(word) for word in sys.argv),
        **where,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "env": versions(),
        "peaks": peaks or {},
        "rows": rows,
    }
    name = gpu.lower().replace("nvidia ", "").replace(" ", "-")
    file = (folder or RESULTS) / bench / f"{name}-{time.strftime('%Y%m%d')}-{commit}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file
