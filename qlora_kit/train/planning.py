"""The plan of a run: made before its model is loaded, applied, and held to what was measured.

A plan is made for a causal model on a GPU. It is for the largest batch that the data can make:
its longest row, padded as the collator pads it, in every row of the batch. Where activations
are left open it chooses them, and the layers whose weights stay decoded; where nothing fits it
says so and what would.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.registry import OTHERS
from qlora_kit.core.errors import ConfigError
from qlora_kit.core.log import logger
from qlora_kit.core.units import GIB, format_bytes, parse_bytes
from qlora_kit.plan.budget import Budget, needed_bytes, step_bytes
from qlora_kit.plan.gpus import DEFAULT, Gpu, find_gpu, this_gpu, this_machine
from qlora_kit.plan.nearest import nearest
from qlora_kit.plan.plan import AUTO, describe
from qlora_kit.plan.predict import CONTEXT, Prediction
from qlora_kit.plan.search import Planner
from qlora_kit.plan.setup import FULL, Setup
from qlora_kit.plan.table import memory_table, nearest_table, pinning_text, run_text
from qlora_kit.train.arguments import is_on_gpu
from qlora_kit.train.config import RunConfig
from qlora_kit.train.data.tokenized import TokenizedSet

HOST_SHARE = 0.8
"""Of the free host memory, what may be pinned."""
_WORTH_SAYING_S = 1.0
"""Seconds that a first step takes besides."""
_LESS = 0.1
"""Of a step's own memory, what settings have to do without after it has run out."""


def setup_of(config: RunConfig, *, batch: int, seq: int, varied: bool = False) -> Setup:
    """What of a run its memory and speed depend on.

    Args:
        config: the run.
        batch: rows of its largest batch.
        seq: tokens of each.
        varied: whether other batches have another shape.

    Returns:
        The setup; activations may be `auto`.

    Raises:
        ConfigError: the run is none that there can be.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
        >>> setup_of(run, batch=8, seq=1024).activations
        'auto'
    """
    train, model = config.train, config.model
    full = config.method == FULL
    activations = train.activations
    if activations == AUTO and train.gradient_checkpointing:
        activations = "recompute_all"
    fused = train.step in ("auto", "fused")
    return Setup(
        method=config.method,
        bits=model.bits,
        rank=config.adapter.rank,
        shape=None if full else config.adapter,
        own=_own_settings(config),
        mixed=config.full.dtype == "float32",
        quant=config.base_quant or config.quant,
        batch=batch,
        seq=seq,
        activations=activations,
        keep_decoded=(train.keep_decoded or 0) if fused and model.bits == 4 else 0,
        tile=train.tile,
        embeddings_on_host=model.embeddings_on_host,
        optimizer=train.optimizer,
        step="fused" if fused else "eager",
        dtype="bfloat16" if model.dtype == "auto" else model.dtype,
        accumulation=train.gradient_accumulation,
        varied=varied,
    )


def _own_settings(config: RunConfig) -> Method | RankBudget | None:
    """The section of a run that its method has beside or instead of LoRA's settings."""
    kind = RankBudget if config.method == "adalora" else OTHERS.get(config.method)
    return next((one for one in config.settings if type(one) is kind), None)


def largest_batch(config: RunConfig, lengths: Sequence[int], multiple: int) -> tuple[int, int]:
    """The largest batch that rows can make.

    Args:
        config: the run.
        lengths: tokens of each training row.
        multiple: of which widths are padded to one.

    Returns:
        rows: of the batch.
        width: tokens of the longest row, padded.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
        >>> largest_batch(run, [3, 11], 8)
        (2, 16)
    """
    rows = max(1, min(config.train.batch_size, len(lengths)))
    return rows, -(-max(lengths, default=1) // multiple) * multiple


def is_varied(config: RunConfig, lengths: Sequence[int], multiple: int) -> bool:
    """Whether batches differ in shape.

    Args:
        config: the run.
        lengths: tokens of each training row.
        multiple: of which widths are padded to one.

    Returns:
        False if all rows have one padded width and divide into batches.

    Example:
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
        >>> is_varied(run, [9, 16] * 4, 8), is_varied(run, [9, 16] * 5, 8)
        (False, True)
    """
    widths = {-(-length // multiple) for length in lengths}
    return len(widths) > 1 or len(lengths) % config.train.batch_size != 0


def bounded_evaluation(
    config: RunConfig, held_out: Iterable[TokenizedSet], most_tokens: int
) -> RunConfig:
    """A run whose evaluation batches are no larger than its training batches.

    Args:
        config: the run.
        held_out: rows that are evaluated while it trains.
        most_tokens: of the largest training batch.

    Returns:
        The run, `eval.batch_size` lowered where the longest held-out row asks for it.

    Example:
        >>> from types import SimpleNamespace
        >>> from qlora_kit.train.config import DataConfig, ModelConfig
        >>> run = RunConfig(model=ModelConfig(path="m"), data=DataConfig(train="t.jsonl"))
        >>> bounded_evaluation(run, [SimpleNamespace(lengths=[100])], 800).eval.batch_size
        8
    """
    longest = max((max(data.lengths, default=1) for data in held_out), default=1)
    rows = min(config.eval.batch_size, max(1, most_tokens // longest))
    return replace(config, eval=replace(config.eval, batch_size=rows))


def gpu_of(config: RunConfig) -> Gpu | None:
    """The GPU that a run is planned for.

    Args:
        config: the run.

    Returns:
        The kind, with its host's speed measured; None where a run is not planned: without a GPU,
        a classifier, `plan: off`.
    """
    if config.plan == "off" or config.model.task != "causal_lm" or config.model.device == "cpu":
        return None
    return this_machine()


def budget_of(config: RunConfig, gpu: Gpu) -> Budget:
    """What a run may take.

    Args:
        config: the run.
        gpu: it is on.

    Returns:
        The budget; `auto` is what is free now.

    Raises:
        ConfigError: the budget is no size.
    """
    host = int(HOST_SHARE * psutil.virtual_memory().available)
    if config.budget != AUTO:
        return Budget.of(config.budget, gpu, host)
    free = _free_bytes() if torch.cuda.is_available() else gpu.memory_bytes
    return Budget.of(min(free, gpu.memory_bytes), gpu, host)


def _free_bytes() -> int:  # needs a GPU
    """Of the GPU for this process, with what its own context takes already."""
    free, total = torch.cuda.mem_get_info()
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)()
    return min(int(free) + CONTEXT, int(total * share) + CONTEXT)


def enforce(config: RunConfig) -> None:
    """Let torch take no more of the GPU than a budget that was given, plan or no plan.

    Args:
        config: the run; without a budget, or on a CPU, nothing changes.

    Raises:
        ConfigError: the budget is no size.
    """
    if config.budget != AUTO and is_on_gpu(config.model.device):
        _limit(parse_bytes(config.budget))


def _limit(size: int) -> None:  # needs a GPU
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (size - CONTEXT) / total)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What was decided before a run, and what is needed to judge it afterwards."""

    planner: Planner
    predicted: Prediction
    """Of the largest batch."""

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of allocated memory."""
        return self.predicted.peak_bytes

    @property
    def line(self) -> str:
        """For the start of a run."""
        made = self.predicted
        size = f"{format_bytes(made.peak_bytes)} at the peak"
        needed = f"{format_bytes(needed_bytes(made))} of {format_bytes(self.budget_bytes)} needed"
        words = [made.setup.activations if made.fused else "the model's own layers"]
        if made.setup.keep_decoded:
            words.append(f"{made.setup.keep_decoded} layers decoded")
        line = f"{', '.join(words)}: {size}, {needed}; about {made.tokens_per_s:,.0f} tokens/s"
        return f"{line}; {pinning_text(made)}" if made.pinning_s >= _WORTH_SAYING_S else line

    @property
    def budget_bytes(self) -> int:
        """What the run may take of the GPU."""
        return self.planner.budget.gpu_bytes

    def apply(self, config: RunConfig) -> RunConfig:
        """Put what was chosen into a run.

        Args:
            config: the run.

        Returns:
            The run, with nothing left open that the plan decided.
        """
        train, setup = config.train, self.predicted.setup
        if train.activations != AUTO or train.gradient_checkpointing:
            return config
        if not self.predicted.fused:  # there is one thing to choose in a model's own code
            again = setup.activations == "recompute_all"
            return replace(config, train=replace(train, gradient_checkpointing=again))
        chosen = replace(train, activations=setup.activations, keep_decoded=setup.keep_decoded)
        return replace(config, train=chosen)

    def judge(self, measured_bytes: int, widest: tuple[int, int] | None = None) -> dict[str, Any]:
        """Hold the prediction to a measurement.

        Args:
            measured_bytes: peak that torch counted while training.
            widest: rows and tokens of the largest batch that came, if it was not the one
                planned for: that one is predicted then.

        Returns:
            Plain values for the record: `predicted_gib`, `measured_gib`, `difference` (a share
            of the measured), `predicted`, `budget_gib`.
        """
        made = self.predicted
        if widest is not None and widest != (made.setup.batch, made.setup.seq):
            made = self.planner.predict(made.setup.with_tokens(batch=widest[0], seq=widest[1]))
        return {
            "predicted_gib": round(made.peak_bytes / GIB, 3),
            "measured_gib": round(measured_bytes / GIB, 3),
            "difference": round(made.peak_bytes / max(1, measured_bytes) - 1, 4),
            "budget_gib": round(self.budget_bytes / GIB, 3),
            "predicted": describe(made),
        }


def plan_run(
    config: RunConfig,
    model: PreTrainedConfig,
    lengths: Sequence[int],
    gpu: Gpu,
    *,
    multiple: int = 8,
) -> RunPlan | None:
    """Plan a run before its model is loaded.

    Args:
        config: the run.
        model: configuration of its model.
        lengths: tokens of each training row.
        gpu: it is on.
        multiple: of which widths are padded to one.

    Returns:
        The plan; None where this model cannot be planned, which is logged.

    Raises:
        ConfigError: nothing fits; the message has the table and what would.
    """
    batch, seq = largest_batch(config, lengths, multiple)
    planner = Planner(model, gpu, budget_of(config, gpu))
    try:
        varied = is_varied(config, lengths, multiple)
        setup = setup_of(config, batch=batch, seq=seq, varied=varied)
        made = _settle(planner, setup, decoded=config.train.keep_decoded is None)
    except ConfigError as error:  # the run itself says what is wrong, if something is
        logger.info("training without a plan: %s", error)
        return None
    if made.peak_bytes + made.outside > planner.budget.gpu_bytes:
        raise ConfigError(_refusal(planner, made))
    if not planner.budget.fits(made):
        logger.warning(
            "memory will be tight: %s of %s needed, the margin included.",
            format_bytes(needed_bytes(made)),
            format_bytes(planner.budget.gpu_bytes),
        )
    return RunPlan(planner=planner, predicted=made)


def _settle(planner: Planner, setup: Setup, *, decoded: bool) -> Prediction:
    if setup.activations != AUTO:
        return planner.predict(setup)
    setup = replace(setup, activations="save")
    found = planner.fastest(setup, decoded=decoded)
    return found or planner.predict(planner.thriftiest(setup))


def _refusal(planner: Planner, made: Prediction) -> str:
    size = format_bytes(planner.budget.gpu_bytes)
    parts = [
        f"this run does not fit into {size} of GPU memory: {run_text(made.setup)}",
        memory_table(made, planner.budget),
        nearest_table(made, nearest(planner, made.setup), planner.budget),
        "plan=off runs it all the same.",
    ]
    return "\n\n".join(parts)


def advice(
    config: RunConfig, model: PreTrainedConfig, lengths: Sequence[int], *, multiple: int = 8
) -> str | None:
    """What to say when a training ran out of memory.

    Args:
        config: the run, as it ran.
        model: configuration of its model.
        lengths: tokens of each training row.
        multiple: of which widths are padded to one.

    Returns:
        The plan's table and the nearest settings whose step needs at least a tenth less than
        was predicted for this one; None where it cannot be planned.
    """
    if config.model.task != "causal_lm":
        return None
    gpu = (this_gpu() if config.model.device != "cpu" else None) or find_gpu(DEFAULT)
    batch, seq = largest_batch(config, lengths, multiple)
    try:
        varied = is_varied(config, lengths, multiple)
        setup = setup_of(config, batch=batch, seq=seq, varied=varied)
        if setup.activations == AUTO:
            setup = replace(setup, activations="recompute_elementwise")
        made = Planner(model, gpu, Budget.of(AUTO, gpu)).predict(setup)
        most = min(needed_bytes(made) - int(_LESS * step_bytes(made)), gpu.memory_bytes)
        if config.budget != AUTO:
            most = min(most, parse_bytes(config.budget))
        planner = Planner(model, gpu, Budget(gpu_bytes=most))
        found = nearest(planner, setup)
    except ConfigError as error:
        logger.info("no plan: %s", error)
        return None
    return f"{memory_table(made)}\n\n{nearest_table(made, found, planner.budget)}"
