"""LoRA-FA's corrected gradient: the step of B that moves the weight as the full gradient would.

With A frozen, B only reaches weights ΔW = s·B·A. Backpropagation gives g = s·G·Aᵀ, where G
is the gradient of the whole weight, and following it moves the weight along G·AᵀA, which
stretches the directions that A happens to favour. What comes closest to G itself is

    argmin ‖s·ĝ·A − G‖_F  =  g·(A·Aᵀ)⁻¹ / s²

an r x r product per module, and G is never needed. A is frozen, so (A·Aᵀ)⁻¹/s² is computed
once, in float64, and kept in float32; it is computed again only if someone writes to an A
(a checkpoint is loaded). Where A has not full rank, its pseudo-inverse gives the smallest
of the minimisers.

Applied to `.grad` after the last backward pass and before clipping, so any optimizer may
follow. Modules of equal shape are multiplied together: three products for a Llama.

Default: off (`adapter.corrected_gradient`).

Source: arXiv:2308.03303 for LoRA-FA; the same minimiser for LoRA in arXiv:2407.18242.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qlora_kit.adapters.attached import AttachedAdapter
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.core.errors import AdapterError


def inverse_gram(a: Tensor, scale: Tensor) -> Tensor:
    """(A·Aᵀ)⁻¹ / s² of several modules.

    Args:
        a: (n, r, K) any float dtype.
        scale: (n,) s of each.

    Returns:
        (n, r, r) float32, symmetric; of the pseudo-inverse where A has not full rank.

    Example:
        >>> inverse_gram(torch.tensor([[[2.0, 0.0]]]), torch.tensor([0.5]))
        tensor([[[1.]]])
    """
    wide = a.double()
    inverse = torch.linalg.pinv(wide @ wide.mT, hermitian=True)
    return (inverse / scale.double().square()[:, None, None]).float()


class CorrectedGradient:
    """Multiplies the gradients of all B by their (A·Aᵀ)⁻¹ / s², in place.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.lora.config import LoRAFA
        >>> layer = LoRALinear(nn.Linear(4, 3), "proj", LoRAFA(rank=2), seed=0)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> before = layer.lora_B.grad.clone()
        >>> CorrectedGradient([layer]).apply()
        >>> torch.equal(layer.lora_B.grad, before)
        False
    """

    def __init__(self, modules: Iterable[LoRALinear]) -> None:
        """Sort the modules by shape.

        Args:
            modules: with frozen A, all on one device.

        Raises:
            AdapterError: an A is trained.
        """
        self.modules = tuple(modules)
        trained = [module.place for module in self.modules if module.lora_A.requires_grad]
        if trained or not self.modules:
            problem = f"{trained[0]} trains its A" if trained else "there is no low-rank module"
            raise AdapterError(
                f"the corrected gradient is LoRA-FA's, whose A is frozen, and {problem}. Use "
                "method lora_fa, or leave adapter.corrected_gradient off."
            )
        shapes: dict[tuple[object, ...], list[LoRALinear]] = {}
        for module in self.modules:
            b = module.lora_B
            shapes.setdefault((b.shape, module.in_features, b.dtype), []).append(module)
        self._groups = list(shapes.values())
        self._inverses: list[Tensor] = []
        self._seen: list[tuple[int, int]] = []

    @classmethod
    def of(cls, adapter: AttachedAdapter) -> "CorrectedGradient | None":
        """Make what an adapter's configuration asks for.

        Args:
            adapter: attached.

        Returns:
            None unless its `corrected_gradient` is on.

        Raises:
            AdapterError: it is on and the adapter trains A.

        Example:
            >>> from torch import nn
            >>> from qlora_kit.adapters.lora.config import LoRAFA
            >>> from qlora_kit.adapters.inject import attach
            >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 4)])})
            >>> adapter = attach(model, LoRAFA(rank=2, corrected_gradient=True))
            >>> len(CorrectedGradient.of(adapter).modules)
            1
        """
        if not getattr(adapter.config, "corrected_gradient", False):
            return None
        return cls(piece for piece in adapter.pieces if isinstance(piece, LoRALinear))

    @torch.no_grad()
    def apply(self) -> None:
        """Correct the gradients that are there; once per update, before clipping."""
        written = [(m.lora_A._version, m.lora_A.data_ptr()) for m in self.modules]
        if written != self._seen:
            self._inverses = [self._invert(group) for group in self._groups]
            self._seen = written
        for group, inverses in zip(self._groups, self._inverses, strict=True):
            present = [i for i, m in enumerate(group) if m.lora_B.grad is not None]
            if not present:
                continue
            gradients = [g for m in group if (g := m.lora_B.grad) is not None]
            if len(present) < len(group):
                inverses = torch.stack([inverses[i] for i in present])
            corrected = torch.bmm(torch.stack(gradients).float(), inverses)
            torch._foreach_copy_(gradients, list(corrected.unbind()))

    def _invert(self, group: Sequence[LoRALinear]) -> Tensor:
        a = torch.stack([module.lora_A.detach() for module in group])
        scale = torch.tensor([module.scale for module in group], device=a.device)
        return inverse_gram(a, scale)
