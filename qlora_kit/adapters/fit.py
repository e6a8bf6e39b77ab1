"""Whether an adapter folder fits a model, and where in it the folder's modules are."""

from pathlib import Path

from torch import nn

from qlora_kit.adapters.attached import base_info
from qlora_kit.adapters.formats.peft import AdapterFiles
from qlora_kit.adapters.linears import linear_shape
from qlora_kit.adapters.protocol import ModuleWrapper
from qlora_kit.core.errors import AdapterError
from qlora_kit.core.log import log_once
from qlora_kit.quant.config import QuantConfig


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List a model's modules as they were before any wrapper of an adapter.

    Args:
        model: with or without an adapter.

    Returns:
        Dotted name to module, in the model's order.

    Example:
        >>> from qlora_kit.adapters.protocol import TrainedCopy
        >>> import torch
        >>> model = nn.ModuleDict({"head": nn.Linear(4, 2)})
        >>> TrainedCopy(model["head"], "head", torch.float32).install(model)
        >>> plain_modules(model)["head"]
        Linear(in_features=4, out_features=2, bias=True)
    """
    found = {}
    wrapper = None  # the last one met: named_modules goes through a module before the next
    for name, module in model.named_modules():
        if isinstance(module, ModuleWrapper):
            wrapper = name
        elif wrapper is not None and name.startswith(f"{wrapper}."):
            head, _, rest = name.removeprefix(f"{wrapper}.").partition(".")
            if head == "base":
                found[f"{wrapper}.{rest}" if rest else wrapper] = module
        else:
            found[name] = module
    return found


def check_fit(model: nn.Module, files: AdapterFiles, folder: Path) -> None:
    """Refuse an adapter of other modules or sizes, and tell when its base was stored otherwise.

    Args:
        model: with or without an adapter.
        files: what the folder holds.
        folder: for messages.

    Raises:
        AdapterError: a module is not there, or has another shape.

    Example:
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.adapters.lora.low_rank import LowRank
        >>> import torch
        >>> pair = LowRank(torch.ones(2, 8), torch.ones(4, 2), 1.0)
        >>> files = AdapterFiles(config=LoRA(rank=2), deltas={"proj": pair})
        >>> check_fit(nn.ModuleDict({"proj": nn.Linear(8, 5)}), files, Path("folder"))
        Traceback (most recent call last):
        qlora_kit.core.errors.AdapterError: folder adapts proj as a (4, 8) weight, but ...
    """
    modules = plain_modules(model)
    missing = [name for name in files.deltas if name not in modules]
    if missing:
        raise AdapterError(
            f"{folder} adapts {missing[0]}"
            + (f" and {len(missing) - 1} more modules" if len(missing) > 1 else "")
            + f" that {type(model).__name__} does not have. It was made for another model"
            + (f" ({files.base.path})." if files.base.path else ".")
        )
    for name, pair in files.deltas.items():
        n, k = linear_shape(modules[name])
        if pair.a.shape[1] != k or pair.b.shape[0] != n:
            raise AdapterError(
                f"{folder} adapts {name} as a ({pair.b.shape[0]}, {pair.a.shape[1]}) weight, but "
                f"the model's is ({n}, {k}). It was made for a model of another size."
            )
    if files.base.recorded:
        trained_on, now = files.base.quant, base_info(model).quant
        if (trained_on is None) != (now is None):
            log_once(
                f"{folder} was trained on a {_stored(trained_on)} base and is loaded onto a "
                f"{_stored(now)} one; answers may differ slightly."
            )


def _stored(quant: QuantConfig | None) -> str:
    return "16- or 32-bit" if quant is None else "4-bit"


def whole_places(model: nn.Module, files: AdapterFiles) -> list[str]:
    """Find the full names of the modules saved whole: PEFT lists them by their ending.

    Args:
        model: with or without an adapter.
        files: what a folder holds.

    Returns:
        Dotted names, in the model's order.

    Example:
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> import torch
        >>> files = AdapterFiles(config=LoRA(), deltas={}, modules={"a.head.bias": torch.ones(2)},
        ...     module_names=("head",))
        >>> whole_places(nn.ModuleDict({"a": nn.ModuleDict({"head": nn.Linear(4, 2)})}), files)
        ['a.head']
    """
    return [
        place
        for place in plain_modules(model)
        if any(place == m or place.endswith(f".{m}") for m in files.module_names)
        and any(name.startswith(f"{place}.") for name in files.modules)
    ]
