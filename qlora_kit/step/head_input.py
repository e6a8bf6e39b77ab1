"""What a causal model's output head sees: the hidden states whose next token has a label.

The model's own forward runs, unpatched and under whatever wraps it, up to the output head. A
forward pre-hook there takes the S hidden states that count and hands the head none of them;
`nn/loss_head.py` applies it to them afterwards, a chunk at a time. So (B, T, V) logits never
exist, and every architecture whose head is a module is covered without knowing its parts.

One part has to be known: what the model does to the head's output (soft caps, scales). The
first forward of a model is asked. One row of known numbers is passed off as the head's
output, and what the model made of them is looked up among the `LogitRule`s that its
configuration allows. If none of them does it, this model's head is given the S states from
then on, and the model's own code makes the logits, (S, V) of them.

Which positions count is known before the batch is on the GPU. A batch that brings them along
(`target_positions`) is never waited for: nothing is counted, masked or read back, and their
number is padded so that batches of one shape give steps of one shape. The padding points at
the last position of a row, whose target does not exist and is ignored. Without them they are
read off the labels, and the host waits once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_kit.adapters.prompt.answer_start import announced
from qlora_kit.core.log import log_once
from qlora_kit.nn.loss_head import IGNORE, HeadLoss, LogitRule, head_loss, is_plain_linear
from qlora_kit.ops.autocast import autocast, autocast_dtype

PROBE_RANGE = 64.0
"""Known numbers span plus and minus this: wider than logits, so that any cap shows."""

TARGET_POSITIONS = "target_positions"
"""A key of a collated batch: what `target_positions` made of its labels."""

POSITIONS_MULTIPLE = 256
"""The number of positions is padded to a multiple of this: few shapes, little work for nothing."""

_known: WeakKeyDictionary[nn.Module, dict[tuple[LogitRule, ...], LogitRule | None]] = (
    WeakKeyDictionary()
)
"""Model to what was found, for the rules that its configuration allowed at the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInput:
    """The S positions of a batch whose next token has a label (and padding), before the head."""

    states: Tensor
    """(S, H) hidden states; (S, V) logits where `head` is an identity."""
    head: nn.Module
    """Maps states to the output that `rule` turns into logits."""
    rule: LogitRule
    """What the model does after its head."""
    targets: Tensor
    """(S,) int64, the token to predict; `IGNORE` where the position is padding."""
    rows: Tensor
    """(S,) int64, the batch row each position belongs to; ascending but for padding."""
    positions: Tensor
    """(S,) int64, its column; the target is the token at the next one."""
    autocast: torch.dtype | None = None
    """Autocast dtype that the model ran its head in."""
    router_loss: Tensor | None = None
    """() the loss a mixture of experts adds to balance its router, if it is switched on."""

    def losses(self, label_smoothing: float = 0.0) -> HeadLoss:
        """Cross-entropy of the S positions; no more than a chunk of logits exists at a time.

        Args:
            label_smoothing: share of the target spread over all tokens.

        Returns:
            The sum, differentiable, and each position's loss.
        """
        with self._autocast():
            return head_loss(
                self.head,
                self.states,
                self.targets,
                rule=self.rule,
                label_smoothing=label_smoothing,
                ignore_index=IGNORE,
            )

    def logits(self, which: Tensor) -> Tensor:
        """Logits of some of the positions, without a gradient.

        Args:
            which: (S,) bool, or indices; few.

        Returns:
            (n, V), at least float32.
        """
        with torch.no_grad(), self._autocast():
            return self.rule.apply(self.head(self.states[which]))

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.states.device, self.autocast)


def label_mask(labels: Tensor) -> Tensor:
    """Mark the positions whose hidden state predicts a token that counts.

    Args:
        labels: (B, T) int64, `IGNORE` where a token does not count.

    Returns:
        (B, T) bool; position t is True when labels[:, t + 1] counts.

    Example:
        >>> label_mask(torch.tensor([[-100, -100, 7, 8]])).int().tolist()
        [[0, 1, 1, 0]]
    """
    return F.pad(labels[:, 1:] != IGNORE, (0, 1), value=False)


def target_positions(labels: Tensor, multiple: int = POSITIONS_MULTIPLE) -> Tensor:
    """List the positions that `label_mask` marks, padded; on the CPU, or the host waits.

    Args:
        labels: (B, T) int64, `IGNORE` where a token does not count.
        multiple: the result's length is one of this, at least once.

    Returns:
        (S,) int64 indices into the B·T positions, ascending; then, as padding, the last
        position of the first row, which predicts nothing.

    Example:
        >>> target_positions(torch.tensor([[-100, -100, 7, 8], [5, 6, -100, -100]]), 4)
        tensor([1, 2, 4, 3])
    """
    found = label_mask(labels).flatten().nonzero().squeeze(1)
    wanted = max(1, -(-len(found) // multiple)) * multiple
    return F.pad(found, (0, wanted - len(found)), value=labels.shape[1] - 1)


def selectable_head(model: PreTrainedModel) -> nn.Module | None:
    """Find the output head that can be given selected positions only.

    Args:
        model: a causal language model.

    Returns:
        The module that maps hidden states to logits, or None when the model has
        no such module.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> selectable_head(tiny) is tiny.lm_head
        True
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def head_input(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    *,
    forward: Callable[..., Any] | None = None,
) -> HeadInput | None:
    """Run the model and keep the states that predict a counted token.

    Args:
        model: a causal language model.
        inputs: a collated batch with `input_ids` and `labels` (B, T), and whatever
            else the model takes; `target_positions`, if it brings them along: each position
            once, but for those without a target. Not modified.
        forward: how to call the model when something wraps it (data parallelism).

    Returns:
        The states, their targets and places; None when this architecture's head
        cannot be given selected positions (use the model's own loss then).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
        >>> head_input(tiny, batch).states.shape
        torch.Size([2, 8])
    """
    head = selectable_head(model)
    if head is None:
        return None
    allowed = allowed_rules(model)
    known = _known.setdefault(model, {})
    labels, positions = inputs["labels"], inputs.get(TARGET_POSITIONS)
    if labels.is_meta:  # no number to ask: a step is traced for what it takes
        known.setdefault(allowed, allowed[0])
    if positions is None:
        positions = label_mask(labels).flatten().nonzero().squeeze(1)
    way = _way(head, allowed, known)
    tap = _HeadTap(labels.shape, positions, way, empty=is_plain_linear(head))
    random = _random_state(labels.device) if tap.way == "ask" else None
    outputs = tap.run(head, forward or model, inputs)
    if tap.way == "ask" and tap.calls == 1:
        known[allowed] = tap.rule_among(allowed, outputs.logits)
        if known[allowed] is None:
            log_once(
                f"{type(model).__name__}: what it does after its head is not one of the known "
                "rules; its own code makes the logits of all positions that count."
            )
            _restore(random)  # the same dropout as in a model that was asked before
            tap = _HeadTap(labels.shape, positions, "logits", empty=False)
            outputs = tap.run(head, forward or model, inputs)
    router_loss = _router_loss(model, inputs, outputs)
    if tap.calls != 1 or tap.states is None or router_loss is NotImplemented:
        return None
    rule = known[allowed] if tap.way != "logits" else None
    states = outputs.logits[0] if tap.way == "logits" else tap.states
    length, positions = labels.shape[1], positions.to(states.device)
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten().to(states.device)
    return HeadInput(
        states=states,
        head=nn.Identity() if tap.way == "logits" else head,
        rule=rule or LogitRule(),
        targets=following.index_select(0, positions),
        rows=positions.div(length, rounding_mode="floor"),
        positions=positions.remainder(length),
        autocast=None if tap.way == "logits" else tap.autocast,
        router_loss=router_loss,
    )


def allowed_rules(model: PreTrainedModel) -> tuple[LogitRule, ...]:
    """What a model may do after its head, by the numbers its configuration holds.

    Args:
        model: a causal language model.

    Returns:
        At least the rule that does nothing; the most special ones first.

    Example:
        >>> from transformers import Gemma2Config, Gemma2ForCausalLM
        >>> with torch.device("meta"):
        ...     model = Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=1, vocab_size=8))
        >>> [rule.softcap for rule in allowed_rules(model)]
        [30.0, None]
    """
    config = model.config.get_text_config()

    def numbers(*names: str) -> list[float]:
        found = [getattr(config, name, None) for name in names]
        return [float(x) for x in found if isinstance(x, int | float) and x > 0]

    divisors = numbers("logits_scaling")
    scales = [*numbers("logit_scale", "lm_head_multiplier"), *(1 / x for x in divisors), *divisors]
    caps = numbers("final_logit_softcapping", "logits_soft_cap")
    pairs = product(dict.fromkeys([*scales, 1.0]), dict.fromkeys([*caps, None]))
    return tuple(LogitRule(scale=scale, softcap=cap) for scale, cap in pairs)


def without_targets(inputs: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a batch what says which tokens to predict.

    Args:
        inputs: a collated batch. Not modified.

    Returns:
        What a model takes to make hidden states or logits.

    Example:
        >>> without_targets({"input_ids": 1, "labels": 2, "target_positions": 3})
        {'input_ids': 1}
    """
    return {k: v for k, v in inputs.items() if k not in ("labels", TARGET_POSITIONS)}


class _Take(torch.autograd.Function):
    """Some rows of (N, H), each of them once.

    Rows that come more than once get one of their gradients: only padding does, and has none.
    Indexing would add them up, which on a GPU takes sorting, or atomics in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, positions: Tensor) -> Tensor:
        """Gather."""
        ctx.save_for_backward(positions)
        ctx.rows = hidden.shape[0]
        return hidden.index_select(0, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_taken: Tensor) -> tuple[Tensor, None]:
        """Scatter."""
        (positions,) = ctx.saved_tensors
        d_hidden = d_taken[0].new_zeros(ctx.rows, d_taken[0].shape[1])
        return d_hidden.index_copy_(0, positions, d_taken[0]), None


_Way = Literal["ask", "hidden", "logits"]


def _way(
    head: nn.Module,
    allowed: tuple[LogitRule, ...],
    known: dict[tuple[LogitRule, ...], LogitRule | None],
) -> _Way:
    """Ask for the rule, take hidden states, or let the model make the logits."""
    if any(hasattr(p, "full_tensor") for p in head.parameters()):
        return "logits"  # sharded over processes: gathered during the model's forward only
    if allowed not in known:
        return "ask"
    return "logits" if known[allowed] is None else "hidden"


class _HeadTap:
    """Hooks on a head for one forward: takes the states that count, decides what the head sees."""

    def __init__(
        self, shape: tuple[int, ...], positions: Tensor, way: _Way, *, empty: bool
    ) -> None:
        self.shape, self.positions, self.way = tuple(shape), positions, way
        self.shown = 0 if empty and way == "hidden" else 1  # tokens the head sees
        self.calls = 0
        self.states: Tensor | None = None
        self.autocast: torch.dtype | None = None
        self.probe: Tensor | None = None

    def run(self, head: nn.Module, forward: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
        """The model's output, made without labels."""
        handles = [head.register_forward_pre_hook(self._before)]
        if self.way == "ask":
            handles.append(head.register_forward_hook(self._after))
        try:
            with announced(inputs["labels"]):
                return forward(**without_targets(inputs))
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self.calls += 1
        if self.calls != 1 or not inputs or inputs[0].shape[:2] != self.shape:
            self.calls = -1  # not the (B, T, H) of this batch: leave it alone, use the model's loss
            return None
        hidden, *rest = inputs
        self.states = _Take.apply(hidden.flatten(0, 1), self.positions.to(hidden.device))
        self.autocast = autocast_dtype(hidden.device)
        seen = self.states.unsqueeze(0) if self.way == "logits" else hidden[:1, : self.shown]
        return (seen, *rest)

    def _after(self, _module: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
        if self.calls != 1 or not isinstance(output, Tensor) or output.shape[:2] != (1, 1):
            return None
        self.probe = torch.linspace(
            -PROBE_RANGE, PROBE_RANGE, output.shape[-1], dtype=output.dtype, device=output.device
        ).expand_as(output)
        everywhere = torch.ones_like(output, dtype=torch.bool)
        return torch.where(everywhere, self.probe, output)  # still a result of all parameters

    def rule_among(self, allowed: tuple[LogitRule, ...], logits: Tensor) -> LogitRule | None:
        """The rule by which the model made these logits of the probe, or None."""
        if self.probe is None or logits.shape != self.probe.shape:
            return None
        slack = 4 * torch.finfo(self.probe.dtype).eps  # three roundings: divide, tanh, multiply
        made = logits.detach().to(self.probe.device)
        for rule in allowed:
            wanted = rule.apply(self.probe)
            if bool(((made - wanted).abs() <= slack * wanted.abs()).all()):
                return rule
        return None


def _router_loss(model: PreTrainedModel, inputs: dict[str, Tensor], outputs: Any) -> Any:
    """The balancing loss () with its factor, None without one, NotImplemented if out of reach."""
    config = model.config.get_text_config()
    wanted = inputs.get("output_router_logits", getattr(config, "output_router_logits", False))
    if not wanted:
        return None
    unknown = getattr(config, "router_aux_loss_coef", None)
    factor, loss = getattr(model, "router_aux_loss_coef", unknown), outputs.get("aux_loss")
    return factor * loss if factor is not None and isinstance(loss, Tensor) else NotImplemented


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None, torch.device]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, device


def _restore(state: tuple[Tensor, Tensor | None, torch.device] | None) -> None:
    assert state is not None
    torch.set_rng_state(state[0])
    if state[1] is not None:  # needs a GPU
        torch.cuda.set_rng_state(state[1], state[2])
