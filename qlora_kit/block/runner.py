"""One layer of a fused model: what is known about it, and the autograd function that runs it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora.layer import FusibleLinear
from qlora_kit.block.description import describe, drops_activations, linears
from qlora_kit.block.layer import Call, Kept, backward, forward
from qlora_kit.block.offload import HostStore, Ticket
from qlora_kit.block.operands import Operands
from qlora_kit.block.policy import waits_on_host
from qlora_kit.block.tiles import tiles_of

if TYPE_CHECKING:
    from qlora_kit.block.install import FusedBlocks


class Runner:
    """One layer's description, policy and place in the model.

    Attributes:
        description: of the layer as it is now.
        policy: one of `policy.POLICIES`.
        operands: of the layer alone, for where the model's are not kept.
    """

    def __init__(self, fused: "FusedBlocks", layer: nn.Module, index: int, policy: str) -> None:
        """Describe a layer.

        Args:
            fused: all layers of the model.
            layer: for which `why_not` knows no reason.
            index: its number.
            policy: one of `policy.POLICIES`.
        """
        self.fused = fused
        self.index = index
        self.policy = policy
        self.describe(layer)

    def describe(self, layer: nn.Module) -> None:
        """Read the layer as it is now.

        Args:
            layer: the runner's own.
        """
        self.description = describe(layer, deterministic=self.fused.deterministic)
        groups = self.description.groups
        self.operands = Operands(groups)
        self._on = _switched_on(self.description.modules)
        self._adapters = [part.lora for group in groups for part in group.parts if part.lora]
        adapted = [m for m in self.description.modules if isinstance(m, FusibleLinear)]
        trained = {id(p) for module in adapted for p in module.masters}  # those that are off too
        self._frozen = [
            p
            for p in layer.parameters()
            if p.is_floating_point() and p.numel() and id(p) not in trained
        ]
        self._drops = drops_activations(layer)

    def is_current(self, layer: nn.Module) -> bool:
        """Whether the layer still has the linears that were described, and adapters as then."""
        qkv, gate_up, others = linears(layer)
        o, down = others
        now = (*qkv, o, *gate_up, down)
        same = all(a is b for a, b in zip(now, self.description.modules, strict=True))
        return same and _switched_on(now) == self._on

    def may_run(self, layer: nn.Module) -> bool:
        """Whether one step computes what the layer's own code would.

        Args:
            layer: the runner's own.

        Returns:
            False while something drops out, or is trained that was not described.
        """
        if self._drops and layer.training:
            return False
        if any(a.dropout and a.training for a in self._adapters):
            return False
        return not any(parameter.requires_grad for parameter in self._frozen)


def _switched_on(modules: Iterable[nn.Module]) -> list[bool]:
    """Of every adapter among some linears, in order, whether it is on."""
    return [module.enabled for module in modules if isinstance(module, FusibleLinear)]


def _again(host: HostStore, away: Ticket) -> Callable[[], Tensor]:
    """Let a layer's input come once more; what waits for it."""
    host.begin(away)

    def wait() -> Tensor:
        x, *_ = host.take(away, ahead=False)
        assert x is not None
        return x

    return wait


class Step(torch.autograd.Function):
    """A layer as one function of its input and its adapters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runner: Runner, call: Call, *parameters: Tensor) -> Tensor:
        """Run the layer on x (B, T, H), and leave what its policy keeps."""
        rows = call.batch * call.length
        flat, fused = x.reshape(rows, -1), runner.fused
        ctx.fused, ctx.tile, ctx.operands = fused, fused.tile, runner.operands
        several = tiles_of(runner.description, rows, fused.tile).several
        settle = fused.host.settle_large if several and waits_on_host(runner.policy) else None
        with fused.rounded(runner.operands, fused.tile, x.dtype):
            y, kept = forward(
                runner.description, flat, call, runner.policy, fused.tile, getting_wide=settle
            )
        ctx.description, ctx.policy, ctx.call = runner.description, runner.policy, call
        ctx.spent, ctx.away = False, None
        if waits_on_host(runner.policy):
            # x alone: it has not to lie there from the one use to the other
            twice = several and runner.policy == "offload"
            ctx.away = fused.host.put(runner.index, kept.tensors(), twice=twice)
            if several and runner.index == len(fused.layers) - 1:
                fused.host.settle()  # before the head
        else:
            ctx.save_for_backward(*kept.tensors())
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the adapters, from that of the result (B, T, H)."""
        call: Call = ctx.call
        if ctx.spent:
            raise RuntimeError(
                "a second backward pass through a fused layer, which reuses what it kept as it "
                "goes. Run the forward pass again, or use the policy recompute_all."
            )
        ctx.spent = ctx.policy != "recompute_all"
        rows = call.batch * call.length
        host, away = ctx.fused.host, ctx.away
        late = away is not None and away.late and tiles_of(ctx.description, rows, ctx.tile).several
        twice = away is not None and away.twice
        kept = Kept.of(host.take(away, ahead=not late) if away else list(ctx.saved_tensors))
        owned = ctx.fused.handed_out(dy)
        flat = dy.reshape(rows, -1)
        with ctx.fused.rounded(ctx.operands, ctx.tile, dy.dtype):
            result = backward(
                ctx.description,
                flat if owned else flat.contiguous(),
                kept,
                call,
                need_dx=ctx.needs_input_grad[0],
                tile=ctx.tile,
                owned=owned,
                spare=ctx.fused.spare,
                once_more=partial(_again, host, away) if twice else None,
                no_longer_wide=(lambda: host.prefetch(away)) if late else None,
            )
        dx = None if result.dx is None else result.dx.view(dy.shape)
        ctx.fused.handed = dx
        return dx, None, None, *result.parameters
