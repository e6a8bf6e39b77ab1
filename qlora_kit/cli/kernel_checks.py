"""The checks of `qlora-kit doctor` that concern ops and CUDA kernels.

Three groups: each source compiles (or comes from the cache), every backend of
every op and every strategy gives right answers, and what the kernels take of the
GPU's registers and shared memory. The last comes after the self-test, whose
launches show how much dynamic shared memory there is. Without a GPU each source
is named as not tested.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_kit.cli.checks import BROKEN, REPORT, Check, first_line
from qlora_kit.core.cores import usable_cores
from qlora_kit.core.errors import BackendError
from qlora_kit.core.units import format_bytes


def check_sources() -> Iterator[Check]:
    """The kernels' cache, and whether each source compiles for the GPU at hand.

    Yields:
        One check per source.

    Example:
        >>> any("nf4_quantize.cu" in check.name for check in check_sources())
        True
    """
    try:
        from qlora_kit.ops import jit
    except BROKEN as error:
        yield Check("FAIL", "kernels", f"do not import: {first_line(error)}", "see torch above")
        return
    try:
        files = jit.source_files()
    except BackendError as error:
        yield Check("FAIL", "sources", first_line(error))
        return
    yield _cache(jit.cache_folder())
    reason, advice = _why_not()
    if reason:
        for file in files:
            yield Check("note", file, f"not compiled, not tested: {reason}", advice)
            advice = ""  # once is enough
    else:  # needs a GPU
        with ThreadPoolExecutor(usable_cores()) as pool:
            yield from pool.map(_compiled, filter(_is_for_this_gpu, files))


def _is_for_this_gpu(file: str) -> bool:  # needs a GPU
    """Whether a source is one of those that the current GPU can run."""
    import torch

    from qlora_kit.ops import jit

    return jit.is_for(file, jit.architecture_of(torch.device("cuda")))


def _cache(folder: Path) -> Check:
    """Where compiled kernels are kept, and how much that is."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = format_bytes(sum(path.stat().st_size for path in files))
    return Check("ok", "cache", f"{folder}, {size} in {len(files)} files")


def _why_not() -> tuple[str, str]:
    """Why kernels cannot run here, and what to do about it; empty if they can."""
    import torch

    from qlora_kit.ops import jit

    if not torch.cuda.is_available():
        return "no CUDA GPU here", ""
    if not jit.is_available():
        return "cuda-core is not installed", "pip install 'qlora-kit[gpu]'"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU is older than sm_80", "everything runs on the reference backend"
    return "", ""


def _compiled(file: str) -> Check:  # needs a GPU
    """Compile one source for the current GPU."""
    import torch

    from qlora_kit.ops import jit

    architecture = jit.architecture_of(torch.device("cuda"))
    try:
        code, _ = jit.compile_source(file, architecture)
    except jit.errors() as error:
        return Check("FAIL", file, first_line(error), REPORT)
    made = jit.COMPILATIONS[file]
    how = "from the cache" if made.from_cache else "compiled"
    kernels = len(_kernel_names(code))
    found = f"{architecture}, {kernels} kernels, {how} in {made.seconds:.2f} s"
    return Check("ok", file, found)


def _kernel_names(code: Any) -> list[str]:
    """The kernels in compiled code: each has a section of its own."""
    return sorted({name.decode() for name in re.findall(rb"\.text\.([A-Za-z_]\w*)", code.code)})


def check_ops() -> Iterator[Check]:
    """The codec's known answers, and each backend and strategy of each op.

    Yields:
        One check per test.

    Example:
        >>> all(check.status != "FAIL" for check in check_ops())
        True
    """
    try:
        from qlora_kit.cli import selftest
        from qlora_kit.ops import backend
    except BROKEN as error:
        yield Check("FAIL", "ops", f"do not import: {first_line(error)}", "see torch above")
        return
    wrong = selftest.codec_errors()
    found = "known codes and values" if not wrong else f"wrong: {', '.join(wrong)}"
    yield Check("FAIL" if wrong else "ok", "nf4 codec", found, REPORT if wrong else "")
    forced = os.environ.get(backend.ENVIRONMENT_VARIABLE)
    for op in backend.known_ops():
        names = backend.available_backends(op)
        yield Check("ok", op, f"backends: {', '.join(names)}")
        if forced and forced not in names:
            advice = f"unset {backend.ENVIRONMENT_VARIABLE}"
            yield Check("FAIL", op, f"{forced} is forced but not available", advice)
            continue
        for name in names:
            yield from _tests(f"  {name}", selftest.op_errors(op, name))
    if not _why_not()[0]:
        for name in selftest.strategies():
            yield from _tests(f"  {name}", selftest.strategy_errors(name))
    else:
        missing = ", ".join(selftest.strategies())
        yield Check("note", "strategies", f"not tested, {_why_not()[0]}: {missing}")


def _tests(name: str, errors: Iterator[tuple[str, float, float]]) -> Iterator[Check]:
    """One check per comparison; what breaks in between is one as well."""
    from qlora_kit.ops import jit

    tested = False
    try:
        for test, distance, bound in errors:
            tested = True
            good = distance <= bound
            found = f"{test}: error {distance:.1e}, at most {bound:.1e} allowed"
            yield Check("ok" if good else "FAIL", name, found, "" if good else REPORT)
    except jit.errors() as error:
        yield Check("FAIL", name, f"stopped: {first_line(error)}", REPORT)
        return
    if not tested:
        yield Check("ok", name, "does not serve this GPU, not tested")


def check_resources() -> Iterator[Check]:
    """Registers and shared memory of the kernels, as the driver sees them.

    Yields:
        One check per kernel; nothing without a GPU.

    Example:
        >>> all(check.status != "FAIL" for check in check_resources())
        True
    """
    try:
        from qlora_kit.ops import jit
    except BROKEN:
        return  # reported above
    if _why_not()[0]:
        return
    for file in filter(_is_for_this_gpu, jit.source_files()):  # needs a GPU
        yield from _resources(file)


def _resources(file: str) -> Iterator[Check]:  # needs a GPU
    """Registers and shared memory of the kernels of one source."""
    import torch
    from cuda.core import Device

    from qlora_kit.ops import jit, launch

    device = torch.device("cuda", torch.cuda.current_device())
    Device(device.index).set_current()
    try:
        code, _ = jit.compile_source(file, jit.architecture_of(device))
        for name in _kernel_names(code):
            attributes = code.get_kernel(name).attributes
            dynamic = launch.DYNAMIC_SHARED_BYTES.get((file, name), 0)
            shared = attributes.shared_size_bytes + dynamic
            found = f"{attributes.num_regs} registers, {format_bytes(shared)} shared"
            spilled = attributes.local_size_bytes
            if spilled:
                found += f", {spilled} bytes of local memory per thread"
            label = name if Path(file).stem in name else f"{name} {Path(file).stem}"
            yield Check("note" if spilled else "ok", label, found)
    except jit.errors() as error:
        yield Check("FAIL", file, first_line(error), REPORT)
