"""Full fine-tuning, what every method is compared with: all weights of a Hugging Face model.

As fast and as lean as it gets without another library, so that the comparison is fair: SDPA
attention, torch's fused AdamW, non-reentrant checkpointing or none. Two kinds of weights:

    float32 masters    autocast to bf16, AdamW's state and the gradients in float32: 16 bytes
                       per parameter, the mixed precision that is called full fine-tuning
    all in bf16        weights, gradients and AdamW's state: 8 bytes per parameter, and updates
                       below a 256th of a weight are lost to rounding

and two loss heads: `stock`, where the model returns all logits and takes their loss, and
`chunked`, ours (`step/loss.py`). What is compared with is the better of both.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit.bench.layers import own_layers
from qlora_kit.bench.random_model import random_model
from qlora_kit.bench.shapes import config_of
from qlora_kit.bench.subject import Batch, Build, NotPossible, Point, Stage, Subject, make_optimizer
from qlora_kit.step.loss import causal_lm_loss

HEADS = ("chunked", "stock")
"""Ways to the loss."""


def environment(_build: Build) -> dict[str, str]:
    """Variables that have to be set before the process starts."""
    return {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class _Run:
    """The loss of a model under the precision of a build and the head of the moment."""

    def __init__(self, model: PreTrainedModel, build: Build) -> None:
        self.model, self.head = model, HEADS[0]
        self._device = build.device
        self._compute: torch.dtype | None = None
        if build.masters == "float32" and build.dtype != "float32":
            self._compute = build.torch_dtype

    @contextmanager
    def prepare(self, point: Point) -> Iterator[str]:
        """Sets up a point's policy and head; the step is always the model's own code."""
        if point.head not in HEADS:
            raise NotPossible(f"there is no loss head {point.head}; known: {', '.join(HEADS)}")
        self.head = point.head
        with own_layers(self.model, point.policy):
            yield "eager"

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        cast: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._compute is not None:
            cast = torch.autocast(self._device, self._compute)
        with cast:
            if self.head == "chunked":
                inputs: Batch = {**batch, "use_cache": False}
                return causal_lm_loss(self.model, inputs)
            found: Tensor = self.model(**batch, use_cache=False).loss
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
    )


def _weights(build: Build, dtype: torch.dtype) -> PreTrainedModel:
    if not build.checkpoint:
        return random_model(config_of(build.model), None, device=build.device, dtype=dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        build.checkpoint, dtype=dtype, device_map={"": build.device}, attn_implementation="sdpa"
    )
    return model
