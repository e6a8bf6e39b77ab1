"""Putting an adapter on a model: a new one, or one from a folder.

`attach` freezes the base, builds the pieces of the configured method, installs them
and hands back an `AttachedAdapter`. The model stays the user's own object: the same
class, the same `forward`; only the adapted modules are replaced, each by a wrapper that
keeps the original. `detach_from_model` puts those very objects back, and the original
`requires_grad` flags too.

One adapter per model is trained at a time: a second `attach` is refused with the place of the
first. To answer with several, loaded side by side: `multi_adapter.load`.

What a method consists of is made in `build.py`; nothing here knows which method it installs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from qlora_kit.adapters.attached import ATTACHED, AttachedAdapter, own_state
from qlora_kit.adapters.build import build_pieces, lora_pieces, saved_piece
from qlora_kit.adapters.fit import check_fit, whole_places
from qlora_kit.adapters.formats.peft import AdapterFiles, read_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.loftq import Originals
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.protocol import ModuleWrapper, Piece, TrainedCopy, load_stored_state
from qlora_kit.core.errors import AdapterError


def attach(
    model: nn.Module,
    config: Method,
    name: str = "default",
    seed: int = 0,
    *,
    originals: Originals | None = None,
) -> AttachedAdapter:
    """Freeze a model and put a new adapter on it, in place.

    Args:
        model: quantized or not; any `nn.Module` with linear layers.
        config: the method, its size and where it goes.
        name: for messages.
        seed: of the random start, together with each module's name.
        originals: module name to its weight before it was quantized, for `init: loftq` alone;
            `qk.original_weights` makes one.

    Returns:
        The adapter. Until it is trained the model computes what it did before, but for LoftQ.

    Raises:
        AdapterError: the model already has an adapter, or the targets do not fit it.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> attach(model, LoRA(rank=2, targets=("q_proj",)))
        Traceback (most recent call last):
        ...
        qlora_kit.core.errors.AdapterError: targets: 'q_proj' matches no linear layer ...
    """
    refuse_second(model)
    if isinstance(config, LoRA):
        return _install(model, config, name, lora_pieces(model, config, seed, originals))
    return _install(model, config, name, build_pieces(model, config, seed))


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> AttachedAdapter:
    """Put a saved adapter on a model, in place: ours, or a LoRA that PEFT saved.

    Args:
        model: the base it was trained on, without an adapter.
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        name: for messages.

    Returns:
        The adapter, ready to answer and to train on.

    Raises:
        SourceError: a file is missing.
        FormatError: the files are malformed or of a method that is not supported.
        AdapterError: the adapter does not fit the model, or the model already has one.

    Example:
        >>> import tempfile
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> adapter = attach(model, LoRA(rank=2))
        >>> adapter.save(folder)
        >>> adapter.detach_from_model()
        >>> load_adapter(model, folder)
        AttachedAdapter('default', LoRA, 1 modules, 24 trained values)
    """
    refuse_second(model)
    files = read_adapter(folder)
    check_fit(model, files, Path(folder))
    if not isinstance(files.config, LoRA):
        return _load_other(model, files, name)
    dtype = getattr(torch, files.config.dtype)
    # in the model's order, as `attach` does: optimizers match their state by position
    pieces: list[Piece] = [
        saved_piece(model, place, files.config, pair)
        for place, _ in model.named_modules()
        if (pair := files.deltas.get(place)) is not None
    ]
    pieces += [TrainedCopy(model.get_submodule(m), m, dtype) for m in whole_places(model, files)]
    load_stored_state(pieces, own_state(pieces, files))
    return _install(model, files.config, name, pieces)


def _load_other(model: nn.Module, files: AdapterFiles, name: str) -> AttachedAdapter:
    """An adapter whose pieces follow from its configuration: they are built, then filled."""
    whole = tuple(whole_places(model, files))
    pieces = build_pieces(model, files.config, 0, whole)
    adapter = _install(model, files.config, name, pieces)
    try:
        adapter.load_state_dict(files.modules)
    except AdapterError:
        adapter.detach_from_model()
        raise
    return adapter


def _install(
    model: nn.Module, config: Method, name: str, pieces: Sequence[Piece]
) -> AttachedAdapter:
    trained = {id(p) for piece in pieces for p in piece.trainable().values()}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for piece in pieces:
        piece.install(model)
    setattr(model, ATTACHED, name)
    return AttachedAdapter(model, config, name, pieces, frozen)


def refuse_second(model: nn.Module) -> None:
    """Refuse a model that carries an adapter.

    Args:
        model: any.

    Raises:
        AdapterError: it does.

    Example:
        >>> refuse_second(nn.Linear(8, 4))
    """
    if hasattr(model, ATTACHED):
        raise AdapterError(
            f"the model already carries an adapter ({getattr(model, ATTACHED)}). Call its "
            "detach_from_model() first, or merge it into the base."
        )
    for module in model.modules():
        if isinstance(module, ModuleWrapper):
            raise AdapterError(
                f"the model already carries an adapter (at {module.place}). Call its "
                "detach_from_model() first, or merge it into the base."
            )
