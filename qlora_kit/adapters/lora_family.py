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
from qlora_kit.adapters.targets import linear_targets, whole_modules
from qlora_kit.core.log import log_once


def lora_pieces(model: nn.Module, config: LoRA, seed: int) -> list[Piece]:
    """Make the pieces of a new adapter.

    Args:
        model: the model to adapt.
        config: of a method in `config.METHODS`.
        seed: of random starts, together with each module's name.

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
        embeddings=True,
    )
    if config.targets == ALL_LINEAR:
        _tell_about_experts(model)
    pieces = [_piece(module, place, config, seed) for place, module in found.items()]
    dtype = getattr(torch, config.dtype)
    return pieces + [TrainedCopy(model.get_submodule(m), m, dtype) for m in whole]


def saved_piece(module: nn.Module, place: str, config: LoRA, pair: LowRank) -> Piece:
    """Make one piece in the sizes of a file; its values are still to be filled in.

    Args:
        module: what it adapts.
        place: its dotted name.
        config: read from the file.
        pair: read from the file.

    Returns:
        The piece.

    Raises:
        AdapterError: the module is none that the method adapts.

    Example:
        >>> pair = LowRank(torch.ones(3, 8), torch.ones(4, 3), 0.5)
        >>> saved_piece(nn.Linear(8, 4), "proj", LoRA(), pair).state()["lora_A"].shape
        torch.Size([3, 8])
    """
    return _piece(module, place, config, 0, rank=pair.a.shape[0], scale=pair.scale)


def _piece(
    module: nn.Module,
    place: str,
    config: LoRA,
    seed: int,
    rank: int | None = None,
    scale: float | None = None,
) -> Piece:
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding(module, place, config, seed=seed, rank=rank, scale=scale)
    kind = _kind(config)
    return kind(module, place, config, seed=seed, rank=rank, scale=scale)


def _kind(config: LoRA) -> type[LowRankLinear]:
    if isinstance(config, AdaLoRA):
        return AdaLoRALinear
    return DoRALinear if isinstance(config, DoRA) else LoRALinear


def _tell_about_experts(model: nn.Module) -> None:
    fused = [n for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
    if fused:
        log_once(
            f"all-linear adapts the attention and dense layers of {type(model).__name__}; its "
            "experts, which are fused in three-dimensional parameters, stay as they are."
        )
