"""Forward and backward of small batches as one CUDA graph per shape.

A step waits for Python where the GPU is done with a layer before the next one is launched.
Launching takes about as long for every layer, however large: 4 to 10 ms forward and backward.
The GPU's time is in proportion to the layer's matrices and the batch's tokens, so the smaller
the model, the more tokens a batch that is recorded may have (`recorded_tokens`; plans ask the
same function). A shape that has come twice is recorded the third time, and replayed from then
on: one launch. What is recorded is the loss and the gradients of one batch; accumulation,
clipping and the optimizer stay outside, since learning rate and step number change.

The memory of a recorded step stays reserved for it. All graphs share it, so it costs what the
largest needs. Nothing in the step may wait for the GPU; if something does, or if the recording
leaves no room for an update and for what runs beside it (half of what it holds, for evaluations;
what the largest batch takes, where other shapes have come), it is dropped, that is logged, and
training goes on without.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.block.install import decoder_layers
from qlora_kit.core.log import logger
from qlora_kit.core.units import format_bytes
from qlora_kit.nn.linear import NF4Linear

Inputs = dict[str, Any]

MOST_TOKENS = 1 << 14
"""Larger batches run without, whatever the model: long rows are in tiles, and their memory is not
to be held."""

LAUNCH_S = 7e-3
"""A layer's products in a frozen base have to take the GPU as long as this for it not to wait.
Steps without a graph took the host 4 to 10 ms a layer in benchmarks/results/memory and plan; norms,
attention and the adapter give the GPU four tenths more than products alone."""

MOST_GRAPHS = 8
"""Shapes beyond this many run without."""

_SEEN_BEFORE = 2
"""A shape is recorded when it has run so many times: everything is compiled and allocated."""


def recorded_tokens(model: nn.Module, flops: float) -> int:
    """Up to how many tokens a batch is recorded: where the host cannot keep up.

    Args:
        model: with decoder layers, on any device.
        flops: FLOP/s of the GPU's large products.

    Returns:
        Tokens; at most `MOST_TOKENS`.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(4096, 13 * 4096, device="meta")])
        >>> recorded_tokens(layers, 695e12)  # an 8B model's layers on an H100
        5576
        >>> recorded_tokens(nn.ModuleList([nn.Linear(64, 64)]), 695e12) == MOST_TOKENS
        True
    """
    layers = decoder_layers(model)
    modules = [module for layer in layers for module in layer.modules()]
    linears = [m for m in modules if isinstance(m, (nn.Linear, NF4Linear))]
    elements = sum(m.in_features * m.out_features for m in linears) / max(1, len(layers))
    per_token = 4.0 * max(1.0, elements)  # y = x·Wᵀ and dx = dy·W, two FLOPs a multiply-add
    return min(MOST_TOKENS, int(LAUNCH_S * flops / per_token))


@dataclass(slots=True)
class _Recorded:
    """One shape's graph and the tensors it reads and writes."""

    graph: Any
    inputs: Inputs
    items: Tensor
    loss: Tensor
    gradients: list[Tensor | None]


class StepGraphs:
    """Runs the forward and backward of one batch, recorded where its shape repeats.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> graphs = StepGraphs(lambda inputs, items: weight.sum() / items, [weight])
        >>> graphs.run({"x": torch.ones(2)}, torch.tensor(2)) is None  # no GPU: not here
        True
    """

    def __init__(
        self,
        loss: Callable[[Inputs, Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        """Record nothing yet.

        Args:
            loss: of a batch on the device and the number of predicted tokens, () tensors.
            parameters: those trained.
            most_tokens: batches with more elements in `input_ids` run without.
        """
        self._loss = loss
        self._parameters = list(parameters)
        self._most_tokens = most_tokens
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._pool: Any = None
        self._held = 0
        self._working = True

    def run(self, inputs: Inputs, items: Tensor) -> Tensor | None:
        """Add a batch's gradients to the parameters' `.grad`.

        Args:
            inputs: of the model, on one CUDA device.
            items: () predicted tokens of all accumulated batches, on that device.

        Returns:
            () the loss, detached; None if this batch has to run without a graph.
        """
        ids = inputs.get("input_ids")
        fits = isinstance(ids, Tensor) and ids.is_cuda and ids.numel() <= self._most_tokens
        if not self._working or not fits or not items.is_cuda:
            return None
        return self._run(inputs, items)

    def _run(self, inputs: Inputs, items: Tensor) -> Tensor | None:  # needs a GPU
        key = _key(inputs)
        recorded = self._recorded.get(key)
        if recorded is None:
            self._seen[key] += 1
            if self._seen[key] <= _SEEN_BEFORE or len(self._recorded) >= MOST_GRAPHS:
                return None
            recorded = self._record(inputs, items)
            if recorded is None:
                return None
            self._recorded[key] = recorded
        return self._replay(recorded, inputs, items)

    def _record(self, inputs: Inputs, items: Tensor) -> _Recorded | None:  # needs a GPU
        """Record a step; what it computes meanwhile is thrown away."""
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        count, graph = items.clone(), torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                reserved = torch.cuda.memory_reserved()
                loss = self._loss(own, count)
                loss.backward()
            gradients = [parameter.grad for parameter in self._parameters]
            _ask_for_as_much(gradients)
            self._held += torch.cuda.memory_reserved() - reserved  # on top of earlier graphs'
            self._ask_for_room()
            return _Recorded(graph, own, count, loss.detach(), gradients)
        except RuntimeError as error:
            self._working, self._pool = False, None
            self._recorded.clear()  # gives their memory back
            logger.warning("training without CUDA graphs: %s", str(error).split("\n", 1)[0])
            return None
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient

    def _ask_for_room(self) -> None:  # needs a GPU
        """Fail here, and not in what runs beside it, if a recording has left too little."""
        free, total = torch.cuda.mem_get_info()
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
        free = min(free, int(share * total) - torch.cuda.memory_reserved())
        most = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        needed = room_beside(self._held, most, shapes=len(self._seen))
        if free < needed:
            raise RuntimeError(
                f"recorded steps hold {format_bytes(self._held)} and leave "
                f"{format_bytes(max(0, free))}, {format_bytes(needed)} are needed beside them."
            )

    def _replay(self, recorded: _Recorded, inputs: Inputs, items: Tensor) -> Tensor:  # needs a GPU
        """Replay on a batch, and leave its gradients where autograd would."""
        self._keep_sums(recorded)
        for name, own in recorded.inputs.items():
            if isinstance(own, Tensor):
                own.copy_(inputs[name], non_blocking=True)
        recorded.items.copy_(items)
        recorded.graph.replay()
        sums, new = [], []
        for parameter, gradient in zip(self._parameters, recorded.gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                sums.append(parameter.grad)
                new.append(gradient)
        if sums:
            torch._foreach_add_(sums, new)
        return recorded.loss.clone()

    def _keep_sums(self, recorded: _Recorded) -> None:  # needs a GPU
        """Move sums out of the memory that the replay is about to write."""
        if all(parameter.grad is None for parameter in self._parameters):
            return  # the first batch of an update: most steps
        theirs = {
            g.data_ptr() for r in self._recorded.values() for g in r.gradients if g is not None
        }
        theirs.update(g.data_ptr() for g in recorded.gradients if g is not None)
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.data_ptr() in theirs:
                parameter.grad = parameter.grad.clone()


def room_beside(held: int, most: int, *, shapes: int) -> int:
    """What has to be free beside recorded steps.

    Args:
        held: bytes that they hold.
        most: bytes that steps without a graph have taken so far.
        shapes: of batches that have come so far.

    Returns:
        Bytes: half of what is held, for evaluations, which keep nothing; where other shapes come,
        what the largest of them takes.

    Example:
        >>> room_beside(1000, 1500, shapes=1), room_beside(1000, 1500, shapes=2)
        (500, 1500)
    """
    return max(held, most) if shapes > 1 else held // 2


def _ask_for_as_much(gradients: list[Tensor | None]) -> None:  # needs a GPU
    """Fail here, and not in the optimizer, if the graph has left no room for an update."""
    present = [gradient for gradient in gradients if gradient is not None]
    if present:
        size = sum(gradient.nbytes for gradient in present)
        torch.empty(2 * size, dtype=torch.uint8, device=present[0].device)


def _key(inputs: Inputs) -> tuple[object, ...]:
    """What a recording depends on: shapes and dtypes of tensors, values of all else."""
    parts: list[object] = []
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, Tensor):
            parts.append((name, tuple(value.shape), value.dtype, value.device.type))
        else:
            parts.append((name, repr(value)))
    return tuple(parts)
