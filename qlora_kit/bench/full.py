"""Full fine-tuning, what every method is compared with: all weights of a Hugging Face model.

As fast and as lean as it gets without another library, so that the comparison is fair: SDPA
attention, torch's fused AdamW, non-reentrant checkpointing or none. Two kinds of weights:

    float32 masters    autocast to bf16, AdamW's state and the gradients in float32: 16 bytes
                       per parameter, the mixed precision that is called full fine-tuning
    all in bf16        weights, gradients and AdamW's state: 8 bytes per parameter, and updates
                       below a 256th of a weight are lost to rounding

and two loss heads: `stock`, where the model returns all logits and takes their loss, and
`chunked`, ours (`step/loss.py`). What is compared with is the better of both.

A small batch can run as a CUDA graph here as well, so that Python slows down neither side: with
our attention then, since transformers' SDPA makes the host wait for the GPU in every forward.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit.bench.layers import KnownPositions, own_layers, without_positions
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.subject import Batch, Build, NotPossible, Point, Stage, Subject, make_optimizer
from qlora_kit.core.allocator import growing_segments
from qlora_kit.ops.attention.transformers_door import register, unpadded_inputs
from qlora_kit.plan.gpus import recorded_here
from qlora_kit.step.graph import StepGraphs
from qlora_kit.step.loss import causal_lm_loss, count_targets

HEADS = ("chunked", "stock")
"""Ways to the loss."""


def environment(_build: Build) -> dict[str, str]:
    """Variables that have to be set before the process starts."""
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return offline | growing_segments()


class _Run:
    """The loss of a model under the precision of a build and the head of the moment."""

    def __init__(self, model: PreTrainedModel, build: Build) -> None:
        self.model, self.head = model, HEADS[0]
        self.graphs: StepGraphs | None = None
        self.replayed = 0
        self._device = build.device
        self._positions = KnownPositions()
        self._compute: torch.dtype | None = None
        if build.masters == "float32" and build.dtype != "float32":
            self._compute = build.torch_dtype

    @contextmanager
    def prepare(self, point: Point) -> Iterator[str]:
        """Sets up a point's policy and head; the layers always run the model's own code."""
        if point.head not in HEADS:
            raise NotPossible(f"there is no loss head {point.head}; known: {', '.join(HEADS)}")
        self.head, self.replayed = point.head, 0
        attention = self.model.config._attn_implementation
        if point.graph:
            self.model.set_attn_implementation(register())
            parameters, most = list(self.model.parameters()), recorded_here(self.model)
            self.graphs = StepGraphs(self._graph_loss, parameters, most_tokens=most)
        try:
            with own_layers(self.model, point.policy):
                yield "eager"
        finally:
            self.graphs = None  # gives the memory of recorded steps back
            self.model.set_attn_implementation(attention)

    def facts(self) -> dict[str, object]:
        """Whether steps were replayed from a CUDA graph."""
        return {"graph": self.replayed > 0}

    def backward(self, batch: Batch) -> Tensor:
        """Loss, detached, its gradients added."""
        if self.graphs is not None:
            batch = self._positions.added(batch) | unpadded_inputs()
            recorded = self.graphs.run(batch, count_targets(batch["labels"]).clamp_min(1))
            if recorded is not None:
                self.replayed += 1
                return recorded
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def _graph_loss(self, inputs: Batch, _items: Tensor) -> Tensor:
        return self.loss(inputs)

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._compute is not None:
            cast = torch.autocast(self._device, self._compute)
        with cast:
            if self.head == "chunked":
                inputs: Batch = {**batch, "use_cache": False}
                return causal_lm_loss(self.model, inputs)
            found: Tensor = self.model(**without_positions(batch), use_cache=False).loss
        return found


def build(build: Build, stage: Stage) -> Subject:
    """Make a model all of whose weights are trained.

    Args:
        build: what to build; `masters` says whether weights are `float32` or in `dtype`.
        stage: told when imports and the making of weights end.

    Returns:
        The subject; `prepare` sets its policy and its loss head.

    Raises:
        NotPossible: another method was asked for.

    Example:
        >>> wanted = Build(impl="full", model="tiny", checkpoint="", method="full", device="cpu",
        ...     masters="float32", optimizer="adamw_torch_fused")
        >>> {p.dtype for p in build(wanted, lambda *_: 0.0).parameters}
        {torch.float32}
    """
    if build.method != "full":
        raise NotPossible(f"this trains all weights, not {build.method}")
    stage("imports")
    dtype = torch.float32 if build.masters == "float32" else build.torch_dtype
    model = _weights(build, dtype)
    stage("loaded")
    model.requires_grad_(True)
    model.train()
    parameters = list(model.parameters())
    stage("attached", f"{sum(p.numel() for p in parameters):,} trained, {parameters[0].dtype}")
    run = _Run(model, build)
    return Subject(
        model=model,
        loss=run.loss,
        parameters=parameters,
        optimizer=make_optimizer(build.optimizer, parameters, build.learning_rate),
        prepare=run.prepare,
        backward=run.backward,
        facts=run.facts,
    )


def _weights(build: Build, dtype: torch.dtype) -> PreTrainedModel:
    if not build.checkpoint:
        return random_model(config_of(build.model), None, device=build.device, dtype=dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        build.checkpoint, dtype=dtype, device_map={"": build.device}, attn_implementation="sdpa"
    )
    return model
