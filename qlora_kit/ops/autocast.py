"""torch's autocast, asked and switched on any device.

torch refuses the question for devices that have no autocast, the meta device among them, on
which a step is traced before it runs. There the answer is no.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

_WITHOUT = ("meta",)


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
    if device.type in _WITHOUT or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


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
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
