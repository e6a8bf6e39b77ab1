"""torch's autocast, asked and switched on any device.

torch refuses the question for devices that have no autocast, the meta device among them, on
which a step is traced before it runs. There the answer is what `suppose` says.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

_WITHOUT = ("meta",)
_supposed: ContextVar[torch.dtype | None] = ContextVar("qlora_kit_autocast_on_meta", default=None)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to now.

    Args:
        device: of the tensors.

    Returns:
        The dtype; None while autocast is off, or has no meaning on the device.

    Example:
        >>> autocast_dtype(torch.device("meta")), autocast_dtype(torch.device("cpu"))
        (None, None)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast_dtype(torch.device("cpu"))
        torch.bfloat16
    """
    if device.type in _WITHOUT:
        return _supposed.get()
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@contextmanager
def suppose(dtype: torch.dtype | None) -> Iterator[None]:
    """Let autocast seem to cast to a dtype on the meta device.

    Args:
        dtype: to cast to; None for off.

    Yields:
        Nothing.

    Example:
        >>> with suppose(torch.bfloat16):
        ...     autocast_dtype(torch.device("meta"))
        torch.bfloat16
    """
    token = _supposed.set(dtype)
    try:
        yield
    finally:
        _supposed.reset(token)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to a dtype, or switched off.

    Args:
        device: of the tensors.
        dtype: to cast to; None for off.

    Returns:
        A context.

    Example:
        >>> with autocast(torch.device("cpu"), torch.bfloat16):
        ...     autocast_dtype(torch.device("cpu"))
        torch.bfloat16
    """
    if device.type in _WITHOUT:
        return suppose(dtype)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
