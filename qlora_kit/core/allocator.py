"""Segments that grow: how torch's allocator holds the GPU's memory.

By default torch asks the driver for a segment per large tensor. What is freed serves tensors that
fit into it, and the rest of it nobody: runs that were predicted to fit have run out of memory
through such remainders. A segment that grows (`expandable_segments`) is one range of addresses
per stream that pages are mapped into, so that what is freed serves tensors of any size
(docs/decisions/0013). Torch reads its settings from the environment when CUDA starts, so this
module imports nothing heavy and is asked first. Some packages start CUDA when they are imported
(torchao does); then torch is told directly.

Settings of the user win: whoever sets `PYTORCH_ALLOC_CONF` or `PYTORCH_CUDA_ALLOC_CONF` gets
that and nothing else. `expandable_segments:False` is thus the switch.
"""

import os
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Of torch's variable: today's, and its alias."""
GROWING = "expandable_segments:True"
FIXED = {NAMES[0]: "expandable_segments:False"}
"""Variables of a process that has torch's allocator as it comes."""
_NEW_NAME_WORKS = (2, 11)
"""Torch 2.9 does not apply this option under the new name; 2.11 does."""


def growing_segments(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that make segments grow in a process that is to be started.

    Args:
        environment: that the process will have besides.

    Returns:
        What to add; nothing where the user chose, elsewhere than on Linux, or without torch.

    Example:
        >>> list(growing_segments({}).values()) if sys.platform == "linux" else [GROWING]
        ['expandable_segments:True']
        >>> growing_segments({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
        {}
    """
    release = _torch_release()
    if sys.platform != "linux" or release is None or any(name in environment for name in NAMES):
        return {}
    return {NAMES[0] if release >= _NEW_NAME_WORKS else NAMES[1]: GROWING}


def use_growing_segments() -> bool:
    """Make segments grow in this process and in those that it starts.

    What CUDA was given before stays as it is: only later segments grow.

    Returns:
        Whether they will: False where the user chose otherwise, elsewhere than on Linux, and
        where CUDA has started already and this torch cannot be told any more.

    Example:
        >>> use_growing_segments() in (True, False)
        True
    """
    found = growing_segments()
    torch = sys.modules.get("torch")
    if found and torch is not None and torch.cuda.is_initialized():
        told = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        if told is None:
            return False
        told(GROWING)
    os.environ.update(found)
    return segments_grow()


def segments_grow(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torch's settings ask for segments that grow.

    Args:
        environment: whose settings.

    Returns:
        What the variable says that torch looks at first.

    Example:
        >>> segments_grow({"PYTORCH_ALLOC_CONF": "backend:native,expandable_segments:True"})
        True
    """
    given = [environment[name] for name in reversed(NAMES) if name in environment]
    words = given[0].replace(" ", "").split(",") if given else []
    return GROWING in words


def _torch_release() -> tuple[int, int] | None:
    """First two numbers of torch's version, without importing it."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("torch"))
    except PackageNotFoundError:
        return None
    return (int(found[1]), int(found[2])) if found else None
