"""What the machine gives: how fast a mapped file can be read, and a GPU filled.

    python -m benchmarks.load.rates FOLDER

A load cannot be faster than the slower of the two. Reading: from the page cache through a
fresh mapping (page faults included) into a few buffers, on one thread and on as many as a
load uses, and with `pread` on one. Filling: from pinned memory, from the mapping by the
driver, as transformers does it, and by our ring.
"""

import os
import queue
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_kit.checkpoint.upload import MOST_THREADS, SLOT_BYTES, Uploader

BYTES = 4 << 30
"""Read of the folder for each rate, at most."""
BUFFER = 16 << 20


def mapped(folder: Path) -> list[Tensor]:
    """Views of a folder's tensors as bytes, freshly mapped, until there are enough."""
    views: list[Tensor] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt", device="cpu", backend="mmap") as file:
            views += [file.get_slice(name)[...].view(-1).view(torch.uint8) for name in file.keys()]  # noqa: SIM118
        if sum(view.numel() for view in views) > BYTES:
            break
    return views


def rate(work: Callable[[], int]) -> float:
    """GB/s of something that returns how many bytes it moved."""
    began = time.perf_counter()
    moved = work()
    return moved / (time.perf_counter() - began) / 1e9


def read_mapping(folder: Path, threads: int) -> float:
    """Copy mapped tensors into buffers."""
    ring = Uploader(torch.device("cpu"), threads=threads)
    buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
    for _ in range(threads):
        buffers.put(torch.zeros(SLOT_BYTES, dtype=torch.uint8))

    def read(piece: Tensor) -> int:
        buffer = buffers.get()
        ring._fill(buffer, piece)
        buffers.put(buffer)
        return piece.numel()

    pieces = [piece for view in mapped(folder) for piece in view.split(SLOT_BYTES)]
    with ThreadPoolExecutor(threads) as pool:
        return rate(lambda: sum(pool.map(read, pieces)))


def read_file(folder: Path) -> float:
    """Read files into one buffer."""
    buffer = torch.zeros(BUFFER, dtype=torch.uint8).numpy().data

    def work() -> int:
        moved = 0
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while moved < BYTES and (count := file.readinto(buffer)):
                    moved += count
        return moved

    return rate(work)


def fill_from_pinned() -> float:  # needs a GPU
    """Copy pinned memory to the GPU."""
    source = torch.zeros(BUFFER, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")

    def work() -> int:
        for _ in range(256):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return 256 * BUFFER

    work()
    return rate(work)


def fill_from_mapping(folder: Path) -> float:  # needs a GPU
    """Let the driver copy mapped tensors to the GPU, as transformers does."""
    views = mapped(folder)
    target = torch.empty(max(view.numel() for view in views), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()

    def work() -> int:
        for view in views:
            target[: view.numel()].copy_(view)
        torch.cuda.synchronize()
        return sum(view.numel() for view in views)

    return rate(work)


def fill_by_ring(folder: Path) -> float:  # needs a GPU
    """Our way: mapped tensors through pinned buffers."""
    views, ring = mapped(folder), Uploader(torch.device("cuda"))
    ring.upload(torch.zeros(1 << 28, dtype=torch.uint8))  # threads, buffers and memory exist
    torch.cuda.synchronize()

    def work() -> int:
        for view in views:
            ring.upload(view)
        torch.cuda.synchronize()
        return sum(view.numel() for view in views)

    return rate(work)


def rates(folder: Path) -> dict[str, float]:
    """All rates of this machine.

    Args:
        folder: of safetensors, in the page cache.

    Returns:
        Name to GB/s.
    """
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    found = {
        "read_file_gbs": read_file(folder),
        "read_mapping_1_thread_gbs": read_mapping(folder, 1),
        f"read_mapping_{threads}_threads_gbs": read_mapping(folder, threads),
    }
    if torch.cuda.is_available():
        found["gpu_from_pinned_gbs"] = fill_from_pinned()
        found["gpu_from_mapping_gbs"] = fill_from_mapping(folder)
        found["gpu_by_ring_gbs"] = fill_by_ring(folder)
    return found | {"cores": float(os.cpu_count() or 1)}


def main() -> None:
    """Print the rates of a folder."""
    for name, value in rates(Path(sys.argv[1])).items():
        print(f"{name:32} {value:6.1f}")


if __name__ == "__main__":
    main()
