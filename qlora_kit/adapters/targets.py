"""Which modules of a model an adapter goes on: `all-linear`, names, regular expressions.

`all-linear` means the linears inside the model's blocks: below a `ModuleList`, as every
transformers model keeps its layers. Output heads, classification heads, poolers and
embeddings lie outside. A model without any `ModuleList` has all its linears taken but
the heads. Names and `re:` patterns select linears anywhere, and embeddings where the
method can adapt them, by the one rule in `core.patterns`; a pattern that selects nothing
is an error that lists what exists. `layers_to_transform` keeps to some of the blocks.

Modules that are trained whole are chosen here too: what `train_modules` names, the new
head of a sequence classification model, without which nothing could be learned, and
whatever else a loader had to start at random (BERT's pooler, when the checkpoint is a
language model): frozen and not saved, it would be another one at the next load. They
are left out of the low-rank targets.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from qlora_kit.adapters.linears import LINEARS
from qlora_kit.adapters.method import ALL_LINEAR
from qlora_kit.core.errors import AdapterError
from qlora_kit.core.patterns import matches, matches_any

CLASSIFIER_HEADS = ("classifier", "score")
"""Names of the new head in transformers' sequence classification models."""

NEW_MODULES = "qlora_kit_new_modules"
"""Attribute of a model: names of modules the checkpoint had no weights for; set by `load`."""


def task_type(model: nn.Module) -> str | None:
    """Name the model's task as PEFT does.

    Args:
        model: any model.

    Returns:
        `CAUSAL_LM`, `SEQ_CLS`, or None when the class name tells neither.

    Example:
        >>> task_type(nn.Linear(2, 2)) is None
        True
    """
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def whole_modules(model: nn.Module, named: Sequence[str] = ()) -> tuple[str, ...]:
    """Find the modules to train whole.

    Args:
        model: the model to adapt.
        named: patterns of more of them, a run's `train_modules`.

    Returns:
        Dotted names; none lies inside another.

    Raises:
        AdapterError: a pattern matches no module.

    Example:
        >>> whole_modules(nn.ModuleDict({"norm": nn.LayerNorm(4)}), ("norm",))
        ('norm',)
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in named:
        if not any(matches(name, pattern) for name in names):
            raise AdapterError(
                f"train_modules: {pattern!r} matches no module of {type(model).__name__}. "
                f"Its top-level modules are: {', '.join(n for n, _ in model.named_children())}."
            )
    chosen = {name for name in names if matches_any(name, named)}
    if task_type(model) == "SEQ_CLS":
        chosen |= {name for name, _ in model.named_children() if name in CLASSIFIER_HEADS}
        chosen |= set(getattr(model, NEW_MODULES, ()))
    return tuple(name for name in names if name in chosen and not inside(name, chosen - {name}))


def linear_targets(
    model: nn.Module,
    targets: str | tuple[str, ...],
    *,
    outside: Iterable[str] = (),
    layers: tuple[int, ...] = (),
    embeddings: bool = False,
) -> dict[str, nn.Module]:
    """Find the linears an adapter wraps.

    Args:
        model: the model to adapt.
        targets: `all-linear`, one pattern, or several, among which `all-linear` may be.
        outside: modules trained whole; nothing inside them is selected.
        layers: indices of the blocks to stay in; empty: everywhere.
        embeddings: whether a pattern may select an embedding.

    Returns:
        Dotted name to module, in the model's order.

    Raises:
        AdapterError: a pattern selects no linear, or the selection is not possible.

    Example:
        >>> model = nn.ModuleDict(
        ...     {"layers": nn.ModuleList([nn.Linear(4, 4)]), "lm_head": nn.Linear(4, 9)}
        ... )
        >>> list(linear_targets(model, "all-linear")), list(linear_targets(model, ("lm_head",)))
        (['layers.0'], ['lm_head'])
    """
    whole = set(outside)
    linears = {
        name: module
        for name, module in model.named_modules()
        if name and _is_linear(module) and not inside(name, whole)
    }
    if not linears:
        raise AdapterError(f"{type(model).__name__} has no linear layer that could be adapted.")
    chosen = _block_linears(model, linears) if ALL_LINEAR in _listed(targets) else {}
    if layers:
        linears = _in_layers(model, linears, layers)
        chosen = {name: module for name, module in chosen.items() if name in linears}
    elif embeddings:
        linears = {
            name: module
            for name, module in model.named_modules()
            if name in linears or (isinstance(module, nn.Embedding) and not inside(name, whole))
        }
    patterns = tuple(pattern for pattern in _listed(targets) if pattern != ALL_LINEAR)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in linears):
            raise AdapterError(
                f"targets: {pattern!r} matches no linear layer of {type(model).__name__}. "
                f"Its linear layers end in: {', '.join(_last_parts(linears))}. Use whole name "
                "parts, `re:` and a regular expression for the full name, or all-linear."
            )
    found = {n: m for n, m in linears.items() if n in chosen or matches_any(n, patterns)}
    _refuse_tied(model, found)
    return found


def compact_names(chosen: Iterable[str], existing: Iterable[str]) -> tuple[str, ...]:
    """Shorten module names to endings that select the same modules and no others.

    Args:
        chosen: dotted names that must be selected.
        existing: dotted names of all modules; those not in `chosen` must not be.

    Returns:
        Sorted endings, the shortest for each name.

    Example:
        >>> compact_names({"h.0.q", "h.1.q"}, {"h.0.q", "h.1.q", "h.0.k"})
        ('q',)
        >>> compact_names({"h.0.out.dense"}, {"h.0.out.dense", "pooler.dense"})
        ('out.dense',)
    """
    wanted = set(chosen)
    forbidden = {ending for name in existing if name not in wanted for ending in _endings(name)}
    return tuple(sorted({next((e for e in _endings(n) if e not in forbidden), n) for n in wanted}))


def _listed(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else targets


def _in_layers(
    model: nn.Module, linears: dict[str, nn.Module], layers: tuple[int, ...]
) -> dict[str, nn.Module]:
    """The linears inside blocks of these numbers; blocks are entries of outermost lists."""
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {n: count for n, count in lists.items() if not inside(n, lists.keys() - {n})}
    count = max(outer.values(), default=0)
    wrong = [index for index in layers if index >= count]
    if wrong:
        raise AdapterError(
            f"layers_to_transform: {type(model).__name__} has {count} layers, numbered from 0; "
            f"there is no layer {wrong[0]}."
        )
    blocks = {f"{name}.{index}" for name in outer for index in layers}
    return {name: module for name, module in linears.items() if inside(name, blocks)}


def _is_linear(module: nn.Module) -> bool:
    # torch's attention reads the weight of its output projection instead of calling it
    odd = nn.modules.linear.NonDynamicallyQuantizableLinear
    return isinstance(module, LINEARS) and not isinstance(module, odd)


def _block_linears(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, nn.Module]:
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if lists:
        found = {name: module for name, module in linears.items() if inside(name, lists)}
    else:
        head = _output_head(model)
        found = {
            name: module
            for name, module in linears.items()
            if module is not head and not matches_any(name, ("lm_head", *CLASSIFIER_HEADS))
        }
    if not found:
        raise AdapterError(
            f"all-linear: {type(model).__name__} has linear layers only outside its blocks "
            f"({', '.join(_last_parts(linears))}). Name the ones to adapt in `targets`."
        )
    return found


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _refuse_tied(model: nn.Module, found: dict[str, nn.Module]) -> None:
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    linears = {name: m for name, m in found.items() if not isinstance(m, nn.Embedding)}
    for name, module in linears.items():
        if any(getattr(module, "weight", None) is weight for weight in embeddings):
            raise AdapterError(
                f"targets: {name} shares its weight with the input embedding, so an adapter on it "
                "could not be merged without changing both. Leave it out of `targets`."
            )


def inside(name: str, containers: set[str]) -> bool:
    """Tell whether a name is one of the containers or lies below one.

    Args:
        name: dotted.
        containers: dotted names; "" contains everything.

    Returns:
        True if so.

    Example:
        >>> inside("h.1.attn", {"h.1"}), inside("h.10.attn", {"h.1"})
        (True, False)
    """
    parts = name.split(".")
    return "" in containers or any(
        ".".join(parts[:i]) in containers for i in range(1, len(parts) + 1)
    )


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a layer norm or one of the many RMS norms.

    Args:
        module: any.

    Returns:
        True if so.

    Example:
        >>> is_norm(nn.LayerNorm(2)), is_norm(nn.Linear(2, 2))
        (True, False)
    """
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
