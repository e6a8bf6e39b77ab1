"""The pieces of LoRA and the methods like it: made new, or in the sizes a file has.

`inject.attach` and `inject.load_adapter` call these; nothing is installed here.
"""

import torch
from torch import nn

from qlora_kit.adapters.adalora import AdaLoRALinear
from qlora_kit.adapters.config import ALL_LINEAR, AdaLoRA, DoRA, LoRA
from qlora_kit.adapters.dora import DoRALinear
from qlora_kit.adapters.embedding import LoRAEmbedding
from qlora_kit.adapters.lora import LoRALinear, LowRankLinear
from qlora_kit.adapters.low_rank import LowRank
from qlora_kit.adapters.protocol import Piece, TrainedCopy
from qlora_kit.adapters.sliced import SlicedLoRALinear, layout
from qlora_kit.adapters.spectral import Originals, PiSSALinear, start_at_error
from qlora_kit.adapters.targets import linear_targets, whole_modules
from qlora_kit.core.errors import AdapterError
from qlora_kit.core.log import log_once
from qlora_kit.core.patterns import matches


def lora_pieces(
    model: nn.Module, config: LoRA, seed: int, originals: Originals | None = None
) -> list[Piece]:
    """Make the pieces of a new adapter.

    Args:
        model: the model to adapt.
        config: of a method in `config.METHODS`.
        seed: of random starts, together with each module's name.
        originals: module name to its weight before quantization, for `init: loftq`.

    Returns:
        Low-rank pieces in the model's order, then the modules trained whole.

    Raises:
        AdapterError: the targets do not fit the model.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> [piece.place for piece in lora_pieces(model, LoRA(rank=2), 0)]
        ['layers.0']
    """
    whole = whole_modules(model, config)
    found = linear_targets(
        model,
        config.targets,
        outside=whole,
        layers=config.layers_to_transform,
        embeddings=not isinstance(config, AdaLoRA),  # its budget is over linears
    )
    if config.targets == ALL_LINEAR:
        _tell_about_experts(model)
    _check_slices(config, list(found))
    pieces = [_piece(model, module, place, config, seed) for place, module in found.items()]
    if config.init == "loftq":
        for piece in pieces:
            if isinstance(piece, LoRALinear):
                start_at_error(piece, originals, seed)
    dtype = getattr(torch, config.dtype)
    return pieces + [TrainedCopy(model.get_submodule(m), m, dtype) for m in whole]


def saved_piece(model: nn.Module, place: str, config: LoRA, pair: LowRank) -> Piece:
    """Make one piece in the sizes of a file; its values are still to be filled in.

    Args:
        model: without an adapter.
        place: dotted name of the module to adapt.
        config: read from the file.
        pair: read from the file.

    Returns:
        The piece.

    Raises:
        AdapterError: the module is none that the method adapts.

    Example:
        >>> pair = LowRank(torch.ones(3, 8), torch.ones(4, 3), 0.5)
        >>> model = nn.ModuleDict({"proj": nn.Linear(8, 4)})
        >>> saved_piece(model, "proj", LoRA(), pair).state()["lora_A"].shape
        torch.Size([3, 8])
    """
    rank = pair.a.shape[0]
    if config.init == "pissa":
        rank //= 2
    enabled = config.slices_of(place)
    if enabled:
        rank //= len(enabled)
    return _piece(model, model.get_submodule(place), place, config, 0, rank, pair.scale)


def _piece(
    model: nn.Module,
    module: nn.Module,
    place: str,
    config: LoRA,
    seed: int,
    rank: int | None = None,
    scale: float | None = None,
) -> Piece:
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding(module, place, config, seed=seed, rank=rank, scale=scale)
    enabled = config.slices_of(place)
    if enabled:
        return _sliced(model, module, place, config, seed, enabled, rank, scale)
    kind = _kind(config)
    return kind(module, place, config, seed=seed, rank=rank, scale=scale)


def _kind(config: LoRA) -> type[LowRankLinear]:
    if isinstance(config, AdaLoRA):
        return AdaLoRALinear
    if config.init == "pissa":
        return PiSSALinear
    return DoRALinear if isinstance(config, DoRA) else LoRALinear


def _sliced(
    model: nn.Module,
    module: nn.Module,
    place: str,
    config: LoRA,
    seed: int,
    enabled: tuple[str, ...],
    rank: int | None,
    scale: float | None,
) -> Piece:
    spans = layout(model, place, module)
    unknown = [name for name in enabled if name not in spans]
    if unknown:
        raise AdapterError(
            f"slices: {place} has the slices {', '.join(spans)}, and none called {unknown[0]!r}."
        )
    chosen = {name: span for name, span in spans.items() if name in enabled}
    return SlicedLoRALinear(module, place, config, chosen, seed=seed, rank=rank, scale=scale)


def _check_slices(config: LoRA, places: list[str]) -> None:
    for pattern in config.slices:
        if not any(matches(place, pattern) for place in places):
            raise AdapterError(
                f"slices: {pattern!r} matches none of the adapted modules. Name one of `targets`."
            )


def _tell_about_experts(model: nn.Module) -> None:
    fused = [n for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
    if fused:
        log_once(
            f"all-linear adapts the attention and dense layers of {type(model).__name__}; its "
            "experts, which are fused in three-dimensional parameters, stay as they are."
        )
