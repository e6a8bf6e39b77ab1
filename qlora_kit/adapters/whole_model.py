"""Saving a model all of whose weights were trained: a folder that plain transformers loads."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.adapters.protocol import Piece
from qlora_kit.adapters.whole import TrainedWeights
from qlora_kit.core.atomic import atomic_directory, atomic_write_text
from qlora_kit.core.errors import AdapterError


def save_whole_model(
    model: object, pieces: Iterable[Piece], folder: Path, *, overwrite: bool = False
) -> None:
    """Write weights and configuration, each weight in the dtype that the base had.

    Args:
        model: of transformers, trained in place.
        pieces: of the method `full`.
        folder: created; appears whole.
        overwrite: replace it if it exists.

    Raises:
        AdapterError: the model is not one of transformers.
        SourceError: the folder exists and overwrite is False.

    Example:
        >>> save_whole_model(torch.nn.Linear(1, 1), [], Path("nowhere"))
        Traceback (most recent call last):
        qlora_kit.core.errors.AdapterError: only models of transformers are saved whole, ...
    """
    if not isinstance(model, PreTrainedModel):
        raise AdapterError(
            f"only models of transformers are saved whole, not a {type(model).__name__}. Save its "
            "state_dict() instead."
        )
    trained = [piece for piece in pieces if isinstance(piece, TrainedWeights)]
    dtypes = {
        id(p): dtype
        for piece in trained
        for p, dtype in zip(piece.trainable().values(), piece.saved_dtypes().values(), strict=True)
    }
    done: dict[int, Tensor] = {}  # tied weights stay one tensor, or they would be written twice
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in done:
            dtype = dtypes.get(id(tensor), tensor.dtype)
            done[id(tensor)] = tensor.detach().to("cpu", dtype, copy=True)
        state[name] = done[id(tensor)]
    widest = max((piece.base_dtype for piece in trained), key=lambda dtype: dtype.itemsize)
    said = model.config.dtype
    with atomic_directory(folder, overwrite=overwrite) as partial:
        model.save_pretrained(partial, state_dict=state)
        model.config.dtype = said  # transformers writes that of the masters there
        file = partial / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["dtype"] = str(widest).removeprefix("torch.")
        atomic_write_text(file, json.dumps(config, indent=2) + "\n")


def computing_dtype(pieces: Iterable[Piece]) -> torch.dtype | None:
    """The dtype a model in masters has to compute in.

    Args:
        pieces: of any method.

    Returns:
        16 bits where the method `full` widened parameters that had 16; None elsewhere.

    Example:
        >>> from torch import nn
        >>> piece = TrainedWeights(nn.Linear(2, 2).bfloat16(), "0", ("weight",), torch.float32)
        >>> computing_dtype([piece])
        torch.bfloat16
    """
    trained = [piece for piece in pieces if isinstance(piece, TrainedWeights)]
    half = [piece.narrow_dtype for piece in trained if piece.dtype.itemsize > 2]
    return next((dtype for dtype in half if dtype is not None), None)
