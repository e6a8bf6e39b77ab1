"""What the rest of the package may ask of any method's configuration; free of torch."""

from typing import Protocol

ALL_LINEAR = "all-linear"
"""In `targets`: every linear of the model's blocks, not the head."""


class Method(Protocol):
    """The configuration of a method: a frozen dataclass of plain values.

    Example:
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> def width(method: Method) -> str:
        ...     return method.dtype
        >>> width(LoRA())
        'float32'
    """

    @property
    def dtype(self) -> str:
        """Dtype of what is trained: float32, bfloat16 or float16."""
