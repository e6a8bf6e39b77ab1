"""What a decoder layer consists of, read from the model: one description for the whole family.

Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 and Phi 3 are one architecture with options:
RMSNorm before attention and feed-forward, rotary positions, grouped key/value heads and a
gated feed-forward. `FAMILIES` lists the classes of transformers whose forward is known to
be that, with the names of their norms; all else (sizes, scales, windows, caps, whether
heads are normed or projections fused) is read from the layer itself.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qlora_kit.adapters.lora.layer import FusibleLinear
from qlora_kit.block.projection import Group, can_group
from qlora_kit.block.row_factors import can_stretch
from qlora_kit.ops.attention.rule import AttentionRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family names and uses its norms."""

    before_mlp: str = "post_attention_layernorm"
    """The norm in front of the feed-forward."""
    after_attention: str | None = None
    """A norm on attention's result before it joins the residual stream."""
    after_mlp: str | None = None
    """Likewise on the feed-forward's."""
    unit_offset: bool = False
    """Norms multiply by 1 + weight."""


_PLAIN = Family()
_GEMMA = Family(
    before_mlp="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
    unit_offset=True,
)

FAMILIES: dict[str, Family] = {
    "LlamaDecoderLayer": _PLAIN,
    "MistralDecoderLayer": _PLAIN,
    "Qwen2DecoderLayer": _PLAIN,
    "Qwen3DecoderLayer": _PLAIN,
    "Phi3DecoderLayer": _PLAIN,
    "Gemma2DecoderLayer": _GEMMA,
    "Gemma3DecoderLayer": _GEMMA,
}
"""Class name of a transformers decoder layer to its family."""

_KINDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
"""transformers' names of activations to those of `ops/gated_activation`."""


@dataclass(frozen=True, slots=True)
class Norm:
    """One RMSNorm."""

    weight: Tensor
    """(H,)."""
    eps: float
    unit_offset: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A decoder layer as data."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key (and value) heads."""
    head_dim: int
    rule: AttentionRule
    kind: str
    """Of the activation: silu, gelu_tanh or gelu."""
    before_attention: Norm
    after_attention: Norm | None
    before_mlp: Norm
    after_mlp: Norm | None
    query_norm: Norm | None
    """On each query head, before the rotary positions."""
    key_norm: Norm | None
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    modules: tuple[nn.Module, ...]
    """The linears the groups were made of, to notice that an adapter came or went."""

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order of the forward pass."""
        return self.qkv, self.o, self.gate_up, self.down


def linears(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """A layer's linears by what they read.

    Args:
        layer: of a class in `FAMILIES`.

    Returns:
        Those of q, k and v (one or three), those of gate and up (one or two), and the
        output and down projections.
    """
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    qkv = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    gate_up = ("gate_up_proj",) if hasattr(mlp, "gate_up_proj") else ("gate_proj", "up_proj")
    return (
        [getattr(attention, name) for name in qkv],
        [getattr(mlp, name) for name in gate_up],
        [attention.o_proj, mlp.down_proj],
    )


def family_of(layer: nn.Module) -> Family | None:
    """The family of a layer, by the name of its class or of one it derives from.

    Args:
        layer: any module.

    Returns:
        None for other architectures.

    Example:
        >>> family_of(nn.Linear(1, 1)) is None
        True
    """
    for kind in type(layer).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    return None


def why_not(layer: nn.Module) -> str | None:
    """The reason why a layer cannot run as one step, if there is one.

    Args:
        layer: of any class.

    Returns:
        A phrase for a message, or None.
    """
    if family_of(layer) is None:
        return f"{type(layer).__name__} is not of the Llama-like family"
    attention = layer.self_attn
    assert isinstance(attention, nn.Module)
    config = attention.config
    modules = [module for group in linears(layer) for module in group]
    names = {type(module).__name__ for module in modules if not can_group(module)}
    if names:
        return f"a projection is trained, has dropout or is no linear ({', '.join(sorted(names))})"
    long = [m for m in modules if isinstance(m, FusibleLinear) and m.lengths is not None]
    if not all(can_stretch(module.base) for module in long):
        return "blocks of 4-bit weights run across the rows that DoRA stretches"
    if _stretched_with_bias(layer):
        return "DoRA's projections have biases, other than q, k and v without norms of their own"
    norms = [m for name, m in layer.named_modules() if name.endswith("norm")]
    if any(p.requires_grad for norm in norms for p in norm.parameters()):
        return "a norm is trained"
    if layer.training and drops_activations(layer):
        return "the model drops out activations"
    if not getattr(attention, "is_causal", True):
        return "its attention looks ahead"
    if _activation(config) not in _KINDS:
        return f"its activation is {_activation(config)}"
    return None


def _stretched_with_bias(layer: nn.Module) -> bool:
    """Whether a projection has row factors and a bias where its output is read with the bias."""
    qkv, *others = linears(layer)
    normed = getattr(layer.self_attn, "q_norm", None) is not None
    groups = [qkv, *others] if normed else others
    return any(
        isinstance(module, FusibleLinear) and module.lengths and module.bias is not None
        for group in groups
        for module in group
    )


def describe(layer: nn.Module, *, deterministic: bool = False) -> Description:
    """Read a layer for which `why_not` knows no reason.

    Args:
        layer: a decoder layer.
        deterministic: attention must give the same bits twice.

    Returns:
        Its description; tensors and modules are shared.
    """
    family = family_of(layer)
    assert family is not None
    attention: Any = layer.self_attn
    config = attention.config
    qkv, gate_up, (o, down) = linears(layer)

    def norm(owner: nn.Module, name: str | None) -> Norm | None:
        module = getattr(owner, name, None) if name else None
        if module is None:
            return None
        eps = getattr(module, "variance_epsilon", None)
        return Norm(module.weight, module.eps if eps is None else eps, family.unit_offset)

    first, second = norm(layer, "input_layernorm"), norm(layer, family.before_mlp)
    assert first is not None
    assert second is not None
    head_dim = attention.head_dim
    group = Group(qkv)
    heads = config.num_attention_heads
    return Description(
        heads=heads,
        kv_heads=(group.n // head_dim - heads) // 2,
        head_dim=head_dim,
        rule=AttentionRule(
            scale=float(attention.scaling),
            window=_window(attention, config),
            softcap=getattr(attention, "attn_logit_softcapping", None),
            deterministic=deterministic,
        ),
        kind=_KINDS[_activation(config)],
        before_attention=first,
        after_attention=norm(layer, family.after_attention),
        before_mlp=second,
        after_mlp=norm(layer, family.after_mlp),
        query_norm=norm(attention, "q_norm"),
        key_norm=norm(attention, "k_norm"),
        qkv=group,
        o=Group([o]),
        gate_up=Group(gate_up),
        down=Group([down]),
        modules=(*qkv, o, *gate_up, down),
    )


def _window(attention: nn.Module, config: object) -> int | None:
    """Tokens a query sees; some families keep the figure in the layer, some in the config."""
    own = getattr(attention, "sliding_window", config)
    found = getattr(config, "sliding_window", None) if own is config else own
    return found if isinstance(found, int) else None


def _activation(config: object) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))


def drops_activations(layer: nn.Module) -> bool:
    """Whether a layer has dropout of its own, beside its adapters', while it trains.

    Args:
        layer: of a class in `FAMILIES`.

    Returns:
        By its configuration.
    """
    attention: Any = layer.self_attn
    config = attention.config
    return any(getattr(config, name, 0.0) for name in ("attention_dropout", "resid_pdrop"))
