"""The one place that decides which implementation of an op runs.

An op has a `reference` backend in plain torch, which runs on any device, and may
have faster ones. A backend says for itself whether it can serve a call; the
first that can, in the order of `PREFERENCE`, does. Nothing above this room knows
which one it was.

A choice can be forced, by `QLORA_KIT_BACKEND=reference` or `force_backend`. A
forced backend that is missing raises: nothing falls back in silence.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from qlora_kit.core.errors import BackendError
from qlora_kit.core.log import log_once

PREFERENCE = ("cuda", "reference")
"""Backends from the most to the least wanted."""

ENVIRONMENT_VARIABLE = "QLORA_KIT_BACKEND"


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of one op: a module of functions, and when it applies."""

    name: str
    """A member of `PREFERENCE`."""
    functions: ModuleType
    """Holds a function for each name the op calls."""
    serves: Callable[[Tensor], bool]
    """Whether it can serve a call whose main input is this tensor."""
    is_available: Callable[[], bool]
    """Whether it can run on this machine at all."""


_backends: dict[str, dict[str, Backend]] = {}
_forced: ContextVar[str | None] = ContextVar("qlora_kit_forced_backend", default=None)


def register_backend(op: str, backend: Backend) -> None:
    """Add an implementation of an op.

    Args:
        op: the op's name, as its folder is called.
        backend: the implementation; one of the same name is replaced.
    """
    assert backend.name in PREFERENCE, backend.name
    _backends.setdefault(op, {})[backend.name] = backend


def available_backends(op: str) -> list[str]:
    """The backends of an op that can run on this machine.

    Args:
        op: the op's name.

    Returns:
        Names from the most to the least wanted.

    Raises:
        BackendError: no op has this name.

    Example:
        >>> import qlora_kit.ops.nf4_linear.op
        >>> "reference" in available_backends("nf4_linear")
        True
    """
    if op not in _backends:
        raise BackendError(f"no op is called {op!r}; known: {', '.join(sorted(_backends))}.")
    backends = _backends[op]
    return [name for name in PREFERENCE if name in backends and backends[name].is_available()]


def known_ops() -> list[str]:
    """The names of all registered ops, sorted."""
    return sorted(_backends)


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend.

    Args:
        name: a backend's name.

    Yields:
        Nothing.

    Raises:
        BackendError: no backend has this name. An op that lacks it raises when called.

    Example:
        >>> with force_backend("reference"):
        ...     pass
    """
    if name not in PREFERENCE:
        raise BackendError(f"no backend is called {name!r}; known: {', '.join(PREFERENCE)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def resolve(op: str, tensor: Tensor) -> ModuleType:
    """Choose the implementation for a call.

    Args:
        op: the op's name.
        tensor: the call's main input; its device and dtype decide.

    Returns:
        The module whose functions serve the call.

    Raises:
        BackendError: a backend was forced that is unknown, missing or cannot serve the call.
    """
    backends = _backends[op]
    forced = _forced.get() or os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        backend = backends.get(forced)
        if backend is None or not backend.is_available() or not backend.serves(tensor):
            raise BackendError(
                f"{op} cannot run on the forced backend {forced!r} for a {tensor.dtype} tensor on "
                f"{tensor.device}. Available here: {', '.join(available_backends(op))}. Unset "
                f"{ENVIRONMENT_VARIABLE} or leave force_backend to choose automatically."
            )
        return backend.functions
    for name in PREFERENCE:
        backend = backends.get(name)
        if backend is not None and backend.is_available() and backend.serves(tensor):
            log_once(f"{op}: {name} backend on {tensor.device.type}")
            return backend.functions
    raise AssertionError(f"{op} has no reference backend")
