"""Top-k: the last blocks and the final norm are trained (FT-Top2 of LoRA's paper: two blocks).

Nothing below the first trained block has a gradient, so its activations are not kept. A linear
gets a trainable twin in the master dtype, which a 4-bit weight is decoded to; other modules with
parameters (norms) are trained as copies. The frozen originals stay beside them, so that switching
off and removal are exact. Blocks with fused experts are refused.

Defaults: two blocks and the final norm; float32 masters.

Source: arXiv:2106.09685, section 5.1 (FT, FT-Top2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kit.adapters.linears import LINEARS, linear_shape, stores_transposed
from qlora_kit.adapters.protocol import ModuleWrapper, TrainedCopy
from qlora_kit.adapters.selective.config import TopK
from qlora_kit.adapters.targets import inside, is_norm
from qlora_kit.core.errors import AdapterError
from qlora_kit.nn.experts import NF4Experts
from qlora_kit.nn.linear import NF4Linear


class TrainedLinear(ModuleWrapper):
    """A linear trained whole: masters answer, the original stays as it is.

    Attributes:
        weight: as the checkpoint stores it, (out, in), or (in, out) for a Conv1D.
        bias: (out,) or None.

    Example:
        >>> layer = TrainedLinear(nn.Linear(8, 4), "proj", torch.float32)
        >>> sorted(layer.trainable())
        ['bias', 'weight']
    """

    def __init__(self, base: nn.Module, place: str, dtype: torch.dtype) -> None:
        """Copy, or decode, the weight.

        Args:
            base: `NF4Linear`, `nn.Linear` or `Conv1D`. Not modified.
            place: its dotted name in the model.
            dtype: of the masters; products run in the dtype of x.
        """
        super().__init__(base, place)
        self.transposed = stores_transposed(base)
        out_features, in_features = linear_shape(base)
        self.out_features, self.in_features = out_features, in_features
        self.weight = nn.Parameter(self._start(base, dtype))
        bias = base.bias
        self.bias: nn.Parameter | None = None
        if isinstance(bias, Tensor):
            self.bias = nn.Parameter(bias.detach().to(dtype, copy=True))

    def _start(self, base: nn.Module, dtype: torch.dtype) -> Tensor:
        if not isinstance(base, NF4Linear):
            return base.get_parameter("weight").detach().to(dtype, copy=True)
        if base.weight.is_meta:
            shape = base.shape[::-1] if self.transposed else base.shape
            return torch.empty(shape, dtype=dtype, device="meta")
        # first to the dtype the model computed with: the start is the model as it was
        decoded = base.dequantize().to(dtype)
        return decoded.T.contiguous() if self.transposed else decoded

    def forward(self, x: Tensor) -> Tensor:
        """Apply the masters, or the original while switched off.

        Args:
            x: (..., in).

        Returns:
            (..., out) in the dtype of x.
        """
        if not self.enabled:
            return self.base(x)
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.T if self.transposed else weight, bias)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Weight, and bias if there is one."""
        both = {"weight": self.weight, "bias": self.bias}
        return {key: p for key, p in both.items() if p is not None}

    def state(self) -> dict[str, Tensor]:
        """The same."""
        return dict(self.trainable())

    def merge_delta(self) -> None:
        """Return None: a merge replaces the tensors by `state()` instead of adding to one."""


def block_pieces(
    model: nn.Module, config: TopK, *, outside: Sequence[str] = ()
) -> list[ModuleWrapper]:
    """Pieces for the last blocks and the final norm.

    Args:
        model: the model to adapt.
        config: how many blocks.
        outside: modules trained whole beside it; nothing inside them is taken.

    Returns:
        Pieces in the model's order, not installed.

    Raises:
        AdapterError: the model has not so many blocks, or holds parameters in them that are
            not those of linears and norms.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
        >>> [piece.place for piece in block_pieces(model, TopK(blocks=1))]
        ['layers.1']
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    place = max(lists, key=lambda name: len(lists[name]), default=None)
    if place is None or len(lists[place]) < config.blocks:
        count = 0 if place is None else len(lists[place])
        raise AdapterError(
            f"top_k.blocks is {config.blocks} and {type(model).__name__} has {count} blocks."
        )
    total = len(lists[place])
    chosen = {f"{place}.{index}" for index in range(total - config.blocks, total)}
    if config.final_norm:
        owner = place.rpartition(".")[0]
        siblings = model.get_submodule(owner).named_children()
        chosen |= {f"{owner}.{n}".removeprefix(".") for n, m in siblings if is_norm(m)}
    dtype = getattr(torch, config.dtype)
    pieces: list[ModuleWrapper] = []
    for name, module in model.named_modules():
        if not name or not inside(name, chosen) or inside(name, set(outside)):
            continue
        if isinstance(module, LINEARS):
            pieces.append(TrainedLinear(module, name, dtype))
        elif any(True for _ in module.parameters(recurse=False)):
            if any(True for _ in module.children()) or isinstance(module, NF4Experts):
                raise AdapterError(
                    f"top_k cannot train {name} ({type(module).__name__}): it holds parameters "
                    "that are neither a linear's nor a norm's. Use LoRA, or method full."
                )
            pieces.append(TrainedCopy(module, name, dtype))
    return pieces
