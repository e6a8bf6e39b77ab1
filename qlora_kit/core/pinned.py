"""Pinned host memory in large blocks, faster than `pin_memory=True` gets it.

Pinning a GiB takes about half a second, nearly all of it the kernel's: each page is found and
set to zero by the one thread that asks. Here several threads touch a fresh mapping first, of
pages as large as the system has, and CUDA is told of it when it is there
(`cudaHostRegister`), which is the same memory to the GPU: copies are as fast and as
asynchronous. Torch's own allocator can do so as well (`pinned_use_cuda_host_register`), for
every pinned tensor of a process or for none, and rounds them up to powers of two.
"""

import ctypes
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from qlora_kit.core.log import log_once

THREADS = 8
"""That touch a block's pages; fewer where there are fewer cores."""


class _Count:
    """Bytes that are registered: now, and at most."""

    now = 0
    most = 0


def registered_peak_bytes(*, reset: bool = False) -> int:
    """The most bytes that were registered at once; torch's own statistics do not see them.

    Args:
        reset: count anew from here.

    Returns:
        Bytes.

    Example:
        >>> registered_peak_bytes() >= 0
        True
    """
    found = _Count.most
    if reset:
        _Count.most = _Count.now
    return found


class _Mapping(mmap.mmap):
    """Anonymous memory that is unregistered before it goes."""

    registered = 0
    """Address that CUDA knows it by."""

    def __del__(self) -> None:
        """Let CUDA go of it when no copy is under way."""
        if self.registered and not sys.is_finalizing():  # needs a GPU
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.registered)
            _Count.now -= len(self)


def touched(size: int, *, threads: int = THREADS) -> tuple[_Mapping, Tensor]:
    """Map fresh memory and touch all of its pages.

    Args:
        size: bytes, a multiple of the page size.
        threads: that touch them.

    Returns:
        mapping: the memory.
        data: (size,) uint8, zeros; a view of it that keeps it alive.

    Example:
        >>> _, data = touched(1 << 20, threads=3)
        >>> data.shape, int(data.sum())
        (torch.Size([1048576]), 0)
    """
    mapping = _Mapping(-1, size)
    for name in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # a fork would copy pages that are pinned
        if hasattr(mmap, name):
            mapping.madvise(getattr(mmap, name))
    data = torch.frombuffer(mapping, dtype=torch.uint8)
    threads = max(1, min(threads, os.cpu_count() or 1))
    part = -(-size // threads)
    begin = data.data_ptr()
    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, size, part)
        list(pool.map(lambda at: ctypes.memset(begin + at, 0, min(part, size - at)), starts))
    return mapping, data


def pinned_block(size: int) -> Tensor:  # needs a GPU
    """Pinned memory of one's own, for as long as a view of it lives.

    Args:
        size: bytes, a multiple of the page size.

    Returns:
        (size,) uint8; from torch's allocator where the system refuses, which is logged once.
    """
    mapping, data = touched(size)
    status = torch.cuda.cudart().cudaHostRegister(data.data_ptr(), size, 0)
    if int(status) != 0:
        log_once(
            f"host memory is pinned by torch's allocator: cudaHostRegister said {status}. The "
            "first step takes longer."
        )
        del mapping, data
        with suppress(RuntimeError):  # CUDA says it once more, to whoever launches next
            torch.zeros(1, device="cuda")
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    mapping.registered = data.data_ptr()
    _Count.now += size
    _Count.most = max(_Count.most, _Count.now)
    return data


def pinned_copy(source: Tensor) -> Tensor:  # needs a GPU
    """Copy a tensor to pinned memory of its own.

    Args:
        source: any shape and dtype, on any device.

    Returns:
        Its values, contiguous, on the CPU. Raises what torch and the system do where there is no
        such memory: RuntimeError or OSError.
    """
    pages = max(1, -(-source.nbytes // mmap.PAGESIZE))
    data = pinned_block(pages * mmap.PAGESIZE)[: source.nbytes]
    return data.view(source.dtype).view(source.shape).copy_(source)
