"""What every test can rely on: no network, caches of its own, GPU tests only with a GPU."""

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

# Before any test imports transformers or datasets, which read these at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHES = tempfile.TemporaryDirectory(prefix="qlora-kit-tests-")
os.environ["HF_HOME"] = str(Path(_CACHES.name) / "huggingface")
os.environ["QLORA_KIT_CACHE"] = str(Path(_CACHES.name) / "qlora_kit")

# glibc raises its threshold for giving a block back to the system as large blocks are freed, so
# what a memory test measures would depend on the tests before it. A fixed threshold does not move.
_M_MMAP_THRESHOLD = -3
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)

import pytest  # noqa: E402

EXPECTED = "QLORA_KIT_EXPECT_TRANSFORMERS"
"""Set by scripts/test.sh: the transformers that this run is meant to test."""

COMPAT_FOLDERS = {
    "adapters",
    "analysis",
    "block",
    "checkpoint",
    "cli",
    "export",
    "load",
    "nn",
    "train",
}
"""Folders whose tests all run with the oldest supported transformers as well."""


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_searched_again() -> None:
    """Set apart what there is before a file's tests, so that collecting garbage looks at theirs.

    accelerate collects in every training run. In a process that has imported everything, and
    holds every test, that took a second each time, and much of the suite's time.
    """
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> str:
    """Name the versions under test, and refuse to test others than were asked for."""
    import torch
    import transformers

    expected = os.environ.get(EXPECTED)
    if expected and transformers.__version__ != expected:
        pytest.exit(f"meant to test transformers {expected}, found {transformers.__version__}", 3)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {device}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine has no device for; mark the folders that touch transformers.

    Files with slow tests come first: a process that takes one last leaves the others idle.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if any(folder in COMPAT_FOLDERS for folder in item.path.parts):
            item.add_marker(pytest.mark.transformers_compat)
        if item.get_closest_marker("gpu") and count < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("multi_gpu") and count < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
