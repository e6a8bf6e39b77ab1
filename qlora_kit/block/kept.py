"""What a decoder layer's forward pass leaves for its backward pass, by policy.

    kept                        save   recompute_elementwise   recompute_mlp   recompute_all
    x, the layer's input         yes    yes                     yes             yes
    q, k, v; attention's output  yes    yes                     yes             -
    h, after attention           yes    yes                     yes             -
    gate, up                     yes    yes                     -               -
    X·Aᵀ of the groups           yes    yes                     first two       -
    normed x and h, activation   yes    -                       -               -

With normed queries and keys (Qwen 3, Gemma 3) q and k are kept as projected too, and with
norms behind attention and feed-forward (Gemma) those norms' inputs. A frozen A (LoRA-FA)
needs neither normed inputs nor activations in any policy, and no layer's weight needs any.

Attention's share is of whole batches, the feed-forward's of one tile each.
"""

from dataclasses import dataclass, field, fields

from torch import Tensor

from qlora_kit.block.description import Description
from qlora_kit.block.policy import recomputed


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be kept of a pass."""

    attention: bool
    """What the backward of the first half needs."""
    mlp: bool
    """What that of the second half needs."""
    inputs: bool
    """What is cheap to compute again, of the halves that are kept."""


BACKWARD = Wanted(attention=True, mlp=True, inputs=True)
"""Of a pass that a backward follows at once."""


def wanted(policy: str) -> Wanted:
    """What a policy keeps.

    Args:
        policy: one of `policy.POLICIES`, or `nothing` where no backward follows.

    Returns:
        The parts.

    Example:
        >>> wanted("recompute_mlp").attention, wanted("recompute_mlp").mlp
        (True, False)
    """
    if policy == "nothing":
        return Wanted(attention=False, mlp=False, inputs=False)
    again = recomputed(policy)
    return Wanted(attention=again != "all", mlp=again == "elementwise", inputs=policy == "save")


@dataclass(slots=True)
class AttentionKept:
    """Of the first half; None where it is not wanted."""

    normed_x: Tensor | None = None
    projected: Tensor | None = None
    """q, k, v before their norms, (M, n); None without such norms."""
    qkv: Tensor | None = None
    """(M, n) ready for attention; with room for dY·B beside it where there are tiles."""
    attended: Tensor | None = None
    """(groups of heads, M, width of a group)."""
    lse: Tensor | None = None
    """(groups of heads, tokens times heads of a group)."""
    y: Tensor | None = None
    """What the norm behind attention reads."""
    small_qkv: Tensor | None = None
    small_o: Tensor | None = None

    def reduce(self, d: Description, want: Wanted) -> None:
        """Give up what is not wanted, and copy small products out of wide buffers that go.

        Args:
            d: the layer.
            want: what to keep.
        """
        if not want.attention:
            for name in fields(self):
                setattr(self, name.name, None)
            return
        if not (want.inputs and d.qkv.needs_input):
            self.normed_x = None
        self.small_qkv, self.small_o = _packed(self.small_qkv), _packed(self.small_o)


@dataclass(slots=True)
class MlpKept:
    """Of one tile of the second half; None where it is not wanted."""

    normed_h: Tensor | None = None
    gate_up: Tensor | None = None
    """(m, 2F), with room for dY·B beside it."""
    act: Tensor | None = None
    y: Tensor | None = None
    """What the norm behind the feed-forward reads."""
    small_gate_up: Tensor | None = None
    small_down: Tensor | None = None

    def reduce(self, d: Description, want: Wanted) -> None:
        """As that of `AttentionKept`.

        Args:
            d: the layer.
            want: what to keep.
        """
        if not (want.inputs and d.gate_up.needs_input):
            self.normed_h = None
        if not (want.inputs and d.down.needs_input):
            self.act = None
        self.small_gate_up = _packed(self.small_gate_up)
        self.small_down = _packed(self.small_down)


@dataclass(slots=True)
class Kept:
    """Of a layer."""

    x: Tensor | None = None
    h: Tensor | None = None
    attention: AttentionKept = field(default_factory=AttentionKept)
    mlp: list[MlpKept] = field(default_factory=list)
    """One per tile; empty where the feed-forward is computed again."""

    def tensors(self) -> list[Tensor | None]:
        """All of them, one after the other."""
        parts: list[AttentionKept | MlpKept] = [self.attention, *self.mlp]
        return [self.x, self.h, *(getattr(p, f.name) for p in parts for f in fields(p))]

    @staticmethod
    def of(tensors: list[Tensor | None]) -> "Kept":
        """Undo `tensors`.

        Args:
            tensors: what it gave.

        Returns:
            What it was given.
        """
        x, h, *rest = tensors
        first, each = len(fields(AttentionKept)), len(fields(MlpKept))
        mlp = [MlpKept(*rest[a : a + each]) for a in range(first, len(rest), each)]
        return Kept(x, h, AttentionKept(*rest[:first]), mlp)


def _packed(small: Tensor | None) -> Tensor | None:
    return None if small is None else small.contiguous()
