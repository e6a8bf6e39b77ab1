"""BitFit: the biases are trained and nothing else, those of layer norms (β) among them.

    y = x Ŵᵀ + b        db = Σₙ gₙ,  dX = g Ŵ,  no dŴ and no dγ

All biases of the base model count: linears, norms, the embeddings' norm and the final one. The
output head and a pooler are not part of it; a classifier's new head is trained whole beside it.

Many decoders have no biases at all (Llama's linears, and RMSNorm has no β). There `add_biases`
gives every linear of the blocks a zero one, so that the start is the base, and says so: this is
more than the paper did. `auto` does it only where the model has no bias; Qwen 2's, on q, k and v
alone, are taken as they are.

A bias is trained where it is, through torch's own `parametrize`: `bias` becomes what a small
module makes of the float32 master, rounded to the dtype the module computes in, and the module,
its weight and its code stay as they are. It works for whatever reads `self.bias`: `nn.Linear`,
`NF4Linear` (whose op has the gradient), `Conv1D`, `LayerNorm`.

Merging replaces the biases. An added one is merged where the model's class has a place for it
(Llama's `attention_bias` and `mlp_bias` in config.json), and refused elsewhere.

Defaults: all biases, float32 masters. The paper's learning rates are 1e-4 to 1e-2, above LoRA's.

Source: arXiv:2106.10199 (BitFit).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlora_kit.adapters.selective.config import BitFit
from qlora_kit.adapters.targets import inside, linear_targets
from qlora_kit.core.errors import AdapterError
from qlora_kit.core.log import log_once

_OUTSIDE = ("pooler",)
"""Children of a base model that belong to a head."""


class _Rounded(nn.Module):
    """What `bias` is: the master, rounded, or while switched off the base's own."""

    def __init__(self, base: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.enabled = True
        self.dtype = dtype
        # a list: neither a parameter nor a buffer, it must not appear in the model's state
        self._base = [base]

    def forward(self, master: Tensor) -> Tensor | None:
        """The bias, or None where there was none."""
        if self.enabled:
            return master.to(self.dtype)
        return self._base[0]


class TrainedBias:
    """The bias of one module, trained in place.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(4))
        >>> piece = TrainedBias(model[0], "0", torch.float32)
        >>> piece.install(model)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> piece.trainable()["bias"].grad, model[0].weight.requires_grad
        (tensor([1., 1., 1., 1.]), True)
        >>> piece.uninstall(model)
        >>> type(model[0]).__name__
        'LayerNorm'
    """

    def __init__(self, module: nn.Module, place: str, dtype: torch.dtype) -> None:
        """Make the master; the module is changed by `install`.

        Args:
            module: with a bias, or a linear without one.
            place: its dotted name in the model.
            dtype: of the master.
        """
        self.place = place
        self._base = module.bias if isinstance(module.bias, nn.Parameter) else None
        self._trained_before = self._base is not None and self._base.requires_grad
        like = self._base if self._base is not None else _zeros(module)
        self.master = nn.Parameter(like.detach().to(dtype, copy=True))
        self._rounded = _Rounded(self._base, like.dtype)

    @property
    def enabled(self) -> bool:
        """Whether the module computes with the trained bias."""
        return self._rounded.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._rounded.enabled = value

    def install(self, model: nn.Module) -> None:
        """Let the master stand behind `bias`."""
        module = model.get_submodule(self.place)
        module.register_parameter("bias", self.master)
        # unsafe: the master may have another dtype than the bias it becomes, on purpose
        parametrize.register_parametrization(module, "bias", self._rounded, unsafe=True)

    def uninstall(self, model: nn.Module) -> None:
        """Put the very parameter back that was there, or none."""
        module = model.get_submodule(self.place)
        self._rounded.enabled = True
        parametrize.remove_parametrizations(module, "bias", leave_parametrized=False)
        module.register_parameter("bias", self._base)
        if self._base is not None:
            self._base.requires_grad_(self._trained_before)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The master."""
        return {"bias": self.master}

    def state(self) -> dict[str, Tensor]:
        """The master."""
        return {"bias": self.master}

    def merge_delta(self) -> None:
        """Return None: a merge replaces the bias, the weight is as it was."""


def bias_pieces(
    model: nn.Module, config: BitFit, *, outside: Sequence[str] = ()
) -> list[TrainedBias]:
    """Find the biases that are trained.

    Args:
        model: the model to adapt.
        config: whether to add biases.
        outside: modules trained whole; nothing inside them is taken.

    Returns:
        Pieces in the model's order, not installed.

    Raises:
        AdapterError: there is no bias and none is to be added.

    Example:
        >>> model = nn.ModuleDict(
        ...     {"layers": nn.ModuleList([nn.Linear(8, 4, bias=False), nn.LayerNorm(4)])}
        ... )
        >>> [piece.place for piece in bias_pieces(model, BitFit())]
        ['layers.1']
        >>> [piece.place for piece in bias_pieces(model, BitFit(add_biases="always"))]
        ['layers.0', 'layers.1']
    """
    dtype = getattr(torch, config.dtype)
    taken = [name for name, module in _base_modules(model, outside) if _has_bias(module)]
    added: list[str] = []
    if config.add_biases == "always" or (config.add_biases == "auto" and not taken):
        linears = linear_targets(model, "all-linear", outside=outside)
        added = [name for name, module in linears.items() if getattr(module, "bias", 0) is None]
    if not taken and not added:
        raise AdapterError(
            f"BitFit trains biases, and {type(model).__name__} has none. Set "
            "bitfit.add_biases=auto to give its linear layers zero biases that are trained."
        )
    if added:
        log_once(
            f"BitFit: {type(model).__name__} has no biases on {len(added)} linear layers; they "
            "get zero ones, which are trained."
        )
    chosen = {*taken, *added}
    return [TrainedBias(m, n, dtype) for n, m in model.named_modules() if n in chosen]


def _base_modules(model: nn.Module, outside: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Modules of the base model, without heads."""
    prefix = getattr(model, "base_model_prefix", "")
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    apart = {*outside, *(f"{base}{name}" for name in _OUTSIDE)}
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and name.startswith(base) and not inside(name, apart)
    ]


def _has_bias(module: nn.Module) -> bool:
    bias = module._parameters.get("bias")
    return bias is not None and bias.is_floating_point()


def _zeros(module: nn.Module) -> Tensor:
    """A zero bias for a linear that has none, in the dtype it computes in."""
    weight = module.get_parameter("weight")
    features = getattr(module, "out_features", None)
    dtype = weight.dtype if weight.is_floating_point() else module.dtype
    assert isinstance(features, int)
    assert isinstance(dtype, torch.dtype)
    return torch.zeros(features, dtype=dtype, device=weight.device)
