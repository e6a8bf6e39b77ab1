"""CUDA C++ compiled on the user's machine, at first use, and kept.

NVRTC compiles the sources in `kernels/` through NVIDIA's `cuda-core`; no nvcc,
host compiler or torch header is needed. The binary is cached on disk under a key
made of the whole source, the architecture, the options and the compiler's
version, so that a second process loads it in milliseconds.

A source is compiled as one text: constants generated from `quant/` (the only
place that holds the tables), the shared headers, the file itself. Kernels launch
on torch's current stream of the tensor's device.
"""

import os
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

_HEADERS = ("common/convert.cuh", "common/nf4.cuh")


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
        if (folder / _HEADERS[0]).is_file():
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
        Generated constants, shared headers and the file, with line markers.

    Example:
        >>> "NF4_VALUES[16]" in source_text("nf4_dequantize/nf4_dequantize.cu")
        True
    """
    parts = [_constants()]
    for part in (*_HEADERS, file):
        text = (kernels_folder() / part).read_text(encoding="utf-8")
        parts.append(f'#line 1 "{part}"\n{text.replace("#pragma once", "")}')
    return "\n".join(parts)


def compile_source(file: str, architecture: str, *, use_cache: bool = True) -> tuple[Any, str]:
    """Compile one source file; needs NVRTC, not a GPU.

    Args:
        file: path below `kernels/`.
        architecture: a member of `ARCHITECTURES`.
        use_cache: read and write the disk cache.

    Returns:
        The `cuda.core` object code, and what the compiler said (registers, shared
        memory and spills of each kernel; empty on a cache hit).
    """
    from cuda.core import Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache

    options = ProgramOptions(
        name=Path(file).name, arch=architecture, std="c++17", ptxas_options=["-v"]
    )
    log = _Log()
    program = Program(source_text(file), "c++", options)
    cache = FileStreamProgramCache(cache_folder()) if use_cache else None
    return program.compile("cubin", logs=log, cache=cache), log.text


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

    def _kernel(self, name: str, device: torch.device) -> Any:  # needs a GPU
        key = (device.index, name)
        if key not in self._loaded:
            from cuda.core import Device

            Device(device.index).set_current()
            code, _ = compile_source(self.file, architecture_of(device))
            self._loaded[key] = code.get_kernel(name)
        return self._loaded[key]

    def launch(  # needs a GPU
        self,
        name: str,
        grid: int | tuple[int, ...],
        block: int,
        arguments: Sequence[Tensor | int | float | None],
        *,
        device: torch.device,
    ) -> None:
        """Launch a kernel on torch's current stream of a device.

        Args:
            name: the kernel's name in the source.
            grid: blocks.
            block: threads per block.
            arguments: in the kernel's order. A tensor passes its address and None a
                null pointer; integers pass as 64 bits and floats as 32.
            device: where the tensors live.
        """
        from cuda.core import LaunchConfig, launch

        with torch.cuda.device(device):
            kernel = self._kernel(name, torch.device("cuda", torch.cuda.current_device()))
            stream = _stream(torch.cuda.current_stream().cuda_stream)
            config = LaunchConfig(grid=grid, block=block)
            launch(stream, config, kernel, *(_argument(value) for value in arguments))


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:  # needs a GPU
    """cuda-core's view of one of torch's streams, which live as long as the process."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _argument(value: Tensor | int | float | None) -> Any:
    """One kernel argument as cuda-core wants it."""
    import numpy as np

    if value is None:
        return np.uint64(0)
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    return np.int64(value) if isinstance(value, int) else np.float32(value)
