"""What a run leaves behind for machines: one JSON object, from which the report is made."""

import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from qlora_kit import __version__
from qlora_kit.core.allocator import segments_grow
from qlora_kit.core.memory import anonymous_bytes
from qlora_kit.train.evaluate import Answer, SetResult

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "peft",
    "safetensors",
    "tokenizers",
)
"""Packages whose versions are recorded where they are installed."""


def package_versions() -> dict[str, str]:
    """Versions of this package and of those that decide its results.

    Returns:
        Package to version; packages that are not installed are left out.

    Example:
        >>> "torch" in package_versions()
        True
    """
    found = {"qlora_kit": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """Commit of the checkout this package runs from, `-dirty` if it has changes.

    Returns:
        A short hash, or None for an installed package or without git.

    Example:
        >>> commit = source_commit()
        >>> commit is None or len(commit) >= 7
        True
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and software a run used.

    Args:
        device: where the model computes.

    Returns:
        Plain values for the record.

    Example:
        >>> environment(torch.device("cpu"))["device"]
        'cpu'
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu_count": psutil.cpu_count(),
        "host_memory_bytes": psutil.virtual_memory().total,
        "versions": package_versions(),
        "commit": source_commit(),
        "command": " ".join(Path(word).name if i == 0 else word for i, word in enumerate(sys.argv)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
        found["growing_segments"] = segments_grow()
    return found


class Stages:
    """Times the parts of a run and notes the memory each needed.

    Example:
        >>> stages = Stages(torch.device("cpu"))
        >>> with stages.stage("load"):
        ...     pass
        >>> [entry["name"] for entry in stages.entries]
        ['load']
    """

    def __init__(self, device: torch.device) -> None:
        """Start the clock.

        Args:
            device: whose memory is noted.
        """
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # its memory counters exist only from then on
        self.entries: list[dict[str, Any]] = []
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block.

        Args:
            name: of the entry.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        entry: dict[str, Any] = {"name": name, "seconds": round(time.perf_counter() - start, 3)}
        if self.device.type == "cuda":
            entry["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        entry["host_bytes"] = anonymous_bytes()
        self.entries.append(entry)

    @property
    def total_seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


def result_from_dict(values: dict[str, Any]) -> SetResult:
    """Rebuild a measurement that `asdict` and JSON have flattened.

    Args:
        values: fields of `SetResult`.

    Returns:
        The measurement.

    Example:
        >>> from dataclasses import asdict
        >>> result = SetResult(name="eval", task="choice", rows=1, tokens=1, loss=0.5,
        ...     perplexity=1.6, scores={}, answers=(Answer(prompt="a", reference="b", answer="b"),))
        >>> result_from_dict(asdict(result)) == result
        True
    """
    answers = tuple(Answer(**answer) for answer in values["answers"])
    return SetResult(**{**values, "answers": answers})
