"""Launching compiled kernels on torch's current stream, and describing memory to them."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_kit.core.errors import BackendError
from qlora_kit.ops.jit import architecture_of, compile_source

_DEFAULT_SHARED_BYTES = 48 * 1024

_THREAD = threading.local()
"""Whether this thread has a context: `has_context`, once it has launched something."""

DYNAMIC_SHARED_BYTES: dict[tuple[str, str], int] = {}
"""File and kernel to the dynamic shared memory it was launched with, where it has any."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of one source file, compiled per device at first use."""

    file: str
    """Path below `kernels/`."""

    @cached_property
    def _loaded(self) -> dict[tuple[int, str], Any]:
        return {}

    def _kernel(self, name: str, device: torch.device, shared: int) -> Any:  # needs a GPU
        key = (device.index, name)
        if key not in self._loaded:
            from cuda.core import Device

            Device(device.index).set_current()
            code, _ = compile_source(self.file, architecture_of(device))
            kernel = code.get_kernel(name)
            if shared:
                DYNAMIC_SHARED_BYTES[self.file, name] = shared
            if shared > _DEFAULT_SHARED_BYTES:
                _allow_shared(kernel, shared, device.index)
            self._loaded[key] = kernel
        return self._loaded[key]

    def launch(  # needs a GPU
        self,
        name: str,
        grid: int | tuple[int, ...],
        block: int,
        arguments: Sequence[Any],
        *,
        device: torch.device,
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Launch a kernel on torch's current stream of a device.

        Args:
            name: the kernel's name in the source.
            grid: blocks; clusters where `cluster` is above 1.
            block: threads per block.
            arguments: in the kernel's order. A tensor passes its address and None a
                null pointer; integers pass as 64 bits and floats as 32; what
                `tensor_map` returns passes by value.
            device: where the tensors live.
            shared: bytes of dynamic shared memory, the same for each launch of a kernel.
            cluster: blocks per cluster, along the first dimension of the grid.
            overlap: let the kernel start before the stream's previous one has ended
                (programmatic dependent launch); it waits where it says so.
        """
        index = torch.cuda.current_device()
        if device.index is not None and device.index != index:
            with torch.cuda.device(device):
                here = torch.device("cuda", device.index)
                self.launch(
                    name,
                    grid,
                    block,
                    arguments,
                    device=here,
                    shared=shared,
                    cluster=cluster,
                    overlap=overlap,
                )
            return
        if not getattr(_THREAD, "has_context", False):
            _take_context(index)
        kernel = self._loaded.get((index, name))
        if kernel is None:
            kernel = self._kernel(name, torch.device("cuda", index), shared)
        stream = _stream(index, torch._C._cuda_getCurrentRawStream(index))
        config = _config(grid, block, shared, cluster, overlap)
        _launcher()(stream, config, kernel, *map(_argument, arguments))

    def most_clusters(  # needs a GPU
        self, name: str, block: int, shared: int, cluster: int, device: torch.device
    ) -> int:
        """How many clusters of blocks a GPU holds at once.

        Args:
            name: the kernel's name in the source.
            block: threads per block.
            shared: bytes of dynamic shared memory.
            cluster: blocks per cluster.
            device: a CUDA device.

        Returns:
            Clusters; with one block each, blocks.
        """
        with torch.cuda.device(device):
            current = torch.device("cuda", torch.cuda.current_device())
            occupancy = self._kernel(name, current, shared).occupancy
            if cluster == 1:
                properties = torch.cuda.get_device_properties(current)
                blocks = occupancy.max_active_blocks_per_multiprocessor(block, shared)
                return int(blocks * properties.multi_processor_count)
            config = _config(1, block, shared, cluster, False)
            stream = _stream(current.index, torch.cuda.current_stream().cuda_stream)
            return int(occupancy.max_active_clusters(config, stream=stream))


def _take_context(device: int) -> None:  # needs a GPU
    """Give this thread the context of its current device.

    The CUDA runtime does so at its first call in a thread; launches go past it, to the driver.
    """
    from cuda.core import Device

    Device(device).set_current()
    _THREAD.has_context = True


@lru_cache(maxsize=4096)
def _config(  # needs a GPU
    grid: int | tuple[int, ...], block: int, shared: int, cluster: int, overlap: bool
) -> Any:
    """A launch configuration; the same few come again and again."""
    from cuda.core import LaunchConfig

    return LaunchConfig(
        grid=grid,
        block=block,
        shmem_size=shared,
        cluster=None if cluster == 1 else cluster,
        programmatic_stream_serialization=overlap,
    )


def _allow_shared(kernel: Any, shared: int, device: int) -> None:  # needs a GPU
    """Let a kernel use more dynamic shared memory than the 48 KB every kernel may."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared, kernel.handle, device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"this GPU does not give a block {shared} bytes of shared memory.")


@dataclass(frozen=True)
class _Memory:
    """A 2-D matrix as the CUDA array interface describes it; holds on to nothing."""

    address: int
    shape: tuple[int, int]
    kind: str

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "data": (self.address, False),
            "shape": self.shape,
            "typestr": self.kind,
            "strides": None,
            "stream": None,
        }


def tensor_map(matrix: Tensor, box: tuple[int, int], swizzle: int) -> Any:  # needs a GPU
    """Describe a matrix to Hopper's copy engine; passed to a kernel by value.

    Reads outside the matrix give zeros. Descriptions are kept by address and shape:
    they hold no memory, and the caching allocator gives the same addresses again.

    Args:
        matrix: (rows, columns) contiguous, uint8 or a 16-bit dtype, its address and its
            bytes per row multiples of 16.
        box: rows and columns of one copy, at most 256 each.
        swizzle: bytes over which the copy engine permutes 16-byte pieces: 0, 32, 64, 128.

    Returns:
        A `cuda.core` tensor map.
    """
    kind = "|u1" if matrix.element_size() == 1 else "<u2"
    rows, columns = matrix.shape
    key = (matrix.data_ptr(), rows, columns, kind, box, swizzle)
    return _tensor_map(matrix.device.index, *key)


@lru_cache(maxsize=8192)
def _tensor_map(  # needs a GPU
    device: int,
    address: int,
    rows: int,
    columns: int,
    kind: str,
    box: tuple[int, int],
    swizzle: int,
) -> Any:
    from cuda.core import Device

    # The enumerations have no public name in cuda-core 1.2.
    from cuda.core._tensor_map import TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    memory = _Memory(address, (rows, columns), kind)
    name = f"SWIZZLE_{swizzle}B" if swizzle else "NONE"
    # The tensors say where, the caller's device stays current: torch's guard restores it, not
    # cuda-core. The guard alone is not enough: it leaves a thread that has not used the GPU yet
    # without a context where the device is 0.
    with torch.cuda.device(device):
        Device(device).set_current()
        view = StridedMemoryView.from_cuda_array_interface(memory, stream_ptr=-1)
        return view.as_tensor_map(
            box_dim=box,
            swizzle=getattr(TensorMapSwizzle, name),
            l2_promotion=TensorMapL2Promotion.L2_128B,
        )


@lru_cache(maxsize=64)
def _stream(device: int, handle: int) -> Any:  # needs a GPU
    """cuda-core's view of one of torch's streams, which live as long as the process.

    Each device's default stream has the handle 0, and cuda-core keeps what it finds out about one.
    """
    from cuda.core import Stream

    return Stream.from_handle(handle)


@cache
def _launcher() -> Any:  # needs a GPU
    """cuda-core's launch; imported once."""
    from cuda.core import launch

    return launch


def _argument(value: Any) -> Any:
    """One kernel argument as cuda-core wants it: its integers are 64 bits wide."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if isinstance(value, int):
        return int(value)
    return np.float32(value) if isinstance(value, float) else value
