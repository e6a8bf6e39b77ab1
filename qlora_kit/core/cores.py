"""How many cores there are for this process."""

import os


def usable_cores() -> int:
    """How many cores this process may use.

    Returns:
        Those it is allowed, where the system tells; otherwise all.

    Example:
        >>> usable_cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
