"""A plan: what a run takes, whether it fits, what else would, and the fastest of it.

`make_plan` asks the planner all there is to ask, for `qlora-kit plan` and `qlora_kit.plan`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.registry import method_name
from qlora_kit.adapters.selective.config import Full
from qlora_kit.plan.budget import Budget, graph_bytes, margin_bytes, needed_bytes
from qlora_kit.plan.changes import FIELDS, changes, speed_change
from qlora_kit.plan.gpus import DEFAULT, Gpu, find_gpu, this_machine
from qlora_kit.plan.nearest import nearest
from qlora_kit.plan.predict import Prediction
from qlora_kit.plan.read import read_config
from qlora_kit.plan.search import MOST_TOKENS, Planner
from qlora_kit.plan.setup import FULL, Setup
from qlora_kit.quant.config import QuantConfig

AUTO = "auto"
"""For activations: whatever is fastest."""
_USUAL = "recompute_elementwise"
"""Activations of a run without a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much fits."""

    policy: str
    """With which activations."""
    batch: int
    """Rows, at the run's sequence."""
    seq: int
    """Tokens of one row alone."""
    more_batch: bool
    """Whether more rows may fit: nothing larger was looked for."""
    more_seq: bool
    """Whether longer rows may fit: this is all the model was made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is known of a run before it runs.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> plan(config, adapter=LoRA(rank=8), seq=128, gpu="l4").fits
        True
    """

    model: str
    gpu: Gpu
    budget: Budget
    run: Prediction
    """As asked; with the fastest activations that fit, or the thriftiest, where that was `auto`."""
    fits: bool
    """Whether the run fits the budget, with the margin."""
    policies: tuple[Prediction, ...] = field(default=())
    """The run with each policy alone."""
    fastest: Prediction | None = None
    """The fastest way to make an update of the same rows; None if nothing fits."""
    sizes: tuple[Sizes, ...] = field(default=())
    """How much fits, as the run is and with the least memory."""
    nearest: tuple[Prediction, ...] = field(default=())
    """Changed runs that fit, if this one does not."""

    def changes(self, other: Prediction) -> dict[str, str]:
        """What to write into the run file for another prediction of this plan.

        Args:
            other: `fastest`, or one of `nearest`.

        Returns:
            Dotted field to value; only what differs.
        """
        return changes(self.run.setup, other.setup)

    def costs(self, other: Prediction) -> float:
        """What those changes do to the speed.

        Args:
            other: `fastest`, or one of `nearest`.

        Returns:
            Share of this run's tokens/s that is lost or, below zero, gained.
        """
        return -speed_change(self.run, other)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON.

        Returns:
            Sizes in bytes, times in seconds.
        """
        return {
            "format": 1,
            "model": self.model,
            "gpu": {"name": self.gpu.name, "memory_bytes": self.gpu.memory_bytes},
            "gpu_measured": self.gpu.measured,
            "host_us_per_op": self.gpu.host_us,
            "host_measured": self.gpu.host_measured,
            "budget_bytes": self.budget.gpu_bytes,
            "host_budget_bytes": self.budget.host_bytes,
            "fits": self.fits,
            "run": describe(self.run),
            "policies": [describe(one) for one in self.policies],
            "fastest": None if self.fastest is None else describe(self.fastest),
            "fastest_changes": {} if self.fastest is None else self.changes(self.fastest),
            "sizes": [asdict(one) for one in self.sizes],
            "nearest": [
                {"changes": self.changes(one), "costs": self.costs(one), **describe(one)}
                for one in self.nearest
            ],
        }

    def __str__(self) -> str:
        """The table, as `qlora-kit plan` prints it."""
        from qlora_kit.plan.table import render

        return render(self)


def describe(made: Prediction) -> dict[str, Any]:
    """A prediction as plain values.

    Args:
        made: any.

    Returns:
        Sizes in bytes.
    """
    setup = made.setup
    run = {name: getattr(setup, name) for name in ("method", "bits", "step", *FIELDS)}
    return {
        "setup": run | {"rank": setup.lora.rank if setup.lora else None},
        "components_bytes": dict(made.components),
        "peak_bytes": made.peak_bytes,
        "fragmentation_bytes": made.reserved_bytes - made.peak_bytes,
        "reserved_bytes": made.reserved_bytes,
        "graphs_bytes": graph_bytes(made),
        "cuda_context_bytes": made.outside,
        "margin_bytes": margin_bytes(made),
        "needed_bytes": needed_bytes(made),
        "host_bytes": dict(made.host),
        "step_s": made.step_s,
        "first_step_besides_s": made.pinning_s,
        "tokens_per_s": made.tokens_per_s,
        "limited_by": made.limited_by,
        "host_us_per_op": made.host_us,
        "fused": made.fused,
        "recorded": made.recorded,
        "trained": made.trained,
        "notes": list(made.notes),
    }


def sizes_of(planner: Planner, setup: Setup) -> Sizes:
    """How much fits of a run.

    Args:
        planner: of the model.
        setup: of the run.

    Returns:
        The largest batch at its sequence, and the longest sequence alone.
    """
    batch, seq = planner.largest_batch(setup), planner.longest(replace(setup, batch=1))
    return Sizes(
        policy=setup.activations,
        batch=batch,
        seq=seq,
        more_batch=batch >= max(setup.batch, MOST_TOKENS // setup.seq, 1),
        more_seq=seq + 64 > max(planner.positions, setup.seq),
    )


def settle(planner: Planner, setup: Setup) -> Prediction:
    """A run with `auto` activations as a run with some: the fastest that fit, or the thriftiest.

    Args:
        planner: of the model.
        setup: of the run; its activations may be `auto`.

    Returns:
        Its prediction.
    """
    if setup.activations != AUTO:
        return planner.predict(setup)
    setup = replace(setup, activations="save")
    return planner.fastest(setup) or planner.predict(planner.thriftiest(setup))


def make_plan(
    planner: Planner, setup: Setup, model: str, *, optimizers: Sequence[str] = ()
) -> Plan:
    """Ask all there is to ask about a run.

    Args:
        planner: of the model.
        setup: of the run; its activations may be `auto`.
        model: its name, for the table.
        optimizers: names that may be used instead of the run's.

    Returns:
        The plan.
    """
    run = settle(planner, setup)
    thrifty = planner.thriftiest(run.setup)
    fits = planner.budget.fits(run)
    alike = replace(run.setup, keep_decoded=0)
    sized = replace(alike, activations=_USUAL) if setup.activations == AUTO else alike
    return Plan(
        model=model,
        gpu=planner.gpu,
        budget=planner.budget,
        run=run,
        fits=fits,
        policies=tuple(planner.predict(kind) for kind in planner.kinds(alike)),
        fastest=planner.fastest_update(run.setup, optimizers=optimizers),
        sizes=tuple(
            sizes_of(planner, one) for one in (sized, *((thrifty,) if thrifty != sized else ()))
        ),
        nearest=() if fits else nearest(planner, run.setup),
    )


def compare_methods(planner: Planner, setup: Setup) -> dict[str, Prediction]:
    """The same batch by every method.

    Args:
        planner: of the model.
        setup: of the run. Its activations, where they are not `auto`, are every method's;
            otherwise adapters recompute elementwise work and full fine-tuning recomputes all.

    Returns:
        Name to prediction; full fine-tuning in mixed precision with AdamW comes first.
    """
    words = _USUAL if setup.activations == AUTO else setup.activations
    made = replace(setup, activations=words, keep_decoded=0)
    plain = replace(made, shape=None if made.shape is None else _plain(made.shape))
    full = replace(
        plain,
        method=FULL,
        bits=16,
        step="eager",
        activations="save" if setup.activations == "save" else "recompute_all",
        optimizer="adamw_torch",
        embeddings_on_host=False,
    )
    return {
        "full": planner.predict(full),
        "LoRA": planner.predict(replace(plain, method="lora", bits=16)),
        "LoRA-FA": planner.predict(replace(plain, method="lora_fa", bits=16)),
        "QLoRA": planner.predict(replace(plain, method="lora", bits=4)),
        "QLoRA-FA": planner.predict(replace(plain, method="lora_fa", bits=4)),
    }


def _plain(shape: LoRA) -> LoRA:
    """An adapter's settings without those that only some methods have."""
    return replace(_as_lora(shape), corrected_gradient=False, rslora=False)


def _as_lora(shape: LoRA) -> LoRA:
    """The settings that all methods like LoRA have."""
    return LoRA(**{one.name: getattr(shape, one.name) for one in fields(LoRA) if one.init})


def plan(
    model: str | Path | PreTrainedConfig | PreTrainedModel,
    *,
    adapter: Method | None = None,
    bits: int = 4,
    quant: QuantConfig | None = None,
    batch: int = 1,
    seq: int = 2048,
    accumulation: int = 1,
    activations: str = AUTO,
    optimizer: str = "adamw_8bit",
    optimizers: Sequence[str] = (),
    budget: str | int = AUTO,
    gpu: str | None = None,
    revision: str | None = None,
) -> Plan:
    """Plan a training run without a GPU and without weights.

    Args:
        model: a configuration or a model, or a folder, a `.gguf` file or a hub id to read a
            configuration from.
        adapter: as for `attach`, of any method; None for LoRA of rank 16 on every linear layer.
            `qk.Full()` needs `bits=16`.
        bits: 4: the base in NF4; 16: as it is.
        quant: how the base is stored in 4 bits.
        batch: rows of a forward pass.
        seq: tokens of a row.
        accumulation: forward passes of an update.
        activations: what layers keep for the backward, see `block/policy.py`; `auto` for the
            fastest that fits.
        optimizer: a Transformers name.
        optimizers: names that the fastest settings may use instead.
        budget: what the run may take of the GPU, such as `44GiB`; `auto`: all of it.
        gpu: a name of `plan/gpus.py`; None for this machine's, or a card of 48 GB without one.
        revision: branch, tag or commit of a hub id.

    Returns:
        The plan; `print` shows its table.

    Raises:
        ConfigError: a name is unknown, or the model cannot be planned.
        SourceError: there is no configuration to read.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> made = plan(config, seq=128, budget="1GiB", gpu="l4")
        >>> made.fits, made.sizes[0].seq
        (True, 2048)
    """
    name = str(model)
    if isinstance(model, PreTrainedModel):
        model = model.config
    if isinstance(model, PreTrainedConfig):
        config, name = model, model.model_type
    else:
        config = read_config(model, revision=revision)
    kind = this_machine() if gpu is None else find_gpu(gpu)
    kind = kind or find_gpu(DEFAULT)
    shape = adapter or LoRA()
    lora = shape if isinstance(shape, LoRA) else None
    setup = Setup(
        method=method_name(shape),
        bits=bits,
        shape=None if lora is None else _as_lora(lora),
        own=lora.budget if isinstance(lora, AdaLoRA) else shape if lora is None else None,
        mixed=not isinstance(shape, Full) or shape.dtype == "float32",
        quant=quant or QuantConfig(),
        batch=batch,
        seq=seq,
        activations=activations,
        accumulation=accumulation,
        optimizer=optimizer,
    )
    planner = Planner(config, kind, Budget.of(budget, kind))
    return make_plan(planner, setup, name, optimizers=optimizers)
