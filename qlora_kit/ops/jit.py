"""CUDA C++ compiled on the user's machine, at first use, and kept.

NVRTC compiles the sources in `kernels/` through NVIDIA's `cuda-core`; no nvcc,
host compiler or torch header is needed. The binary is cached on disk under a key
made of the whole source, the architecture, the options and the compiler's
version, so that a second process loads it in milliseconds.

A source is compiled as one text: constants generated from `quant/` (the only
place that holds the tables), then the file with its `#include "..."` lines, which
are paths below `kernels/`, replaced by what they name, once each. Kernels launch on
torch's current stream of the tensor's device.
"""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_kit.core.errors import BackendError
from qlora_kit.quant.double_quant import DYNAMIC_MAP_VALUES
from qlora_kit.quant.nf4 import NF4_VALUES

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""What every kernel must compile for."""

_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
_DEFAULT_SHARED_BYTES = 48 * 1024


def cache_folder() -> Path:
    """Where compiled kernels are kept: `QLORA_KIT_CACHE`, or the user's cache folder."""
    root = os.environ.get("QLORA_KIT_CACHE")
    base = Path(root) if root else Path.home() / ".cache" / "qlora_kit"
    return base / "kernels"


@lru_cache(maxsize=1)
def kernels_folder() -> Path:
    """The folder of CUDA sources, in an installed package or in a checkout.

    Returns:
        The folder.

    Raises:
        BackendError: the package was built without its kernels.
    """
    installed = Path(str(resources.files("qlora_kit"))) / "_kernels"
    checkout = Path(__file__).resolve().parents[2] / "kernels"
    for folder in (installed, checkout):
        if (folder / "common").is_dir():
            return folder
    raise BackendError(
        f"no CUDA sources in {installed} or {checkout}: the package was built without kernels/. "
        "Install a released wheel, or install from a complete checkout."
    )


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Tell whether kernels can be compiled and run here: a CUDA GPU and `cuda-core`."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    try:
        import cuda.bindings.nvrtc
        import cuda.core  # noqa: F401
    except ImportError:
        return False
    return True


def _constants() -> str:
    """The tables of `quant/` as CUDA source."""
    lines = []
    for name, values in (
        ("NF4_VALUES", NF4_VALUES),
        ("DYNAMIC_MAP_VALUES", DYNAMIC_MAP_VALUES),
    ):
        # Hexadecimal floats are exact.
        text = ", ".join(f"{value.hex()}f" for value in values)
        lines.append(f"__device__ const float {name}[{len(values)}] = {{{text}}};")
    return "\n".join(lines) + "\n"


def source_text(file: str) -> str:
    """The complete text NVRTC compiles for one source file.

    Args:
        file: path below `kernels/`.

    Returns:
        Generated constants, then the file and all it includes, with line markers.

    Example:
        >>> "NF4_VALUES[16]" in source_text("nf4_dequantize/nf4_dequantize.cu")
        True
    """
    return _constants() + _with_includes(file, set())


def _with_includes(file: str, seen: set[str]) -> str:
    """The text of a file, each header it names put in the place of its first `#include`."""
    seen.add(file)
    text = (kernels_folder() / file).read_text(encoding="utf-8").replace("#pragma once", "")
    parts, line, start = [f'#line 1 "{file}"\n'], 1, 0
    for match in _INCLUDE.finditer(text):
        before = text[start : match.start()]
        line += before.count("\n") + 1
        start = match.end() + 1
        header = "" if match[1] in seen else _with_includes(match[1], seen)
        parts.append(f'{before}{header}\n#line {line} "{file}"\n')
    return "".join(parts) + text[start:]


@dataclass(frozen=True, slots=True)
class Compilation:
    """How one source file became machine code in this process."""

    architecture: str
    """What it was compiled for."""
    seconds: float
    """How long compiling took, or reading from the cache."""
    from_cache: bool
    """Whether the code came from the disk cache."""


COMPILATIONS: dict[str, Compilation] = {}
"""Source file to how it was compiled last."""
DYNAMIC_SHARED_BYTES: dict[str, int] = {}
"""Kernel to the dynamic shared memory it was launched with, where it has any."""


def compile_source(file: str, architecture: str, *, use_cache: bool = True) -> tuple[Any, str]:
    """Compile one source file; needs NVRTC, not a GPU.

    Args:
        file: path below `kernels/`.
        architecture: a member of `ARCHITECTURES`.
        use_cache: read and write the disk cache.

    Returns:
        The `cuda.core` object code, and what the compiler said (registers, shared
        memory and spills of each kernel; empty on a cache hit).

    Raises:
        BackendError: the compiler refuses the source.
    """
    from cuda.core import Program, ProgramOptions
    from cuda.core._utils.cuda_utils import NVRTCError  # has no public name in cuda-core 1.2
    from cuda.core.utils import FileStreamProgramCache

    options = ProgramOptions(
        name=Path(file).name,
        arch=architecture,
        std="c++17",
        ptxas_options=["-v"],
        no_cache=None if use_cache else True,  # NVRTC has a cache of its own, which says nothing
    )
    log = _Log()
    start = time.perf_counter()
    program = Program(source_text(file), "c++", options)
    cache = FileStreamProgramCache(cache_folder()) if use_cache else None
    try:
        code = program.compile("cubin", logs=log, cache=cache)
    except NVRTCError as error:
        raise BackendError(f"{file} does not compile for {architecture}: {error}") from error
    seconds = time.perf_counter() - start
    # The compiler always names the kernels it makes; a cache has nothing to say.
    COMPILATIONS[file] = Compilation(architecture, seconds, log.text == "")
    return code, log.text


def errors() -> tuple[type[Exception], ...]:
    """What compiling, loading and launching kernels may raise.

    Returns:
        Exceptions, to be named in an `except`.

    Example:
        >>> BackendError in errors()
        True
    """
    try:
        from cuda.core._utils.cuda_utils import CUDAError
    except ImportError:
        return BackendError, RuntimeError
    return BackendError, RuntimeError, CUDAError


def architectures_of(file: str) -> tuple[str, ...]:
    """What a source is compiled for.

    Args:
        file: path below `kernels/`.

    Returns:
        All of `ARCHITECTURES`, or only Hopper for a file in a folder of that name.

    Example:
        >>> architectures_of("nf4_linear/hopper/low_rank.cu")
        ('sm_90a',)
    """
    return ("sm_90a",) if "/hopper/" in file else ARCHITECTURES


def source_files() -> list[str]:
    """All CUDA sources, as paths below `kernels/`.

    Returns:
        Sorted paths.

    Example:
        >>> "nf4_dequantize/nf4_dequantize.cu" in source_files()
        True
    """
    folder = kernels_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.cu"))


class _Log:
    """Collects what the compiler prints."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        """Append some output."""
        self.text += text


def architecture_of(device: torch.device) -> str:  # needs a GPU
    """The architecture to compile for, with Hopper's own instructions where the GPU has them.

    Args:
        device: a CUDA device.

    Returns:
        Such as `sm_80` or `sm_90a`.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


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
                DYNAMIC_SHARED_BYTES[name] = shared
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
        from cuda.core import launch

        with torch.cuda.device(device):
            current = torch.device("cuda", torch.cuda.current_device())
            kernel = self._kernel(name, current, shared)
            stream = _stream(torch.cuda.current_stream().cuda_stream)
            config = _config(grid, block, shared, cluster, overlap)
            launch(stream, config, kernel, *(_argument(value) for value in arguments))

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
            stream = _stream(torch.cuda.current_stream().cuda_stream)
            return int(occupancy.max_active_clusters(config, stream=stream))


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
    return _tensor_map(matrix.data_ptr(), rows, columns, kind, box, swizzle)


@lru_cache(maxsize=8192)
def _tensor_map(  # needs a GPU
    address: int, rows: int, columns: int, kind: str, box: tuple[int, int], swizzle: int
) -> Any:
    # The enumerations have no public name in cuda-core 1.2.
    from cuda.core._tensor_map import TensorMapL2Promotion, TensorMapSwizzle
    from cuda.core.utils import StridedMemoryView

    memory = _Memory(address, (rows, columns), kind)
    view = StridedMemoryView.from_cuda_array_interface(memory, stream_ptr=-1)
    name = f"SWIZZLE_{swizzle}B" if swizzle else "NONE"
    return view.as_tensor_map(
        box_dim=box,
        swizzle=getattr(TensorMapSwizzle, name),
        l2_promotion=TensorMapL2Promotion.L2_128B,
    )


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:  # needs a GPU
    """cuda-core's view of one of torch's streams, which live as long as the process."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _argument(value: Any) -> Any:
    """One kernel argument as cuda-core wants it."""
    import numpy as np

    if value is None:
        return np.uint64(0)
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    if isinstance(value, int):
        return np.int64(value)
    return np.float32(value) if isinstance(value, float) else value
