"""Training the model's own weights: the last blocks, or all of them.

**Top-k** (FT-Top2 of LoRA's paper: the last two blocks and the final norm). Nothing below the
first trained block has a gradient, so its activations are not kept. A linear gets a trainable
twin in the master dtype, which a 4-bit weight is decoded to; other modules with parameters
(norms) are trained as copies. The frozen originals stay beside them, so that switching off and
removal are exact. Blocks with fused experts are refused.

**Full.** Every parameter is trained where it is: a second copy of a whole model would be the
largest tensor of all. With float32 masters the parameters become float32 and the model computes
under autocast (the trainer turns it on), 16 bytes per parameter with AdamW; with `bfloat16` they
stay as they are, 8 bytes, and updates below a 256th of a weight are lost to rounding. As no copy
is kept, the base can be asked (`disabled()`) and restored (`detach_from_model()`) only until
the first update; after it both are refused, and what is saved is a whole model. A
4-bit base is refused: its codes have no gradient, and decoding all of them is a 16-bit model.

Defaults: two blocks and the final norm; float32 masters.

Source: arXiv:2106.09685, section 5.1 (FT, FT-Top2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kit.adapters.lora import LINEARS, linear_shape, stores_transposed
from qlora_kit.adapters.protocol import ModuleWrapper, TrainedCopy
from qlora_kit.adapters.targets import inside, is_norm
from qlora_kit.adapters.whole_config import Full, TopK
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
