"""An adapter that is on a model: what one does with it, the same for every method.

`inject.attach` and `inject.load_adapter` make these. The object holds the installed
pieces (see `protocol`) and treats them alike: names and counts for an optimizer, state
for a checkpoint, switching off for a comparison, removal, and saving in PEFT's format.

Gradients reach every piece through non-reentrant gradient checkpointing as they are
(`use_reentrant=False`, the default of transformers): no hook that makes the embeddings'
output require a gradient is needed. `without_gradient` names what a backward pass did
not reach, for a trainer to check once instead of training in vain.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.adapters.formats.peft import AdapterFiles, write_adapter
from qlora_kit.adapters.formats.peft_config import BaseInfo
from qlora_kit.adapters.linears import stores_transposed
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.embedding import LoRAEmbedding
from qlora_kit.adapters.lora.layer import LowRankLinear
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prompt.prefix_tuning import PrefixPiece
from qlora_kit.adapters.prompt.prompt_tuning import PromptPiece
from qlora_kit.adapters.protocol import Piece, TrainedCopy, load_stored_state, stored_state
from qlora_kit.adapters.selective.config import Full
from qlora_kit.adapters.selective.full import save_whole_model
from qlora_kit.adapters.targets import compact_names, task_type, whole_modules
from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.experts import NF4Experts
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.quant.config import QuantConfig

ATTACHED = "qlora_kit_adapter"
"""Attribute of a model that carries an adapter: the adapter's name."""


class AttachedAdapter:
    """An adapter installed on a model.

    Example:
        >>> from qlora_kit.adapters.inject import attach
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> adapter = attach(model, LoRA(rank=2))
        >>> adapter.num_trainable, [name for name, _ in adapter.named_parameters()]
        (24, ['layers.0.lora_A', 'layers.0.lora_B'])
    """

    def __init__(
        self,
        model: nn.Module,
        config: Method,
        name: str,
        pieces: Sequence[Piece],
        frozen: Sequence[nn.Parameter],
    ) -> None:
        """Collect installed pieces; users call `attach` or `load_adapter` instead.

        Args:
            model: the adapted model.
            config: of the method.
            name: for messages.
            pieces: already installed.
            frozen: parameters that were trainable before, to restore on removal.
        """
        self.model = model
        self.config = config
        self.name = name
        self.pieces = tuple(pieces)
        # weak: embeddings that move to the host would otherwise stay on the GPU as well
        self._frozen = tuple(weakref.ref(parameter) for parameter in frozen)
        self._installed = True

    @property
    def num_trainable(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    @property
    def module_names(self) -> tuple[str, ...]:
        """Dotted names of the modules the adapter acts on."""
        return tuple(piece.place for piece in self.pieces)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Go through what the optimizer updates.

        Yields:
            (`<module>.<key>`, parameter), in the model's order.
        """
        for piece in self.pieces:
            for key, parameter in piece.trainable().items():
                yield f"{piece.place}.{key}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Go through what the optimizer updates, without names."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Give everything that has to be saved, a frozen A included.

        Returns:
            `<module>.<key>` to detached tensor, sharing storage.
        """
        return {name: tensor.detach() for name, tensor in stored_state(self.pieces).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy saved values in, all of them or none.

        Args:
            state: as `state_dict` gives it; any float dtype, any device.

        Raises:
            AdapterError: a name is missing, unknown, or of another shape.
        """
        # PEFT's files do not know where in the model a prompt is
        ours = (p for p in self.pieces if isinstance(p, PrefixPiece | PromptPiece))
        places = {key: f"{piece.place}.{key}" for piece in ours for key in piece.state()}
        load_stored_state(self.pieces, {places.get(name, name): t for name, t in state.items()})

    def load_files(self, files: AdapterFiles) -> None:
        """Copy the values of a saved adapter in, all of them or none.

        Args:
            files: of an adapter with the same configuration.

        Raises:
            AdapterError: they do not fit.
        """
        self.load_state_dict(own_state(self.pieces, files))

    def without_gradient(self) -> tuple[str, ...]:
        """Name trained parameters that have no gradient: call it after a backward pass.

        Returns:
            Names; empty when the whole adapter learns. A gradient of zero counts as one:
            that of A is zero until B leaves its start.

        Example:
            >>> from qlora_kit.adapters.inject import attach
            >>> model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
            >>> adapter = attach(model, LoRA(rank=2, targets=("0", "1")))
            >>> model[0](torch.ones(1, 8)).sum().backward()  # the second layer is never used
            >>> adapter.without_gradient()
            ('1.lora_A', '1.lora_B')
        """
        return tuple(name for name, p in self.named_parameters() if p.grad is None)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the model answer as the base does, for the length of a `with` block.

        Example:
            >>> from qlora_kit.adapters.inject import attach
            >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
            >>> adapter = attach(model, LoRA(rank=2))
            >>> with adapter.disabled():
            ...     _ = model["layers"][0](torch.ones(1, 8))
        """
        before = [piece.enabled for piece in self.pieces]
        for piece in self.pieces:
            piece.enabled = False
        try:
            yield
        finally:
            for piece, was in zip(self.pieces, before, strict=True):
                piece.enabled = was

    def detach_from_model(self) -> None:
        """Put the original modules, the same objects, and their trainability back.

        Raises:
            AdapterError: it was detached before.

        Example:
            >>> from qlora_kit.adapters.inject import attach
            >>> linear = nn.Linear(8, 4)
            >>> model = nn.ModuleDict({"layers": nn.ModuleList([linear])})
            >>> attach(model, LoRA(rank=2)).detach_from_model()
            >>> model["layers"][0] is linear
            True
        """
        if not self._installed:
            raise AdapterError(f"the adapter {self.name!r} is not on the model any more.")
        for piece in reversed(self.pieces):
            piece.uninstall(self.model)
        for reference in self._frozen:
            if (parameter := reference()) is not None:
                parameter.requires_grad_(True)
        delattr(self.model, ATTACHED)
        self._installed = False

    def merge_delta(self, module_name: str) -> Tensor | None:
        """Compute what the adapter adds to one module's weight.

        Args:
            module_name: dotted name, as in the model before it was adapted.

        Returns:
            (out, in) float32, also for layers that store their weight transposed. None
            where the adapter adds nothing: the module is not adapted, or is trained whole
            (its values are in `state_dict`).

        Raises:
            AdapterError: the method cannot be merged.

        Example:
            >>> from qlora_kit.adapters.inject import attach
            >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
            >>> attach(model, LoRA(rank=2)).merge_delta("layers.0").shape
            torch.Size([4, 8])
        """
        piece = next((piece for piece in self.pieces if piece.place == module_name), None)
        return None if piece is None else piece.merge_delta()

    def files(self, base: BaseInfo | None = None, *, resumable: bool = False) -> AdapterFiles:
        """Describe the adapter as it would be saved; tensors are shared, not copied.

        Args:
            base: where the base came from; None: what the model itself knows.
            resumable: with what only training needs, the MLP of a prefix.

        Returns:
            The content of an adapter folder.
        """
        if not isinstance(self.config, LoRA):
            return self._other_files(base, resumable)
        low_rank = [p for p in self.pieces if isinstance(p, LowRankLinear | LoRAEmbedding)]
        whole = [piece for piece in self.pieces if isinstance(piece, TrainedCopy)]
        existing = _original_names(self.model, self.pieces)
        return AdapterFiles(
            config=self.config,
            deltas={p.place: p.low_rank() for p in low_rank},
            modules={name: t.detach() for name, t in stored_state(whole).items()},
            module_names=tuple(piece.place for piece in whole),
            base=base_info(self.model) if base is None else base,
            task_type=task_type(self.model),
            fan_in_fan_out=any(stores_transposed(piece.base) for piece in low_rank),
            target_modules=compact_names((p.place for p in low_rank), existing),
        )

    def _other_files(self, base: BaseInfo | None, resumable: bool) -> AdapterFiles:
        """Everything by the names of the state."""
        heads = whole_modules(self.model)
        state, config, sizes = stored_state(self.pieces), self.config, dict[str, int]()
        for piece in self.pieces:
            if isinstance(piece, PrefixPiece | PromptPiece):
                sizes = piece.sizes()
            if isinstance(piece, PrefixPiece) and not resumable:  # without the MLP
                config, own = piece.without_mlp()
                others = [other for other in self.pieces if other is not piece]
                state = own | stored_state(others)
        return AdapterFiles(
            config=config,
            deltas={},
            modules={name: t.detach() for name, t in state.items()},
            sizes=sizes,
            module_names=tuple(p.place for p in self.pieces if p.place in heads),
            base=base_info(self.model) if base is None else base,
            task_type=task_type(self.model),
        )

    def save(
        self,
        folder: Path | str,
        *,
        base_model: str | None = None,
        revision: str | None = None,
        quant: QuantConfig | None = None,
        overwrite: bool = False,
        resumable: bool = False,
    ) -> None:
        """Write the adapter as a folder that this package loads, and PEFT and vLLM if they know it.

        What `full` trained is written as a whole model.

        Args:
            folder: created if needed; other files in it stay.
            base_model: folder or hub id of the base; None: what the model says.
            revision: of a hub id.
            quant: how the base is stored; None: read off the model's own layers.
            overwrite: replace an adapter that is already there.
            resumable: write everything that training needs to go on, in the masters' dtype.

        Raises:
            SourceError: an adapter is already there and overwrite is False.

        Example:
            >>> import tempfile
            >>> from qlora_kit.adapters.inject import attach
            >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
            >>> folder = Path(tempfile.mkdtemp()) / "adapter"
            >>> attach(model, LoRA(rank=2)).save(folder, base_model="models/base")
            >>> (folder / "adapter_config.json").exists()
            True
        """
        if isinstance(self.config, Full) and not resumable:
            save_whole_model(self.model, self.pieces, Path(folder), overwrite=overwrite)
            return
        own = base_info(self.model)
        base = replace(
            own,
            path=base_model if base_model is not None else own.path,
            revision=revision,
            quant=quant if quant is not None else own.quant,
        )
        files = self.files(base, resumable=resumable)
        write_adapter(folder, files, overwrite=overwrite)

    def __repr__(self) -> str:
        """Say what is attached, in one line."""
        return (
            f"AttachedAdapter({self.name!r}, {type(self.config).__name__}, "
            f"{len(self.pieces)} modules, {self.num_trainable:,} trained values)"
        )


def own_state(pieces: Sequence[Piece], files: AdapterFiles) -> dict[str, Tensor]:
    """Give the values of an adapter folder the names of `stored_state`.

    Args:
        pieces: of an adapter with the same configuration.
        files: the folder's content.

    Returns:
        `<place>.<key>` to tensor.

    Raises:
        AdapterError: a piece cannot hold what is saved for it.

    Example:
        >>> from qlora_kit.adapters.lora.low_rank import LowRank
        >>> pairs = {"proj": LowRank(torch.ones(2, 8), torch.ones(4, 2), 1.0)}
        >>> sorted(own_state((), AdapterFiles(config=LoRA(rank=2), deltas=pairs)))
        ['proj.lora_A', 'proj.lora_B']
    """
    owners = {p.place: p for p in pieces if isinstance(p, LowRankLinear | LoRAEmbedding)}
    state = dict(files.modules)
    for place, pair in files.deltas.items():
        owner = owners.get(place)
        named = pair.named() if owner is None else owner.own_state(pair)
        state |= {f"{place}.{key}": tensor for key, tensor in named.items()}
    return state


def base_info(model: nn.Module) -> BaseInfo:
    """Collect what a model knows about itself: where it came from, how it is stored.

    Args:
        model: with or without an adapter.

    Returns:
        Path, quantization and dtype of the base.

    Example:
        >>> base_info(nn.Linear(8, 4)).dtype
        'float32'
    """
    layer = next((m for m in model.modules() if isinstance(m, NF4Linear | NF4Experts)), None)
    if layer is not None:
        dtype = layer.dtype
    else:
        base = (p for n, p in model.named_parameters() if ".lora_" not in n)
        dtype = next((p.dtype for p in base if p.is_floating_point()), torch.float32)
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return BaseInfo(
        path=path or None,
        quant=None if layer is None else _model_quant(model, layer),
        dtype=str(dtype).removeprefix("torch."),
        recorded=True,
    )


def _model_quant(model: nn.Module, layer: NF4Linear | NF4Experts) -> QuantConfig:
    """The configuration the model was loaded with, where it says; else one layer's."""
    loaded = getattr(getattr(model, "config", None), "quantization_config", None)
    skip, target = getattr(loaded, "skip", None), getattr(loaded, "target", None)
    if skip is None or target is None:
        return layer.config
    return replace(layer.config, skip=tuple(skip), target=tuple(target))


def _original_names(model: nn.Module, pieces: Sequence[Piece]) -> set[str]:
    """Module names as they were before the pieces, outside modules trained whole."""
    inside = tuple(f"{piece.place}." for piece in pieces)
    whole = {piece.place for piece in pieces if isinstance(piece, TrainedCopy)}
    names = {name for name, _ in model.named_modules() if name and not name.startswith(inside)}
    return names - whole
