"""What every fine-tuning method has to offer: the protocol, and its two general pieces.

A method turns a model into an adapted one by installing *pieces*. A piece acts at
one place of the model (its dotted module name), owns what is trained there, can be
switched off and on, and leaves the model as it found it. `inject.attach` collects
the pieces of a method in one `AttachedAdapter`, which does everything that is the
same for all methods: freezing, naming, counting, state, saving, switching, removal.

Three ways to act at a place cover the methods we know, none of them a patch:

- *Wrap one module* (`ModuleWrapper`): the wrapper takes the module's place in its
  parent and keeps it as the child `base`. LoRA, rsLoRA, LoRA-FA, DoRA, AdaLoRA and
  GLoRA wrap a linear and can say what they add to its weight (`merge_delta`).
  Bottleneck adapters wrap the linear whose output they transform (the output
  projection of attention or feed-forward) and cannot merge. A top-k block, a norm or
  a classification head that is trained whole is a wrapper around a trainable copy
  (`TrainedCopy`), and merges by replacing.
- *Train a parameter in place*: BitFit puts a float32 master, of zeros where there was
  no bias, behind `bias` through torch's own `parametrize`; `enabled` is a property that
  hands out the base's; `uninstall` puts the very parameter back. Full fine-tuning
  widens the parameters themselves, and keeps no copy.
- *Feed the forward of a module* (prefix-tuning, infix and embedding-only prompts):
  `install` registers torch's own `register_forward_pre_hook(with_kwargs=True)` on
  the base model, which puts embeddings, mask and positions of the prompt among the
  tokens', from parameters the piece owns; `uninstall` removes the handle. Keys and
  values of a prefix come in by a function in transformers' `AttentionInterface`.

Parameters are named `<place>.<key>` (`model.layers.0.self_attn.q_proj.lora_A`). Only
`formats/peft.py` knows how PEFT spells the same names.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qlora_kit.core.errors import AdapterError


@runtime_checkable
class Piece(Protocol):
    """One installed part of an adapter. See the module's essay for the kinds there are."""

    place: str
    """Dotted name of the module it acts on."""
    enabled: bool
    """While False the model computes what it did before. An attribute or a property."""

    def install(self, model: nn.Module) -> None:
        """Take effect on the model, in place."""

    def uninstall(self, model: nn.Module) -> None:
        """Leave the model with exactly the modules and values found by `install`."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Key, relative to `place`, to parameter that the optimizer updates."""

    def state(self) -> dict[str, Tensor]:
        """Key to tensor, of all that has to be saved; frozen random parts included."""

    def merge_delta(self) -> Tensor | None:
        """What the piece adds to the weight of `place`, (out, in) float32.

        Returns:
            The addition, or None for a piece that does not act by adding to a weight.

        Raises:
            AdapterError: the method cannot be merged into the base at all.
        """


class ModuleWrapper(nn.Module):
    """A piece that takes one module's place and keeps it as the child `base`.

    Subclasses define `forward`, `trainable`, `state` and, when they can, `merge_delta`.
    """

    def __init__(self, base: nn.Module, place: str) -> None:
        super().__init__()
        self.base = base
        self.place = place
        self.enabled = True

    def install(self, model: nn.Module) -> None:
        """Put this wrapper where `base` is in the model, in the mode of its surroundings."""
        parent = model.get_submodule(self.place.rpartition(".")[0])
        self.training = parent.training  # a new module would start in training mode
        model.set_submodule(self.place, self, strict=True)

    def uninstall(self, model: nn.Module) -> None:
        """Put `base`, the very same object, back."""
        model.set_submodule(self.place, self.base, strict=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Key to parameter that the optimizer updates."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Key to tensor, of all that has to be saved."""
        raise NotImplementedError

    def merge_delta(self) -> Tensor | None:
        """Refuse: a method that can merge overrides this.

        Returns:
            Never.

        Raises:
            AdapterError: always.
        """
        raise AdapterError(
            f"{type(self).__name__} at {self.place} cannot be merged into the base weight: it is "
            "not a change of one linear map. Keep the adapter beside the base model instead."
        )


class LinearWrapper(ModuleWrapper):
    """A wrapper of a linear, which model code asks for what it would ask a linear."""

    @property
    def weight(self) -> Tensor:
        """The base's stored weight: model code reads its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, if any."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias


class EmbeddingWrapper(ModuleWrapper):
    """A wrapper of an embedding, which model code asks for what it would ask an embedding."""

    base: nn.Embedding

    @property
    def weight(self) -> Tensor:
        """The base's table: model code reads its dtype or device."""
        return self.base.weight

    @property
    def padding_idx(self) -> int | None:
        """The base's padding token, if it has one."""
        return self.base.padding_idx


class TrainedCopy(ModuleWrapper):
    """A module trained whole: a trainable copy answers, the original stays as it is.

    For classification heads and for modules a user names in `train_modules`. The copy
    is held in the master dtype; inputs are cast to it and outputs back.

    Example:
        >>> head = TrainedCopy(nn.Linear(4, 2), "classifier", torch.float32)
        >>> sorted(head.trainable())
        ['bias', 'weight']
        >>> head(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, base: nn.Module, place: str, dtype: torch.dtype) -> None:
        """Copy the module.

        Args:
            base: the module to train a copy of; its parameters are floating point.
            place: its dotted name in the model.
            dtype: of the trained copy.

        Raises:
            AdapterError: the module holds quantized or no parameters.
        """
        super().__init__(base, place)
        parameters = list(base.parameters())
        if not parameters or not all(p.is_floating_point() for p in parameters):
            held = "quantized parameters" if parameters else "no parameters"
            raise AdapterError(
                f"{place} cannot be trained whole: it holds {held}. Name it in "
                "QuantConfig(skip=...), so that it stays in a floating point dtype, and load again."
            )
        self.trained = copy.deepcopy(base).to(dtype)
        for parameter in self.trained.parameters():
            parameter.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Answer with the trained copy, or with the original while switched off."""
        if not self.enabled:
            return self.base(x)
        first = next(self.trained.parameters())
        if not x.is_floating_point():  # token ids of an embedding
            return self.trained(x).to(next(self.base.parameters()).dtype)
        return self.trained(x.to(first.dtype)).to(x.dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of the copy, named as in the original module."""
        return dict(self.trained.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the copy, named as in the original module."""
        return dict(self.trained.state_dict(keep_vars=True))

    def merge_delta(self) -> None:
        """Return None: a merge replaces the tensors by `state()` instead of adding to one."""


def stored_state(pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Collect what the pieces save, under model-wide names.

    Args:
        pieces: of one adapter.

    Returns:
        `<place>.<key>` to tensor; the tensors are shared, not copied.

    Example:
        >>> head = TrainedCopy(nn.Linear(4, 2), "classifier", torch.float32)
        >>> list(stored_state([head]))
        ['classifier.weight', 'classifier.bias']
    """
    return {f"{piece.place}.{key}": t for piece in pieces for key, t in piece.state().items()}


def load_stored_state(pieces: Iterable[Piece], state: Mapping[str, Tensor]) -> None:
    """Copy saved values into the pieces, all of them or none.

    Args:
        pieces: of one adapter; changed in place.
        state: as `stored_state` gives it; any float dtype, any device.

    Raises:
        AdapterError: a name is missing, unknown, or of another shape.

    Example:
        >>> head = TrainedCopy(nn.Linear(4, 2), "classifier", torch.float32)
        >>> load_stored_state([head], {"classifier.weight": torch.ones(2, 4)})
        Traceback (most recent call last):
        ...
        qlora_kit.core.errors.AdapterError: the state does not fit ... missing: classifier.bias...
    """
    own = stored_state(pieces)
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"missing: {_some(missing)}")
    if unknown := sorted(state.keys() - own.keys()):
        problems.append(f"not in this adapter: {_some(unknown)}")
    shapes = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if shapes:
        problems.append(f"other shapes: {_some(shapes)}")
    if problems:
        raise AdapterError(
            f"the state does not fit the attached adapter; {'; '.join(problems)}. Attach with the "
            "configuration it was saved from, or use load_adapter on its folder."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
