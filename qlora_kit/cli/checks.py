"""The checks of `qlora-kit doctor`. Each group yields as it goes, so a crash shows how far it came.

A check never raises for a broken environment: that is what it is there to report.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Literal

from qlora_kit import __version__
from qlora_kit.core.units import GIB, format_bytes

MIN_PYTHON = (3, 11)
MIN_CAPABILITY = (8, 0)
_OPTIONAL = ("peft", "liger-kernel", "cuda-core", "cuda-bindings")
BROKEN = (ImportError, OSError, RuntimeError)
"""What a broken installation raises."""
REPORT = "please report it, with this whole output"
"""Advice where something of ours is wrong."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    status: Literal["ok", "note", "FAIL"]
    """Works; works with something worth knowing; does not work."""
    name: str
    """What was looked at."""
    found: str
    """What was found."""
    advice: str = ""
    """What to do about it."""


def check_environment() -> Iterator[Check]:
    """Python and the packages this one needs.

    Yields:
        One check per package.

    Example:
        >>> next(check_environment()).name
        'python'
    """
    from packaging.requirements import Requirement

    good = sys.version_info >= MIN_PYTHON
    found = f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield Check("ok" if good else "FAIL", "python", found, "" if good else "needs 3.11 or newer")
    yield Check("ok", "qlora_kit", f"{__version__} in {Path(__file__).parents[1]}")
    try:
        needed = [Requirement(text) for text in requires("qlora-kit") or []]
    except PackageNotFoundError:
        yield Check("note", "installation", "run from a source folder", "pip install -e .")
        return
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed_version(requirement.name)
        except PackageNotFoundError:
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Check("FAIL", requirement.name, "not installed", advice)
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check("ok", requirement.name, found)
        else:
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Check("FAIL", requirement.name, f"{found} is outside the supported range", advice)
    for name in _OPTIONAL:
        try:
            yield Check("ok", name, f"{installed_version(name)} (optional)")
        except PackageNotFoundError:
            yield Check("ok", name, "not installed (optional)")


def check_torch() -> Iterator[Check]:
    """Torch, its devices, and bitsandbytes.

    Yields:
        One check per finding; nothing more when torch does not import.

    Example:
        >>> next(check_torch()).name
        'torch'
    """
    try:
        import torch
    except BROKEN as error:
        yield Check("FAIL", "torch", f"does not import: {first_line(error)}", "reinstall torch")
        return
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Check("ok", "torch", f"{torch.__version__}, {built_for}")
    yield Check("ok", "processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")
    driver = _driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
        yield Check("ok", "driver", driver or "nvidia-smi not found")
    elif driver:
        advice = "install a CUDA build of torch, or update the driver"
        yield Check("FAIL", "gpu", f"driver {driver}, but torch finds no CUDA device", advice)
    else:
        yield Check("note", "gpu", "none: everything runs on the CPU, slowly for large models")
    try:
        import bitsandbytes

        yield Check("ok", "bitsandbytes", f"{bitsandbytes.__version__} imports")
    except BROKEN as error:
        advice = "8-bit and paged optimizers need it: pip install -U bitsandbytes"
        yield Check("FAIL", "bitsandbytes", f"does not import: {first_line(error)}", advice)


def _gpu(index: int) -> Check:
    import torch

    device = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    found = (
        f"{device.name}, sm_{device.major}{device.minor}, {format_bytes(free)} of "
        f"{format_bytes(total)} free"
    )
    if (device.major, device.minor) < MIN_CAPABILITY:
        advice = "older than sm_80: no bfloat16 units and no CUDA kernels of ours; set model.dtype"
        return Check("note", f"cuda:{index}", found, advice)
    return Check("ok", f"cuda:{index}", found)


def _driver() -> str:
    """Version of the NVIDIA driver, empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 else ""


def check_storage() -> Iterator[Check]:
    """Memory, caches, and whether the hub is used.

    Yields:
        One check per place.

    Example:
        >>> [check.name for check in check_storage()][:1]
        ['memory']
    """
    import psutil
    from huggingface_hub import constants

    from qlora_kit.checkpoint.gguf import cache_root

    memory = psutil.virtual_memory()
    low = memory.available < 2 * GIB
    found = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} available"
    advice = "loading streams, but even small models need about 2 GiB" if low else ""
    yield Check("note" if low else "ok", "memory", found, advice)
    yield _folder("our cache", cache_root())
    yield _folder("hub cache", Path(constants.HF_HUB_CACHE))
    if constants.HF_HUB_OFFLINE:
        yield Check("note", "hub", "HF_HUB_OFFLINE is set: hub ids work from the cache only")
    else:
        yield Check("ok", "hub", "online (not contacted by this check)")


def _folder(name: str, folder: Path) -> Check:
    """Whether a cache folder can be written, and how much fits."""
    place = folder
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Check("FAIL", name, f"{folder} cannot be written", "set QLORA_KIT_CACHE or HF_HOME")
    free = shutil.disk_usage(place).free
    found = f"{folder}, {format_bytes(free)} free"
    if free < 5 * GIB:
        return Check("note", name, found, "a 7B model in 16 bits takes about 14 GiB")
    return Check("ok", name, found)


def first_line(error: BaseException) -> str:
    """The first line of what an error says.

    Args:
        error: any.

    Returns:
        One line; its type's name if it says nothing.

    Example:
        >>> first_line(ValueError("one\\ntwo"))
        'one'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
