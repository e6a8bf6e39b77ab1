"""Where this repository keeps its records: the README's claims point at the newest ones.

    benchmarks/results/<bench>/<machine>-<yyyymmdd>-<commit>.json

What is in them: `qlora_kit/bench/record.py`.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from qlora_kit.bench.record import make_record

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


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
    record = make_record(
        bench,
        rows,
        commit=commit,
        dirty=bool(_run("git", "status", "--porcelain", "--untracked-files=no")),
        command=shlex.join(_short(word) for word in sys.argv),
        peaks=peaks,
    )
    gpu: str = record["gpu"] or f"cpu-{os.cpu_count()}x"
    name = gpu.lower().replace("nvidia ", "").replace(" ", "-")
    file = (folder or RESULTS) / bench / f"{name}-{time.strftime('%Y%m%d')}-{commit}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file
