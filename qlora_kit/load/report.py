"""What transformers only reports about a load, turned into errors.

A weight that is missing or of another shape is initialised at random, and a table
in the log says so. For a base model that is never what anybody wanted; for the
head of a classifier, and the pooler before it, it is the normal start.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_kit.adapters.targets import NEW_MODULES
from qlora_kit.core.errors import FormatError
from qlora_kit.core.log import logger

_SHOWN = 4


def new_head_names(model: PreTrainedModel) -> set[str]:
    """Parameters that may start untrained: a classifier's head and pooler.

    Args:
        model: any task's model.

    Returns:
        Parameter names; empty for a language model, whose head was pretrained.
    """
    if model.get_output_embeddings() is not None:
        return set()
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside or ".pooler." in f".{name}"
    }


def check_report(model: PreTrainedModel, report: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model with weights that are missing or do not fit.

    Args:
        model: as loaded.
        report: transformers' `loading_info`: missing, mismatched and unexpected keys.
        folder: the checkpoint, for the message.

    Raises:
        FormatError: a weight other than a new head's is missing or has another shape.
    """
    new = new_head_names(model)
    tied = model.all_tied_weights_keys
    mismatched = sorted(entry for entry in report["mismatched_keys"] if entry[0] not in new)
    if mismatched:
        raise shape_error(*mismatched[0], count=len(mismatched))
    missing = sorted(n for n in report["missing_keys"] if n not in tied and n not in new)
    if missing:
        raise FormatError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}: {shorten(missing)}. "
            "The download is incomplete, or the weights belong to another architecture."
        )
    fresh = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if fresh:
        logger.info("new, untrained weights: %s", ", ".join(fresh))
        _mark_new(model, {name.rpartition(".")[0] for name in fresh})
    if report["unexpected_keys"]:
        logger.info("not part of the model: %s", ", ".join(sorted(report["unexpected_keys"])))


def fit_shapes(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> None:
    """Check shapes that transformers 5.17 does not check when a quantizer is present.

    Args:
        model: as loaded. Parameters of a new head that came with another shape (another
            number of labels) start anew.
        shapes: parameter name to the shape the configuration gives it.

    Raises:
        FormatError: another parameter has another shape.
    """
    wrong = [name for name, shape in shapes.items() if model.get_parameter(name).shape != shape]
    new = new_head_names(model)
    for name in wrong:
        parameter, shape = model.get_parameter(name), shapes[name]
        if name not in new:
            raise shape_error(name, parameter.shape, shape, count=len(wrong))
        path, _, leaf = name.rpartition(".")
        fresh = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        setattr(model.get_submodule(path), leaf, nn.Parameter(fresh))
    _mark_new(model, {name.rpartition(".")[0] for name in wrong})
    for path in {name.rpartition(".")[0] for name in wrong}:
        logger.info("new, untrained weights: %s", path)
        model._init_weights(model.get_submodule(path))


def _mark_new(model: PreTrainedModel, modules: set[str]) -> None:
    """Tell the adapters which modules started at random: they must be trained and saved."""
    setattr(model, NEW_MODULES, tuple(sorted(modules | set(getattr(model, NEW_MODULES, ())))))


def shape_error(name: str, came: Any, wanted: Any, *, count: int = 1) -> FormatError:
    """The error for a weight whose shape is not the configuration's.

    Args:
        name: the weight.
        came: its shape in the checkpoint.
        wanted: its shape by config.json.
        count: how many weights are affected.

    Returns:
        The error, to be raised.
    """
    others = "" if count < 2 else f" ({count - 1} more do not fit either)"
    return FormatError(
        f"{name} has shape {tuple(came)} in the checkpoint, but config.json needs "
        f"{tuple(wanted)}{others}. config.json and the weights do not belong together."
    )


def check_shape(name: str, came: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Refuse a weight whose shape is not the configuration's.

    Args:
        name: the weight.
        came: its shape in the checkpoint.
        wanted: its shape by config.json.

    Raises:
        FormatError: they differ.
    """
    if came != wanted:
        raise shape_error(name, came, wanted)


def shorten(names: list[str]) -> str:
    """A list of names, cut after a few."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
