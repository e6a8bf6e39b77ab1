"""Full fine-tuning: every weight of the model is trained where it is.

A second copy of a whole model would be the largest tensor of all. With float32 masters the
parameters become float32 and the model computes under autocast (the trainer turns it on),
16 bytes per parameter with AdamW; with `bfloat16` they stay as they are, 8 bytes, and updates
below a 256th of a weight are lost to rounding. As no copy is kept, the base can be asked
(`disabled()`) and restored (`detach_from_model()`) only until the first update; after it both are
refused, and what is saved is a whole model, a folder that plain transformers loads. A 4-bit base
is refused: its codes have no gradient, and decoding all of them is a 16-bit model.

Defaults: float32 masters.

Source: arXiv:2106.09685, section 5.1 (FT); masters: arXiv:1710.03740.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.protocol import Piece
from qlora_kit.adapters.selective.config import Full
from qlora_kit.core.atomic import atomic_directory, atomic_write_text
from qlora_kit.core.errors import AdapterError


class TrainedWeights:
    """The parameters that a module holds itself, trained where they are.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> piece = TrainedWeights(model[0], "0", ("weight", "bias"), torch.float32)
        >>> piece.install(model)
        >>> piece.enabled = False  # nothing has changed yet
        >>> with torch.no_grad():
        ...     _ = model[0].bias.add_(1)
        >>> piece.enabled = False
        Traceback (most recent call last):
        ...
        qlora_kit.core.errors.AdapterError: full fine-tuning has changed 0.bias, ...
    """

    def __init__(
        self, module: nn.Module, place: str, keys: Sequence[str], dtype: torch.dtype
    ) -> None:
        """Take note; the parameters are changed by `install`.

        Args:
            module: holds them.
            place: its dotted name in the model.
            keys: names of the parameters in it.
            dtype: they are trained in.
        """
        self.place, self.dtype = place, dtype
        self._parameters = {key: module.get_parameter(key) for key in keys}
        self._before = {key: (p.dtype, p.requires_grad) for key, p in self._parameters.items()}
        self._prints: dict[str, int] = {}
        self._enabled = True

    @property
    def base_dtype(self) -> torch.dtype:
        """The widest dtype that the parameters had."""
        return max((dtype for dtype, _ in self._before.values()), key=lambda dtype: dtype.itemsize)

    @property
    def narrow_dtype(self) -> torch.dtype | None:
        """The 16-bit dtype that a parameter had, if any."""
        return next((dtype for dtype, _ in self._before.values() if dtype.itemsize == 2), None)

    @property
    def enabled(self) -> bool:
        """Always true in effect: see `enabled.setter`."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not value:
            self._refuse_changed()
        self._enabled = value

    def install(self, _model: nn.Module) -> None:
        """Widen the parameters and let them train."""
        for key, parameter in self._parameters.items():
            parameter.data = parameter.data.to(self.dtype)
            parameter.requires_grad_(True)
            self._prints[key] = _fingerprint(parameter)

    def uninstall(self, _model: nn.Module) -> None:
        """Give the parameters their dtype and flags back, if nothing has changed."""
        self._refuse_changed()
        for key, parameter in self._parameters.items():
            dtype, trained = self._before[key]
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trained)

    def _refuse_changed(self) -> None:
        for key, parameter in self._parameters.items():
            if self._prints and _fingerprint(parameter) != self._prints[key]:
                raise AdapterError(
                    f"full fine-tuning has changed {self.place}.{key}, and no copy of the base is "
                    "kept. Load the base again to compare with it."
                )

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters."""
        return dict(self._parameters)

    def state(self) -> dict[str, Tensor]:
        """The same."""
        return dict(self._parameters)

    def saved_dtypes(self) -> dict[str, torch.dtype]:
        """Key to the dtype that a saved model has: what the base had."""
        return {key: dtype for key, (dtype, _) in self._before.items()}

    def merge_delta(self) -> None:
        """Return None: what is saved is the whole model."""


def _fingerprint(parameter: nn.Parameter) -> int:
    """A sum over the bits, which any order gives alike."""
    if parameter.is_meta:
        return 0
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().view(words).sum(dtype=torch.int64))


def weight_pieces(model: nn.Module, config: Full) -> list[TrainedWeights]:
    """Pieces for every parameter of a model; a shared one belongs to the first that holds it.

    Args:
        model: the model to train, not quantized.
        config: the dtype of the masters.

    Returns:
        Pieces in the model's order, not installed.

    Raises:
        AdapterError: a weight is quantized.

    Example:
        >>> [piece.place for piece in weight_pieces(nn.Sequential(nn.Linear(4, 4)), Full())]
        ['0']
    """
    dtype = getattr(torch, config.dtype)
    seen: set[int] = set()
    pieces = []
    for place, module in model.named_modules():
        own = {k: p for k, p in module.named_parameters(recurse=False) if id(p) not in seen}
        for key, parameter in own.items():
            if not parameter.is_floating_point():
                raise AdapterError(
                    f"full fine-tuning changes every weight, and {place}.{key} is quantized: a "
                    "code of 4 bits has no gradient. Load the base with bits=16 (quant=None), or "
                    "train part of it: top_k decodes the blocks it trains, LoRA needs no copy."
                )
        seen |= {id(p) for p in own.values()}
        if own:
            pieces.append(TrainedWeights(module, place, tuple(own), dtype))
    return pieces


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
