"""The norm behind a model's last layer, as one function of autograd.

The model's own code computes it in float32, and autograd keeps float32 copies of all tokens for
it: on long rows they would be the largest tensors of a training step. Here only the norm's input
is kept, and its gradient stands where the last layer may write beside it and over it.

The norm's class is exchanged, as the layers' are. The new `forward` takes over for what the last
layer has made as one step; for everything else, generation with a cache among it, the norm's own
code runs, as the layers' does.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_kit.block.description import Norm, family_of
from qlora_kit.block.parts import norm, norm_backward

if TYPE_CHECKING:
    from qlora_kit.block.install import FusedBlocks


class FusedNorm:
    """Mixed into the class of the norm; see the module's text."""

    _fused: "FusedBlocks"
    _how: Norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize.

        Args:
            hidden_states: (B, T, H).

        Returns:
            (B, T, H).
        """
        how = self._how
        if not self._fused.made(hidden_states) or how.weight.requires_grad:
            return super().forward(hidden_states)  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return norm(how, hidden_states.flatten(0, 1)).view(hidden_states.shape)
        stepped: Tensor = NormStep.apply(hidden_states, self._fused, how)
        return stepped


class NormStep(torch.autograd.Function):
    """`rms_norm` that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fused: "FusedBlocks", how: Norm) -> Tensor:
        """Normalize x (B, T, H)."""
        ctx.fused, ctx.how = fused, how
        ctx.save_for_backward(x)
        return norm(how, x.flatten(0, 1)).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x, with room beside it for the last layer's ranks."""
        (x,) = ctx.saved_tensors
        width = x.shape[-1]
        flat = x.flatten(0, 1)
        dx = flat.new_empty((flat.shape[0], width + ctx.fused.spare))[:, :width]
        norm_backward(ctx.how, dy.contiguous().view(flat.shape), flat, dx=dx)
        ctx.fused.handed = dx.view(x.shape)
        return ctx.fused.handed, None, None


def fuse_norm(model: nn.Module, layers: list[nn.Module], fused: "FusedBlocks") -> nn.Module | None:
    """Exchange the class of the norm behind a model's layers.

    Args:
        model: modified.
        layers: its decoder layers.
        fused: the handle to them.

    Returns:
        The norm, or None where no norm is called as the families of `description` call it.
    """
    for owner in model.modules():
        lists = [child for child in owner.children() if isinstance(child, nn.ModuleList)]
        if not any(list(child) == layers for child in lists):
            continue
        found = getattr(owner, "norm", None)
        family = family_of(layers[0])
        eps = getattr(found, "variance_epsilon", getattr(found, "eps", None))
        if not isinstance(found, nn.Module) or family is None or not isinstance(eps, float):
            return None
        if not type(found).__name__.endswith("RMSNorm"):
            return None
        weight = found.weight
        assert isinstance(weight, Tensor)
        kind = type(found)
        found.__class__ = type(f"Fused{kind.__name__}", (FusedNorm, kind), {})
        found._fused = fused  # type: ignore[assignment]
        found._how = Norm(weight, eps, family.unit_offset)  # type: ignore[assignment]
        return found
    return None


def restore_norm(found: nn.Module) -> None:
    """Undo `fuse_norm`.

    Args:
        found: what it returned.
    """
    if isinstance(found, FusedNorm):
        found.__class__ = type(found).__bases__[1]
        del found._fused, found._how
