"""Low-rank changes from files of any method that has them, and to the files of a plain LoRA."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qlora_kit.adapters.attached import base_info
from qlora_kit.adapters.fit import check_fit, plain_modules
from qlora_kit.adapters.formats.peft import AdapterFiles, read_adapter
from qlora_kit.adapters.linears import stores_transposed
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.registry import method_name
from qlora_kit.adapters.targets import compact_names, inside, task_type
from qlora_kit.core.errors import AdapterError


def read_low_rank(model: nn.Module, folder: Path | str) -> AdapterFiles:
    """Read an adapter that can stand beside others on a model.

    Args:
        model: with or without adapters.
        folder: of the adapter.

    Returns:
        What it holds.

    Raises:
        SourceError: a file is missing.
        FormatError: a file is malformed or of a method that is not supported.
        AdapterError: it does not fit, or is no low-rank change.

    Example:
        >>> read_low_rank(nn.Linear(2, 2), "nowhere")
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: nowhere is not an adapter folder: ...
    """
    files = read_adapter(folder)
    config = files.config
    if isinstance(config, DoRA):
        raise AdapterError(
            f"{folder} is a DoRA: it divides by the length of each changed row of a weight, so "
            "its change is no low-rank one and cannot stand beside others. Load it alone with "
            "load_adapter, or merge it."
        )
    if not isinstance(config, LoRA):
        raise AdapterError(
            f"{folder} was trained with {method_name(config)}. Several adapters in one model must "
            "be low-rank changes of weights: lora, rslora, lora_fa or adalora. Load it alone with "
            "load_adapter."
        )
    check_fit(model, files, Path(folder))
    return files


def plain_files(
    model: nn.Module, deltas: Mapping[str, LowRank], modules: Mapping[str, Mapping[str, Tensor]]
) -> AdapterFiles:
    """Describe an adapter on a model as a LoRA: ranks and alphas by module.

    Args:
        model: with or without adapters.
        deltas: module to its change; at least one.
        modules: module saved whole to its values.

    Returns:
        The content of an adapter folder.

    Raises:
        AdapterError: there is no change.

    Example:
        >>> import torch
        >>> pair = LowRank(torch.ones(2, 8), torch.ones(4, 2), 3.0)
        >>> model = nn.ModuleDict({"proj": nn.Linear(8, 4)})
        >>> plain_files(model, {"proj": pair}, {}).config.alpha
        6.0
    """
    if not deltas:
        raise AdapterError("there is no low-rank change left: every rank of the adapter is zero.")
    existing = plain_modules(model)
    names = {name for name in existing if name and not inside(name, set(modules))}
    return AdapterFiles(
        config=_config(deltas, tuple(modules)),
        deltas=dict(deltas),
        modules={f"{m}.{key}": value for m, held in modules.items() for key, value in held.items()},
        module_names=tuple(modules),
        base=base_info(model),
        task_type=task_type(model),
        fan_in_fan_out=any(stores_transposed(existing[place]) for place in deltas),
        target_modules=compact_names(deltas, names),
    )


def _config(deltas: Mapping[str, LowRank], whole: tuple[str, ...]) -> LoRA:
    sizes = {m: (pair.a.shape[0], pair.scale * pair.a.shape[0]) for m, pair in deltas.items()}
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    return LoRA(
        rank=rank,
        alpha=alpha,
        rank_pattern={m: r for m, (r, _) in sizes.items() if r != rank},
        alpha_pattern={m: a for m, (_, a) in sizes.items() if a != alpha},
        targets=tuple(deltas),
        train_modules=whole,
        dtype=str(next(iter(deltas.values())).a.dtype).removeprefix("torch."),
    )
