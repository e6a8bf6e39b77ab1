"""Errors a user can act on, and the root they share.

A `UserError` means the input, the configuration or the environment has to
change: the command line prints its message without a traceback and exits with
2. Anything else that escapes is a bug of ours and exits with 1. Several errors
also derive from the built-in a caller would expect (`ValueError`, ...).
"""


class QloraKitError(Exception):
    """Root of every error this package raises on purpose."""


class UserError(QloraKitError):
    """Something the user gave has to change; the message says what."""


class ConfigError(UserError, ValueError):
    """A configuration field is unknown, of the wrong type or out of range."""


class ShapeError(UserError, ValueError):
    """A tensor's shape does not fit the operation."""


class FormatError(UserError, ValueError):
    """A file or a set of tensors is not in the format it claims to be."""


class NonFiniteError(UserError, ValueError):
    """A weight holds NaN or infinity and cannot be quantized."""


class DataError(UserError, ValueError):
    """Training or evaluation rows cannot be understood."""


class SourceError(UserError, OSError):
    """A model or data source cannot be found or read."""


class BackendError(UserError, RuntimeError):
    """A backend was asked for by name and is not available."""


class AdapterError(UserError, ValueError):
    """An adapter does not fit the model or cannot do what was asked."""
