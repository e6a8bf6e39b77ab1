"""Plans as text of at most 80 columns.

The first table adds up: components at the moment of the step's peak, then what torch and CUDA
hold besides, then the margin, give what is compared with the budget.
"""

import textwrap
from collections.abc import Mapping, Sequence

from qlora_kit.core.units import GIB, format_bytes
from qlora_kit.plan.budget import Budget, graph_bytes, margin_bytes, needed_bytes
from qlora_kit.plan.changes import changes, speed_change
from qlora_kit.plan.plan import Plan, Sizes
from qlora_kit.plan.predict import Prediction
from qlora_kit.plan.setup import Setup

WIDTH = 80
"""Columns."""
NAMES = (
    "weights",
    "scales",
    "embeddings",
    "head",
    "norms",
    "adapters",
    "optimizer",
    "importance scores",
    "gradients",
    "saved activations",
    "working set",
    "decoded weights",
    "kernel workspace",
    "loss chunk",
    "libraries",
)
"""Components in the order of the table; others follow."""
SAID = {
    "working set": "working set, recomputation included",
    "libraries": "libraries: cuBLAS, cuDNN",
}
"""What the table calls components whose names alone say too little."""
_LABEL = 42
_VALUE = 12
_SHORT, _CELL = 28, 24


def render(made: Plan) -> str:
    """Write a plan.

    Args:
        made: the plan.

    Returns:
        Lines of at most 80 columns, without a line break at the end.
    """
    parts = [_title(made), memory_table(made.run, made.budget)]
    if made.policies:
        parts.append(_policies(made))
    if made.sizes:
        parts.append(_sizes(made))
    parts.append(_fastest(made))
    if made.nearest:
        parts.append(nearest_table(made.run, made.nearest, made.budget))
    notes = list(made.run.notes)
    if not made.gpu.measured:
        notes.append(f"speeds of the {made.gpu.name} are estimates from its data sheet")
    if not made.gpu.host_measured:
        notes.append(f"host: assumed, {made.gpu.host_us:g} µs for a small op; `train` measures it")
    if not made.run.fused and made.run.setup.step != "eager":
        notes.append("this model's layers are not fused: its own code was planned")
    parts += [f"note: {note}" for note in notes]
    return "\n\n".join(parts)


def run_text(setup: Setup) -> str:
    """A run in one line.

    Args:
        setup: of the run.

    Returns:
        Method, batch, policy.

    Example:
        >>> run_text(Setup(batch=4))
        'lora r 16 on 4 bits, 4 x 2,048 tokens, adamw_8bit, recompute_elementwise'
    """
    lora = setup.lora
    method = setup.method if lora is None else f"{setup.method} r {lora.rank}"
    rows = f"{setup.batch} x {setup.seq:,} tokens"
    if setup.accumulation > 1:
        rows += f" x {setup.accumulation}"
    words = f"{method} on {setup.bits} bits, {rows}, {setup.optimizer}, {setup.activations}"
    return f"{words}, {setup.keep_decoded} layers decoded" if setup.keep_decoded else words


def memory_table(made: Prediction, budget: Budget | None = None) -> str:
    """Named components of a prediction, adding up to what has to be free.

    Args:
        made: the prediction.
        budget: to compare with, or None.

    Returns:
        Lines.
    """
    names = [name for name in NAMES if name in made.components]
    names += [name for name in made.components if name not in NAMES]
    lines = ["memory at the peak of a step"]
    lines += [_size(f"  {SAID.get(name, name)}", made.components[name]) for name in names]
    lines.append(_size("peak allocated", made.peak_bytes))
    lines.append(_size("  fragmentation", made.reserved_bytes - made.peak_bytes))
    if graph_bytes(made):
        lines.append(_size("  CUDA graphs' own memory", graph_bytes(made)))
    lines.append(_size("  CUDA context", made.outside))
    lines.append(_size("  margin", margin_bytes(made)))
    total = _size("needed on the GPU", needed_bytes(made))
    if budget is not None:
        total += f"   {_verdict(made, budget)}"
    lines.append(total)
    for name, size in made.host.items():
        lines.append(_size(f"  host memory: {name}", size))
    if made.pinning_s:
        lines.append(f"  {pinning_text(made)}")
    return "\n".join(lines)


def pinning_text(made: Prediction) -> str:
    """What the first step takes besides.

    Args:
        made: a prediction whose layers' tensors wait on the host.

    Returns:
        A few words.
    """
    pinned = format_bytes(made.host["checkpoints"])
    return f"first step +{made.pinning_s:.2g} s: pinning {pinned} of host memory"


def _verdict(made: Prediction, budget: Budget) -> str:
    free = budget.gpu_bytes - needed_bytes(made)
    if free < 0:
        return f"too much by {format_bytes(-free)}"
    if not budget.fits(made):
        return "fits; host memory does not"
    return f"fits, {format_bytes(free)} free"


def _size(label: str, size: int) -> str:
    return f"{label:<{_LABEL}}{format_bytes(size):>{_VALUE}}"


def _title(made: Plan) -> str:
    trained = f"{made.run.trained:,} trained parameters"
    budget = f"budget {format_bytes(made.budget.gpu_bytes)}"
    first = f"{_shorten(made.model, 36)} on {_shorten(made.gpu.name, 24)}, {budget}"
    run = textwrap.wrap(f"{run_text(made.run.setup)}, {trained}", WIDTH, break_on_hyphens=False)
    return "\n".join([first, *run])


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else "…" + text[1 - limit :]


def _policies(made: Plan) -> str:
    lines = [f"{'activations':<{_LABEL}}{'needed':>{_VALUE}}{'tokens/s':>12}"]
    for one in made.policies:
        name = one.setup.activations
        if one.setup.keep_decoded:
            name += ", all decoded"
        mark = "" if made.budget.fits(one) else "  no"
        size = format_bytes(needed_bytes(one))
        lines.append(f"  {name:<{_LABEL - 2}}{size:>{_VALUE}}{one.tokens_per_s:>12,.0f}{mark}")
    return "\n".join(lines)


def _sizes(made: Plan) -> str:
    heads = [_shorten(one.policy, _CELL - 2) for one in made.sizes]
    lines = [f"{'what fits':<{_SHORT}}" + "".join(f"{head:>{_CELL}}" for head in heads)]
    seq = f"{made.run.setup.seq:,}"
    lines.append(_row(f"  largest batch at {seq}", made.sizes, "batch"))
    lines.append(_row("  longest row alone", made.sizes, "seq"))
    return "\n".join(lines)


def _row(label: str, sizes: Sequence[Sizes], name: str) -> str:
    cells = ""
    for one in sizes:
        value: int = getattr(one, name)
        more = getattr(one, f"more_{name}") and value
        cells += f"{f'{value:,}' + (' or more' if more else ''):>{_CELL}}"
    return f"{label:<{_SHORT}}{cells}"


def _fastest(made: Plan) -> str:
    best = made.fastest
    if best is None:
        return "nothing fits this budget at this batch and sequence"
    lines = [f"fastest that fits: {best.tokens_per_s:,.0f} tokens/s"]
    lines[0] += f", {format_bytes(needed_bytes(best))}, limited by {_LIMITS[best.limited_by]}"
    found = changes(made.run.setup, best.setup)
    lines += fields_text(found) if found else ["  this run"]
    return "\n".join(lines)


_LIMITS = {"compute": "the GPU", "host": "Python's launches", "link": "copies to the host"}


def fields_text(found: Mapping[str, str]) -> list[str]:
    """Changed fields as flags, a few on a line.

    Args:
        found: dotted field to value.

    Returns:
        Indented lines.

    Example:
        >>> fields_text({"train.batch_size": "2", "train.activations": "save"})
        ['  --train.batch_size 2 --train.activations save']
    """
    lines = [" "]
    for key, value in found.items():
        word = f" --{key} {value}"
        if len(lines[-1]) + len(word) > WIDTH and lines[-1].strip():
            lines.append(" ")
        lines[-1] += word
    return lines


def nearest_table(run: Prediction, found: Sequence[Prediction], budget: Budget) -> str:
    """Changes that make a run fit.

    Args:
        run: as it is.
        found: changed runs; beside their speed is what that is more or less than the run's own.
        budget: that they fit.

    Returns:
        Lines; a sentence where there is none.
    """
    size = format_bytes(budget.gpu_bytes)
    if not found:
        return f"nothing near fits {size}: a smaller model, or a larger card"
    lines = [f"nearest settings that fit {size}"]
    for one in found:
        lines += fields_text(changes(run.setup, one.setup))
        speed = f"{one.tokens_per_s:,.0f} tokens/s ({speed_change(run, one):+.0%})"
        lines.append(f"    {format_bytes(needed_bytes(one))}, {speed}")
    return "\n".join(lines)


def methods_table(found: Mapping[str, Prediction], model: str, budget: Budget) -> str:
    """Methods side by side.

    Args:
        found: name to prediction; the first is what others are compared with.
        model: its name.
        budget: that they fit or not.

    Returns:
        Lines of at most 80 columns.
    """
    label, cell = 24, 11
    made = list(found.values())
    first = made[0]

    def row(name: str, cells: Sequence[str]) -> str:
        return f"{name:<{label}}" + "".join(f"{text:>{cell}}" for text in cells)

    def gib(size: int) -> str:
        return f"{size / GIB:.2f}" if size else "-"

    names = [n for n in NAMES if any(n in one.components for one in made)]
    words = made[-1].setup.activations
    lines = [
        f"{_shorten(model, 36)}, {first.setup.batch} x {first.setup.seq:,} tokens",
        f"adapters: {made[-1].setup.optimizer}, {words}"[:WIDTH],
        f"full: {first.setup.optimizer}, mixed precision, {first.setup.activations}",
        "",
        row("GiB", list(found)),
        row("base, bits", [str(one.setup.bits) for one in made]),
    ]
    lines += [row(f"  {n}", [gib(one.components.get(n, 0)) for one in made]) for n in names]
    lines += [
        row("peak allocated", [gib(one.peak_bytes) for one in made]),
        row("needed on the GPU", [gib(needed_bytes(one)) for one in made]),
        row("below full", [f"{first.peak_bytes / one.peak_bytes:.1f}x" for one in made]),
        row("tokens/s", [f"{one.tokens_per_s:,.0f}" for one in made]),
        row("trained", [_count(one.trained) for one in made]),
        row(
            f"fits {format_bytes(budget.gpu_bytes)}",
            ["yes" if budget.fits(one) else "no" for one in made],
        ),
    ]
    return "\n".join(lines)


def _count(value: int) -> str:
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"
