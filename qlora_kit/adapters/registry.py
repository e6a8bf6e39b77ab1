"""Every method by its name, and the configuration class that stands for it; free of torch.

Configurations are plain dataclasses, in `config.py` of each method's room. The command line and
YAML build them through `make_adapter_config`; Python users write `qk.LoRA(rank=16)` themselves.
"""

from dataclasses import asdict
from difflib import get_close_matches
from typing import Any

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.lora.config import DoRA, LoRA, LoRAFA
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.core.errors import ConfigError

METHODS: dict[str, type[LoRA]] = {
    "lora": LoRA,
    "rslora": LoRA,
    "lora_fa": LoRAFA,
    "dora": DoRA,
    "adalora": AdaLoRA,
}
"""Methods with the settings of LoRA: name, as in `method:` of a run, to configuration class."""

OTHERS: dict[str, type[Any]] = {
    "bottleneck": Bottleneck,
    "bitfit": BitFit,
    "glora": GLoRA,
    "top_k": TopK,
    "full": Full,
    "prefix_tuning": PrefixTuning,
    "prompt_tuning": PromptTuning,
}
"""Methods with settings of their own, in a section of the run that is called as they are."""


def make_adapter_config(method: str, *settings: Method) -> Any:
    """Build the configuration of a named method from the settings of a run.

    Args:
        method: a key of `METHODS` or `OTHERS`.
        *settings: the sections of a run; a `LoRA` for all methods like it, and one each for
            the others. A method that finds none of its own has its defaults.

    Returns:
        The method's own configuration.

    Raises:
        ConfigError: the method is unknown, or the fields are another method's.

    Example:
        >>> make_adapter_config("lora_fa", LoRA(rank=4)).freeze_a
        True
        >>> make_adapter_config("bottleneck", LoRA(rank=4), Bottleneck(width=3)).width
        3
    """
    known = [*METHODS, *OTHERS]
    if method not in known:
        near = get_close_matches(method, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown method {method!r}; known: {', '.join(known)}.{hint}")
    if method in OTHERS:
        own = (found for found in settings if type(found) is OTHERS[method])
        return next(own, None) or OTHERS[method]()
    fields = next((found for found in settings if isinstance(found, LoRA)), LoRA())
    values = asdict(fields)
    if fields.corrected_gradient and not issubclass(METHODS[method], LoRAFA):
        raise ConfigError(
            f"adapter.corrected_gradient needs a frozen A, which method {method!r} trains. Use "
            "method lora_fa, or turn it off."
        )
    if method == "rslora":
        values["rslora"] = True
    if method == "adalora":
        values["budget"] = next((s for s in settings if isinstance(s, RankBudget)), RankBudget())
    return METHODS[method](**values)


def method_name(config: Method) -> str:
    """Name of the method a configuration stands for.

    Args:
        config: of any method.

    Returns:
        A key of `METHODS` or `OTHERS`.

    Example:
        >>> method_name(LoRAFA()), method_name(LoRA(rslora=True)), method_name(LoRA())
        ('lora_fa', 'rslora', 'lora')
    """
    for name, kind in OTHERS.items():
        if type(config) is kind:
            return name
    if isinstance(config, LoRAFA):
        return "lora_fa"
    if isinstance(config, DoRA):
        return "dora"
    if isinstance(config, AdaLoRA):
        return "adalora"
    return "rslora" if isinstance(config, LoRA) and config.rslora else "lora"
