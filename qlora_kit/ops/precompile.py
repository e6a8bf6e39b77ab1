"""Kernels compiled beside other work, before they are wanted.

A source compiles in 0.3 to 4 seconds, and the linears and layers of a model can want two
dozen. So loading a model begins with this: threads compile what it may launch into the disk
cache while weights come in. Who wants a kernel that is being compiled waits for that one
alone, and compiles one that nobody has begun (`jit.compile_source`).
"""

import os
import threading
from collections import deque
from functools import cache
from pathlib import Path

import torch

from qlora_kit.core.cores import usable_cores
from qlora_kit.core.log import logger
from qlora_kit.ops import jit

_DTYPES = ("bfloat16", "float16", "float32")


def needed(architecture: str, dtype: torch.dtype) -> list[str]:
    """Which sources a model may launch where nothing is forced.

    Args:
        architecture: a member of `jit.ARCHITECTURES`.
        dtype: the model's: bfloat16, float16 or float32.

    Returns:
        Paths below `kernels/`, Hopper's first: most of them take longest to compile.

    Raises:
        BackendError: the package was built without its kernels.

    Example:
        >>> "nf4_linear/portable.cu" in needed("sm_80", torch.bfloat16)
        True
    """
    files = [file for file in jit.source_files() if _is_needed(Path(file), architecture, dtype)]
    return sorted(files, key=lambda file: "hopper" not in file)


def _is_needed(file: Path, architecture: str, dtype: torch.dtype) -> bool:
    others = tuple(name for name in _DTYPES if name != str(dtype).removeprefix("torch."))
    if file.stem.startswith(others):
        return False
    # Linears' sources that lie in no folder of their own serve where Hopper's do not
    # (nf4_linear/cuda.py: ROWS).
    in_folder = len(file.parts) > 2
    return file.parts[0] != "nf4_linear" or in_folder == (architecture == "sm_90a")


def begin(device: torch.device, dtype: torch.dtype) -> None:
    """Begin to compile what a model may launch, once per process, architecture and dtype.

    Args:
        device: where the model will be; nothing happens where kernels cannot run, as on GPUs
            before Ampere, nor in any but a host's first process (`LOCAL_RANK`).
        dtype: the model's.

    Raises:
        BackendError: the package was built without its kernels.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if device.type != "cuda" or not first or not jit.is_available():
        return
    if torch.cuda.get_device_capability(device) >= (8, 0):  # needs a GPU
        _begin_once(jit.architecture_of(device), dtype)


@cache
def _begin_once(architecture: str, dtype: torch.dtype) -> None:
    compile_beside(needed(architecture, dtype), architecture)


def compile_beside(files: list[str], architecture: str) -> list[threading.Thread]:
    """Compile sources into the disk cache, by threads of half of the cores.

    The process does not end before the sources that are being compiled are done; others are
    then left. What goes wrong is left to who wants the kernel.

    Args:
        files: paths below `kernels/`, in this order.
        architecture: a member of `jit.ARCHITECTURES`.

    Returns:
        The threads, which end when nothing is left.
    """
    left = deque(files)
    threads = [
        threading.Thread(target=_compile, args=(left, architecture), name="qlora-kit-compile")
        for _ in range(min(len(files), max(1, usable_cores() // 2)))
    ]
    for thread in threads:
        thread.start()
    return threads


def _compile(left: deque[str], architecture: str) -> None:
    expected: tuple[type[Exception], ...] = (*jit.errors(), OSError)
    while threading.main_thread().is_alive():
        try:
            file = left.popleft()
        except IndexError:
            return
        try:
            jit.compile_source(file, architecture)
        except expected as error:
            logger.debug("%s was not compiled ahead of its use: %s", file, error)
