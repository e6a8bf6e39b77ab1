"""Fine-tune large language models on one GPU: a frozen 4-bit NF4 base and small trained adapters.

The names below are the public surface. They load on first use (PEP 562), so that
`import qlora_kit` and the command line's `--help` cost milliseconds, not the
seconds that importing torch takes.

Example:
    >>> import qlora_kit as qk
    >>> round(qk.QuantConfig().bits_per_weight, 3)
    4.127
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qlora_kit.adapters.adalora.config import AdaLoRA as AdaLoRA
    from qlora_kit.adapters.adalora.config import RankBudget as RankBudget
    from qlora_kit.adapters.attached import AttachedAdapter as AttachedAdapter
    from qlora_kit.adapters.bottleneck.config import Bottleneck as Bottleneck
    from qlora_kit.adapters.glora.config import GLoRA as GLoRA
    from qlora_kit.adapters.inject import attach as attach
    from qlora_kit.adapters.inject import load_adapter as load_adapter
    from qlora_kit.adapters.lora.config import DoRA as DoRA
    from qlora_kit.adapters.lora.config import LoRA as LoRA
    from qlora_kit.adapters.lora.config import LoRAFA as LoRAFA
    from qlora_kit.adapters.multi_adapter.bank import AdapterBank as AdapterBank
    from qlora_kit.adapters.multi_adapter.load import load_adapters as load_adapters
    from qlora_kit.adapters.prompt.config import PrefixTuning as PrefixTuning
    from qlora_kit.adapters.prompt.config import PromptTuning as PromptTuning
    from qlora_kit.adapters.selective.config import BitFit as BitFit
    from qlora_kit.adapters.selective.config import Full as Full
    from qlora_kit.adapters.selective.config import TopK as TopK
    from qlora_kit.core.errors import QloraKitError as QloraKitError
    from qlora_kit.core.errors import UserError as UserError
    from qlora_kit.export.deviation import Deviation as Deviation
    from qlora_kit.export.deviation import compare as compare
    from qlora_kit.export.merge import merge as merge
    from qlora_kit.export.originals import original_weights as original_weights
    from qlora_kit.export.quantized import save_quantized as save_quantized
    from qlora_kit.load.hf_quantizer import NF4Config as NF4Config
    from qlora_kit.load.model import load as load
    from qlora_kit.nn.linear import NF4Linear as NF4Linear
    from qlora_kit.ops.backend import force_backend as force_backend
    from qlora_kit.ops.nf4_linear.op import nf4_linear as nf4_linear
    from qlora_kit.plan.plan import plan as plan
    from qlora_kit.quant.config import QuantConfig as QuantConfig
    from qlora_kit.quant.weight import NF4Weight as NF4Weight
    from qlora_kit.train.config import DataConfig as DataConfig
    from qlora_kit.train.config import EvalConfig as EvalConfig
    from qlora_kit.train.config import ExportConfig as ExportConfig
    from qlora_kit.train.config import ModelConfig as ModelConfig
    from qlora_kit.train.config import RunConfig as RunConfig
    from qlora_kit.train.config import TrainConfig as TrainConfig
    from qlora_kit.train.run import run_training as run_training
    from qlora_kit.train.trainer import Trainer as Trainer

_HOMES = {
    "AdaLoRA": "qlora_kit.adapters.adalora.config",
    "AdapterBank": "qlora_kit.adapters.multi_adapter.bank",
    "AttachedAdapter": "qlora_kit.adapters.attached",
    "BitFit": "qlora_kit.adapters.selective.config",
    "Bottleneck": "qlora_kit.adapters.bottleneck.config",
    "DataConfig": "qlora_kit.train.config",
    "DoRA": "qlora_kit.adapters.lora.config",
    "Deviation": "qlora_kit.export.deviation",
    "EvalConfig": "qlora_kit.train.config",
    "ExportConfig": "qlora_kit.train.config",
    "Full": "qlora_kit.adapters.selective.config",
    "GLoRA": "qlora_kit.adapters.glora.config",
    "LoRA": "qlora_kit.adapters.lora.config",
    "LoRAFA": "qlora_kit.adapters.lora.config",
    "ModelConfig": "qlora_kit.train.config",
    "NF4Config": "qlora_kit.load.hf_quantizer",
    "NF4Linear": "qlora_kit.nn.linear",
    "NF4Weight": "qlora_kit.quant.weight",
    "PrefixTuning": "qlora_kit.adapters.prompt.config",
    "PromptTuning": "qlora_kit.adapters.prompt.config",
    "QloraKitError": "qlora_kit.core.errors",
    "QuantConfig": "qlora_kit.quant.config",
    "RankBudget": "qlora_kit.adapters.adalora.config",
    "RunConfig": "qlora_kit.train.config",
    "TopK": "qlora_kit.adapters.selective.config",
    "TrainConfig": "qlora_kit.train.config",
    "Trainer": "qlora_kit.train.trainer",
    "UserError": "qlora_kit.core.errors",
    "attach": "qlora_kit.adapters.inject",
    "compare": "qlora_kit.export.deviation",
    "force_backend": "qlora_kit.ops.backend",
    "load": "qlora_kit.load.model",
    "load_adapter": "qlora_kit.adapters.inject",
    "load_adapters": "qlora_kit.adapters.multi_adapter.load",
    "merge": "qlora_kit.export.merge",
    "nf4_linear": "qlora_kit.ops.nf4_linear.op",
    "original_weights": "qlora_kit.export.originals",
    "plan": "qlora_kit.plan.plan",
    "run_training": "qlora_kit.train.run",
    "save_quantized": "qlora_kit.export.quantized",
}
"""Public name to the module that defines it. A test keeps it equal to the imports above."""


class _Package(ModuleType):
    """This package, with `qk.load` and `qk.plan` functions although rooms have the same names.

    When the room `qlora_kit.load` is imported, Python binds it as an attribute of
    this package, over the function. Names in `_HOMES` refuse such a binding;
    `from qlora_kit.load.model import load` is unaffected.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Import a public name the first time it is asked for.

    Args:
        name: attribute that the package does not have yet.

    Returns:
        The public class or function.

    Raises:
        AttributeError: the name is not public.
    """
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *_HOMES})
