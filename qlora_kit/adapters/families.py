"""The pieces of every method that is not like LoRA, from its configuration alone.

`inject.attach` and `inject.load_adapter` call `build_pieces`; a classifier's new head is trained
whole with each of them, as with LoRA.
"""

import torch
from torch import nn

from qlora_kit.adapters.bitfit import bias_pieces
from qlora_kit.adapters.bitfit_config import BitFit
from qlora_kit.adapters.bottleneck import bottleneck_pieces
from qlora_kit.adapters.bottleneck_config import Bottleneck
from qlora_kit.adapters.config import LoRA
from qlora_kit.adapters.glora import glora_pieces
from qlora_kit.adapters.glora_config import GLoRA
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prefix import PrefixPiece
from qlora_kit.adapters.prompt import PromptPiece
from qlora_kit.adapters.prompt_config import PrefixTuning, PromptTuning
from qlora_kit.adapters.protocol import Piece, TrainedCopy
from qlora_kit.adapters.targets import whole_modules
from qlora_kit.adapters.whole import block_pieces, weight_pieces
from qlora_kit.adapters.whole_config import Full, TopK
from qlora_kit.core.errors import AdapterError


def build_pieces(
    model: nn.Module, config: Method, seed: int, whole: tuple[str, ...] | None = None
) -> list[Piece]:
    """Make the pieces of a method; nothing is installed.

    Args:
        model: the model to adapt.
        config: of a method in `config.OTHERS`.
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
    heads = whole_modules(model, LoRA()) if whole is None else whole
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
