"""What is trained in a benchmark, the same for every library that trains it.

A process is told in a `Job` what to build once (`Build`) and which `Point`s to measure
on it. A library's part is one function from a `Build` to a `Subject`: its model, one
function that gives the loss of a batch, and the parameters and optimizer of the update.
Everything that is timed, counted and recorded happens outside of it, in one place.

Jobs travel as JSON. This module imports torch only, and the model libraries nowhere:
Unsloth has to be imported before transformers.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

Batch = dict[str, Any]
"""`input_ids` and `labels`, (B, T) int64 tensors, and what else a model takes."""

MAX_GRAD_NORM = 0.3
"""Gradients are clipped to this, as `qlora-kit train` does."""

STAGE_MARK = "·"
"""Starts the lines of a process that its parent shows."""


BUILDS, MEASURES = "build", "point"
"""Stages that say what a process is about to do."""


class NotPossible(Exception):  # noqa: N818  a fact, not a failure
    """This library cannot do what the point asks for; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a process builds once."""

    impl: str
    """`qlora_kit`, `full`, `peft`, `peft_liger` or `unsloth`."""
    variant: str = ""
    """Switches of the library, joined by `+`: see its module in bench/peers."""
    model: str
    """Name of the shape, for the record."""
    checkpoint: str
    """Folder with the weights and a tokenizer, or what `qlora_kit.load` takes; empty for random
    weights made where they run, which ours can do without."""
    method: str = "lora"
    """`lora` or `lora_fa`, of which peers know the first only, or `full`."""
    bits: int = 4
    """Of the frozen linears: 4 for NF4, 16 for `dtype`. A checkpoint may say otherwise."""
    rank: int = 16
    """Of every adapted linear."""
    checkpointing: bool = True
    """Peers: recompute activations in the backward. Ours: the point's policy says."""
    longest: int = 2048
    """Tokens per row of the longest point."""
    optimizer: str = "adamw_8bit"
    """A Transformers name: `adamw_8bit`, `paged_adamw_8bit`, `adamw_torch`, `adamw_torch_fused`."""
    learning_rate: float = 1e-4
    """Constant."""
    adapter: str | None = None
    """Folder of an adapter in PEFT's format to start from; None for a new one."""
    masters: str = "library"
    """Trained weights: `library` for the peer's fastest choice (full fine-tuning: `dtype`), or
    `float32`."""
    step: str = "auto"
    """Ours: `fused`, `eager`, or `auto` for fused where this version has it."""
    embeddings_on_host: bool = False
    """Ours: whether rows of the embeddings are looked up in host memory."""
    deterministic: bool = False
    """Ours: `train.deterministic`, gradients with the same bits in every run."""
    seed: int = 0
    """Of a new adapter and of the tokens."""
    device: str = "cuda"
    """`cuda` or `cpu`."""
    dtype: str = "bfloat16"
    """Of the computation."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def switches(self) -> frozenset[str]:
        """The parts of `variant`."""
        return frozenset(filter(None, self.variant.split("+")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement."""

    batch: int
    """Rows per step."""
    seq: int
    """Tokens per row."""
    policy: str
    """What becomes of activations; a peer's is `recompute_all`, `save` or its own word."""
    head: str = "chunked"
    """Full fine-tuning: the loss from `chunked` logits, or `stock`, as the model's own code."""
    graph: bool = True
    """Ours: small batches as a CUDA graph, as the Trainer runs them; it reserves memory."""
    tile: int | Literal["auto"] | None = "auto"
    """Ours: tokens at a time where each is alone, `auto`, or None for all."""
    keep_decoded: int = 0
    """Ours: layers, from the first on, whose weights stay decoded from step to step."""
    cap_gib: float | None = None
    """GPU memory torch may take; None for all of it."""
    warmup: int | None = None
    """Steps before the timed ones; None for the job's."""
    steps: int | None = None
    """Timed steps; None for the job's."""
    profile: bool = False
    """Also say which kernels the time goes to, as the job may for all its points."""
    cases: tuple[str, ...] = ()
    """Cases of the table it belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything one process needs to know."""

    build: Build
    points: tuple[Point, ...]
    warmup: int = 3
    """Steps before the timed ones."""
    steps: int = 6
    """Timed steps."""
    profile: bool = False
    """Also say which kernels the time goes to."""
    trainer: bool = False
    """Also time the same steps inside `transformers.Trainer` (ours only)."""
    rows_file: str = ""
    """Where rows are written, one JSON object a line."""

    def to_json(self) -> str:
        """This job as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Job":
        """The job that `to_json` wrote."""
        values = json.loads(text)
        values["build"] = Build(**values["build"])
        points = [point | {"cases": tuple(point["cases"])} for point in values["points"]]
        values["points"] = tuple(Point(**point) for point in points)
        return Job(**values)


def write_jobs(file: Path, jobs: Sequence[Job]) -> None:
    """Write jobs to a file, one a line.

    Args:
        file: replaced if it is there.
        jobs: for one process.
    """
    file.write_text("".join(job.to_json() + "\n" for job in jobs), encoding="utf-8")


def read_jobs(file: Path) -> list[Job]:
    """The jobs that `write_jobs` wrote.

    Args:
        file: of lines of JSON.

    Returns:
        Jobs, in their order.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Job.from_json(line) for line in lines if line.strip()]


def _always(_point: Point) -> AbstractContextManager[str]:
    """A peer is built for its policy; there is nothing to switch."""
    return nullcontext("library")


@dataclass(slots=True, kw_only=True)
class Subject:
    """A model ready to be trained."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    """Mean loss of a batch, () with a gradient."""
    parameters: list[nn.Parameter]
    """Those that are trained."""
    optimizer: torch.optim.Optimizer
    prepare: Callable[[Point], AbstractContextManager[str]] = field(default=_always)
    """Sets up a point's policy for as long as the context lasts; gives the name of the step."""
    backward: Callable[[Batch], Tensor] | None = None
    """Loss, detached, after its gradients were added; where that is not `loss` and autograd."""
    facts: Callable[[], dict[str, object]] | None = None
    """What a row should say of the steps that ran."""
    clip: Callable[[], object] | None = None
    """Clips the gradients, where the optimizer knows a better way than torch's."""
    trainer: Callable[[Point, str, int], list[float]] | None = None
    """Milliseconds of so many steps of a kind inside the library's own training loop."""
    save: Callable[[Path], None] | None = None
    """Writes the adapter in PEFT's format."""
    _zero: list[nn.Parameter] | None = None

    def restart(self) -> None:
        """Let the adapter change nothing again: what was zero at the first call is zero anew."""
        if self._zero is None:
            self._zero = [p for p in self.parameters if not p.detach().any()]
        for parameter in self._zero:
            parameter.detach().zero_()

    def step(self, batch: Batch) -> Tensor:
        """One training step; its loss, detached."""
        if self.backward is not None:
            loss = self.backward(batch)
        else:
            loss = self.loss(batch)
            loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        """Clip the gradients, step the optimizer, drop the gradients."""
        if self.clip is None:
            nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        else:
            self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Stage:
    """Says when each stage of this process ends, in seconds since it was started."""

    def __init__(self) -> None:
        """Remember when the process was created, imports included."""
        self._created = psutil.Process().create_time()
        self.seconds: dict[str, float] = {}
        """Stage to seconds since the process was created."""

    def __call__(self, name: str, note: str = "") -> float:
        """Print that a stage has ended; the seconds since the process was created."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.time() - self._created
        self.seconds[name] = now
        print(f"{STAGE_MARK} {now:6.1f} s  {name}{'  ' + note if note else ''}", flush=True)
        return now


def make_optimizer(name: str, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """An optimizer that steps one tensor at a time, by its Transformers name.

    Args:
        name: `adamw_torch`, `adamw_torch_fused`, `adamw_8bit` or `paged_adamw_8bit`.
        parameters: to train.
        rate: learning rate.

    Returns:
        The optimizer, without weight decay; 8-bit ones come from bitsandbytes.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> make_optimizer("adamw_torch_fused", [weight], 0.1).defaults["fused"]
        True
    """
    if name in ("adamw_torch", "adamw_torch_fused"):
        fused = True if name.endswith("fused") else None
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=fused)
    import bitsandbytes

    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    made: torch.optim.Optimizer = classes[name](parameters, lr=rate, weight_decay=0.0)
    return made


def first_fields(build: Build, point: Point) -> dict[str, object]:
    """What a row says of the question, before there is an answer.

    Args:
        build: of its process.
        point: that it measures.

    Returns:
        The fields that every row begins with.

    Example:
        >>> build = Build(impl="full", model="tiny", checkpoint="", method="full")
        >>> first_fields(build, Point(batch=1, seq=8, policy="save"))["oom"]
        False
    """
    return {
        "impl": build.impl,
        "variant": build.variant,
        "model": build.model,
        "batch": point.batch,
        "seq": point.seq,
        "method": build.method,
        "rank": build.rank,
        "policy": point.policy,
        "bits": build.bits,
        "masters": build.masters,
        "head": point.head,
        "graphs": point.graph,
        "tile": point.tile,
        "keep_decoded": point.keep_decoded,
        "embeddings_on_host": build.embeddings_on_host,
        "deterministic": build.deterministic,
        "optimizer": build.optimizer,
        "cap_gib": point.cap_gib,
        "cases": list(point.cases),
        "oom": False,
    }


def write_row(file: str | Path, row: dict[str, object]) -> None:
    """Append one row to a file of JSON lines, so that a killed process loses none."""
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
