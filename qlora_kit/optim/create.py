"""From the optimizer Transformers would make to the same one on flat buffers.

Transformers turns `train.optimizer` into a class and its options. AdamW of torch and of
bitsandbytes, in all their variants, have a flat counterpart here; everything else (Lion,
Adafactor, Muon, ...) and every set of parameters that cannot share a buffer (sharded,
on several devices, tied) goes on as Transformers has it, one tensor at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.core.log import log_once
from qlora_kit.optim.adamw import FlatAdamW
from qlora_kit.optim.base import FlatOptimizer
from qlora_kit.optim.bnb_adamw import FlatBnbAdamW
from qlora_kit.optim.flat import why_not_flat

FLAT_NAMES = frozenset(
    {
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
    }
)
"""Transformers' names of the optimizers that have a flat counterpart."""

_COMMON = frozenset({"lr", "betas", "eps", "weight_decay"})


def make_flat_optimizer(
    groups: Sequence[dict[str, Any]],
    wanted: type,
    options: Mapping[str, Any],
    *,
    model: nn.Module | None = None,
) -> FlatOptimizer | None:
    """Make the flat counterpart of an optimizer, if there is one.

    Args:
        groups: parameter groups; may hold options of their own, and may be empty.
        wanted: the optimizer's class.
        options: what the class would be called with.
        model: whose parameters they are; trained ones must not share memory with its
            others, and its embeddings keep their state in 32 bits.

    Returns:
        The optimizer; None where `wanted(groups, **options)` should be made instead,
        which is logged once if only the parameters are in the way.

    Example:
        >>> weight = nn.Parameter(torch.ones(3))
        >>> type(make_flat_optimizer([{"params": [weight]}], torch.optim.AdamW, {"lr": 0.1}))
        <class 'qlora_kit.optim.adamw.FlatAdamW'>
        >>> make_flat_optimizer([{"params": [weight]}], torch.optim.SGD, {"lr": 0.1})
    """
    kind = _kind(wanted, options)
    parameters = [p for group in groups for p in group["params"]]
    if kind is None or not parameters:
        return None
    reason = why_not_flat(parameters, () if model is None else _tensors(model))
    if reason is not None:
        log_once(f"the optimizer steps one tensor at a time, because {reason}.")
        return None
    common = {key: value for key, value in options.items() if key in _COMMON}
    if kind == "torch":
        return FlatAdamW(list(groups), **common, fused=options.get("fused"))
    return FlatBnbAdamW(
        list(groups),
        **common,
        bits=options.get("optim_bits", 32),
        paged=options.get("is_paged", False),
        keep_32bit=() if model is None else _embeddings(model),
    )


def flat_optimizer(optimizer: Any) -> FlatOptimizer | None:
    """Find a flat optimizer under the wrappers that accelerate puts around it.

    Args:
        optimizer: any optimizer or wrapper with an attribute `optimizer`, or None.

    Returns:
        The flat optimizer; None if it is another one.

    Example:
        >>> flat_optimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))])) is None
        True
    """
    while optimizer is not None and not isinstance(optimizer, FlatOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _kind(wanted: type, options: Mapping[str, Any]) -> str | None:
    """The library whose AdamW is wanted, with options that the flat one knows."""
    if wanted is torch.optim.AdamW and options.keys() <= _COMMON | {"fused"}:
        return "torch"
    theirs = wanted.__module__.startswith("bitsandbytes.") and wanted.__name__ == "AdamW"
    if theirs and options.keys() <= _COMMON | {"optim_bits", "is_paged"}:
        return "bitsandbytes"
    return None


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _embeddings(model: nn.Module) -> Iterable[Tensor]:
    return (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
