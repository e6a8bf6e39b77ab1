"""Settings of BitFit; free of torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class BitFit:
    """Only biases are trained, those of layer norms among them (arXiv:2106.10199).

    Example:
        >>> BitFit().add_biases
        'auto'
    """

    add_biases: Literal["auto", "always", "never"] = "auto"
    """Give linears of the blocks that have no bias a zero one; `auto`: if the model has none."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the trained biases; each is rounded to that of its module as it is used."""
