"""Linears that adapters act on: which they are, their shapes, and the random starts beside them."""

import hashlib

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.linear import NF4Linear

LINEARS = (NF4Linear, nn.Linear, Conv1D)
"""Modules that adapters of linears can wrap."""


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Give a linear's (out_features, in_features), however it stores its weight.

    Args:
        module: one of `LINEARS`, or an embedding: a linear map of one-hot rows.

    Returns:
        (N, K).

    Raises:
        AdapterError: the module is not a linear we know.

    Example:
        >>> linear_shape(Conv1D(nf=6, nx=4)), linear_shape(nn.Linear(4, 6))
        ((6, 4), (6, 4))
    """
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, NF4Linear | nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    raise AdapterError(
        f"LoRA wraps NF4Linear, nn.Linear and transformers' Conv1D, not {type(module).__name__}."
    )


def stores_transposed(module: nn.Module) -> bool:
    """Tell whether a linear's checkpoint holds its weight as (in, out), like GPT-2's Conv1D.

    Args:
        module: one of `LINEARS`.

    Returns:
        True for a Conv1D and for an NF4Linear made from one.

    Example:
        >>> stores_transposed(Conv1D(nf=6, nx=4)), stores_transposed(nn.Linear(4, 6))
        (True, False)
    """
    return isinstance(module, Conv1D) or (isinstance(module, NF4Linear) and module.transposed)


def seeded(name: str, seed: int) -> torch.Generator:
    """Make the generator of one module's random start.

    Args:
        name: the module's dotted name.
        seed: the run's.

    Returns:
        A CPU generator that depends on both alone.

    Example:
        >>> seeded("q", 0).initial_seed() == seeded("q", 0).initial_seed()
        True
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
