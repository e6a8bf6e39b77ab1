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
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from qlora_kit.core.errors import BackendError
from qlora_kit.quant.double_quant import DYNAMIC_MAP_VALUES
from qlora_kit.quant.nf4 import NF4_VALUES

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
"""What every kernel must compile for."""

_SPLITS_SINCE = 12, 8
"""Version of NVRTC that compiles the kernels of one source side by side; 12.4 does not know how."""
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


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
    """How long compiling took, or reading from the cache, without waiting for another thread."""
    from_cache: bool
    """Whether the code came from the disk cache."""


COMPILATIONS: dict[str, Compilation] = {}
"""Source file to how it was compiled last."""

_COMPILING: dict[tuple[str, str], threading.Lock] = {}
"""Source file and architecture to who compiles it: others wait, and find it in the cache."""


def compile_source(file: str, architecture: str, *, use_cache: bool = True) -> tuple[Any, str]:
    """Compile one source file; needs NVRTC, not a GPU. Threads may do so side by side.

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
        split_compile=_threads(),
        no_cache=None if use_cache else True,  # NVRTC has a cache of its own, which says nothing
    )
    log = _Log()
    program = Program(source_text(file), "c++", options)
    cache = FileStreamProgramCache(cache_folder()) if use_cache else None
    alone = _COMPILING.setdefault((file, architecture), threading.Lock())
    try:
        with alone if use_cache else nullcontext():
            start = time.perf_counter()
            code = program.compile("cubin", logs=log, cache=cache)
            seconds = time.perf_counter() - start
    except NVRTCError as error:
        raise BackendError(f"{file} does not compile for {architecture}: {error}") from error
    # The compiler always names the kernels it makes; a cache has nothing to say.
    COMPILATIONS[file] = Compilation(architecture, seconds, log.text == "")
    return code, log.text


@lru_cache(maxsize=1)
def _threads() -> int | None:
    """For the kernels of one source: all there are (0), or what an older NVRTC does by itself."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return 0 if (major, minor) >= _SPLITS_SINCE else None


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


def is_for(file: str, architecture: str) -> bool:
    """Tell whether a source is meant for an architecture.

    Args:
        file: path below `kernels/`.
        architecture: such as `sm_80`.

    Returns:
        True, but for files in a folder `hopper` only on `sm_90a`.

    Example:
        >>> is_for("nf4_linear/hopper/low_rank.cu", "sm_80")
        False
    """
    return architecture == "sm_90a" or "hopper" not in Path(file).parts


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


@lru_cache(maxsize=64)
def architecture_of(device: torch.device) -> str:  # needs a GPU
    """The architecture to compile for, with Hopper's own instructions where the GPU has them.

    Args:
        device: a CUDA device.

    Returns:
        Such as `sm_80` or `sm_90a`.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
