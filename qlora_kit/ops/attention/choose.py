"""Which of torch's kernels serves a call: one function decides, and logs it once.

A backend says for itself why it cannot serve a call; the first in the device's order that
can, does. On Hopper and the Blackwell of data centres cuDNN comes first, on other GPUs
FlashAttention; `chunked` serves everything and comes last.

`QLORA_KIT_ATTENTION=flash` or `force_attention("flash")` force one. A forced backend that
cannot serve the call raises and says why.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch

from qlora_kit.core.errors import BackendError
from qlora_kit.core.log import log_once
from qlora_kit.ops.attention import chunked, cpu, cudnn, flash, outline
from qlora_kit.ops.attention.rule import Call

BACKENDS: dict[str, ModuleType] = {
    "cudnn": cudnn,
    "flash": flash,
    "cpu": cpu,
    "chunked": chunked,
    "outline": outline,
}
"""Each has `refuses`, `forward` and `backward`."""

ENVIRONMENT_VARIABLE = "QLORA_KIT_ATTENTION"

_forced: ContextVar[str | None] = ContextVar("qlora_kit_forced_attention", default=None)


@contextmanager
def force_attention(name: str) -> Iterator[None]:
    """Run attention inside the block on one backend.

    Args:
        name: a key of `BACKENDS`.

    Yields:
        Nothing.

    Raises:
        BackendError: no backend has this name. One that cannot serve a call raises there.

    Example:
        >>> with force_attention("chunked"):
        ...     pass
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(call: Call) -> str:
    """Choose the backend for a call.

    Args:
        call: what decides.

    Returns:
        A key of `BACKENDS`.

    Raises:
        BackendError: a backend was forced that is unknown or cannot serve the call.

    Example:
        >>> from qlora_kit.ops.attention.rule import AttentionRule
        >>> q = torch.randn(1, 9, 4, 8)
        >>> choose(Call.of(q, AttentionRule(scale=1.0), documents=True))
        'cpu'
        >>> choose(Call.of(q, AttentionRule(scale=1.0, window=4), documents=False))
        'chunked'
    """
    return _choose(call, _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE))


@lru_cache(maxsize=256)
def _choose(call: Call, forced: str | None) -> str:
    if forced:
        _check_name(forced)
        reason = BACKENDS[forced].refuses(call)
        if reason is not None:
            able = [name for name in order(call.device) if not BACKENDS[name].refuses(call)]
            raise BackendError(
                f"attention cannot run on the forced backend {forced!r}: it {reason}; the call "
                f"is {call}. Able to serve it: {', '.join(able)}. Unset {ENVIRONMENT_VARIABLE} "
                "or leave force_attention to choose automatically."
            )
        return forced
    name = next(name for name in order(call.device) if not BACKENDS[name].refuses(call))
    log_once(f"attention: {name} backend for {call}")
    return name


def order(device: torch.device) -> tuple[str, ...]:
    """Backends from the most to the least wanted.

    Args:
        device: where the tensors are.

    Returns:
        Keys of `BACKENDS`.

    Example:
        >>> order(torch.device("cpu"))
        ('cpu', 'chunked')
    """
    if device.type == "cpu":
        return ("cpu", "chunked")
    if device.type == "meta":
        return ("outline",)
    if device.type != "cuda":
        return ("chunked",)
    return _order_on_gpu(device)


def _order_on_gpu(device: torch.device) -> tuple[str, ...]:  # needs a GPU
    if torch.cuda.get_device_capability(device)[0] in (9, 10):
        return ("cudnn", "flash", "chunked")
    return ("flash", "cudnn", "chunked")


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise BackendError(
            f"no attention backend is called {name!r}; known: {', '.join(BACKENDS)}."
        )
