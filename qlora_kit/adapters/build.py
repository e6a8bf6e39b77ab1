"""The pieces of every method, from its configuration: made new, or in the sizes a file has.

`lora_pieces` and `saved_piece` serve the methods like LoRA, `build_pieces` all others; a
classifier's new head is trained whole with each of them. `inject.attach` and
`inject.load_adapter` call these; nothing is installed here.
"""

import torch
from torch import nn

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.adalora.layer import AdaLoRALinear
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.bottleneck.layer import bottleneck_pieces
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.glora.layer import glora_pieces
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.dora import DoRALinear
from qlora_kit.adapters.lora.embedding import LoRAEmbedding
from qlora_kit.adapters.lora.layer import LoRALinear, LowRankLinear
from qlora_kit.adapters.lora.loftq import Originals, start_at_error
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.lora.pissa import PiSSALinear
from qlora_kit.adapters.lora.sliced import SlicedLoRALinear, layout
from qlora_kit.adapters.method import ALL_LINEAR, Method
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.prompt.prefix_tuning import PrefixPiece
from qlora_kit.adapters.prompt.prompt_tuning import PromptPiece
from qlora_kit.adapters.protocol import Piece, TrainedCopy
from qlora_kit.adapters.selective.bitfit import bias_pieces
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.adapters.selective.full import weight_pieces
from qlora_kit.adapters.selective.top_k import block_pieces
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
        config: of a method in `registry.METHODS`.
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
    whole = whole_modules(model, config.train_modules)
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


def build_pieces(
    model: nn.Module, config: Method, seed: int, whole: tuple[str, ...] | None = None
) -> list[Piece]:
    """Make the pieces of a method that is not like LoRA.

    Args:
        model: the model to adapt.
        config: of a method in `registry.OTHERS`.
        seed: of random starts, together with each module's name.
        whole: modules trained whole beside the method; None: a classifier's head and
            what the checkpoint had no weights for.

    Returns:
        Pieces in the model's order, those trained whole last.

    Raises:
        AdapterError: the method does not fit the model.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
        >>> [piece.place for piece in build_pieces(model, BitFit(), 0)]
        ['layers.0']
    """
    if isinstance(config, Full):  # the head is among the weights
        return list(weight_pieces(model, config))
    heads = whole_modules(model) if whole is None else whole
    pieces: list[Piece]
    if isinstance(config, BitFit):
        pieces = list(bias_pieces(model, config, outside=heads))
    elif isinstance(config, Bottleneck):
        pieces = list(bottleneck_pieces(model, config, seed, outside=heads))
    elif isinstance(config, GLoRA):
        pieces = list(glora_pieces(model, config, seed, outside=heads))
    elif isinstance(config, TopK):
        pieces = list(block_pieces(model, config, outside=heads))
    elif isinstance(config, PrefixTuning):
        pieces = [PrefixPiece(model, config, seed)]
    elif isinstance(config, PromptTuning):
        pieces = [PromptPiece(model, config, seed)]
    else:
        raise AdapterError(f"{type(config).__name__} is no configuration of a method.")
    dtype = getattr(torch, config.dtype)
    return pieces + [TrainedCopy(model.get_submodule(name), name, dtype) for name in heads]
