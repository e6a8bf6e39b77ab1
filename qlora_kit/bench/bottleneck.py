"""Bottleneck adapters, for measuring what they cost at inference; they cannot be trained here.

h + W_u f(W_d h + b_d) + b_u on the output of a projection, before the residual add: Houlsby's
after attention and after the feed-forward (arXiv:1902.00751), Pfeiffer's after the feed-forward
alone (arXiv:2005.00247). They cannot be merged, which is what the table is about.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kit.adapters.lora import linear_shape
from qlora_kit.adapters.protocol import ModuleWrapper
from qlora_kit.core.errors import ConfigError

KINDS = ("pfeiffer", "houlsby")
"""Pfeiffer: one per layer. Houlsby: two per layer."""

_PROJECTIONS = (("self_attn.o_proj", "mlp.down_proj"), ("attn.c_proj", "mlp.c_proj"))
"""Names of attention's and the feed-forward's last linear within a layer."""


class Bottleneck(ModuleWrapper):
    """A linear whose output passes through a bottleneck.

    Example:
    >>> import torch
        >>> adapter = Bottleneck(nn.Linear(4, 8), "proj", width=2)
        >>> sum(p.numel() for p in adapter.trainable().values())  # 2dm + m + d
        42
        >>> adapter(torch.ones(3, 4)).shape
        torch.Size([3, 8])
    """

    def __init__(self, base: nn.Module, place: str, *, width: int) -> None:
        """Wrap a linear.

        Args:
            base: whose output is transformed. Not modified.
            place: its dotted name in the model.
            width: m, of the bottleneck.
        """
        super().__init__(base, place)
        weight, d = base.get_parameter("weight"), linear_shape(base)[0]
        self.down = nn.Linear(d, width, dtype=weight.dtype, device=weight.device)
        self.up = nn.Linear(width, d, dtype=weight.dtype, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear, then the bottleneck.

        Args:
            x: (..., K).

        Returns:
            (..., d).
        """
        h: Tensor = self.base(x)
        if not self.enabled:
            return h
        out: Tensor = self.up(F.relu(self.down(h)))
        return out.add_(h)

    def trainable(self) -> dict[str, nn.Parameter]:
        """W_d, b_d, W_u and b_u."""
        both = {"down": self.down, "up": self.up}
        return {f"{k}.{n}": p for k, m in both.items() for n, p in m.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """The same."""
        return dict(self.trainable())


def install_bottlenecks(model: nn.Module, kind: str, reduction: int) -> list[Bottleneck]:
    """Put bottlenecks on every layer of a model, in place.

    Args:
        model: of the Llama-like family or GPT-2.
        kind: one of `KINDS`.
        reduction: the model's width over the bottleneck's.

    Returns:
        What was installed; each one's `uninstall` undoes it.

    Raises:
        ConfigError: the kind is unknown, or the model's layers have no such projections.

    Example:
        >>> from qlora_kit.bench.shapes import TINY
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_config(TINY)
        >>> len(install_bottlenecks(model, "houlsby", 16)), TINY.num_hidden_layers
        (4, 2)
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown bottleneck {kind!r}; known: {', '.join(KINDS)}.")
    endings = tuple(pair[1] for pair in _PROJECTIONS)
    if kind == "houlsby":
        endings += tuple(pair[0] for pair in _PROJECTIONS)
    places = [n for n, _ in model.named_modules() if n.endswith(endings)]
    if not places:
        raise ConfigError(
            f"{type(model).__name__} has no projections called {', '.join(endings)}: bottlenecks "
            "are measured on the Llama-like family and GPT-2."
        )
    made = []
    for place in places:
        base = model.get_submodule(place)
        piece = Bottleneck(base, place, width=max(1, linear_shape(base)[0] // reduction))
        piece.install(model)
        made.append(piece.requires_grad_(False))
    return made
