"""The door in transformers: `from_pretrained(..., quantization_config=NF4Config())`.

transformers asks a registered quantizer, in this order: to replace modules of the
empty model, which parameters it quantizes, with which operation, what to do when
all weights are in, and for a state dict when the model is saved. The answers are
the same on every version from 5.17 on; where a hook was renamed in between, both
names are given.

Two things are easy to get wrong. A weight that is to be quantized needs a float
placeholder: transformers 5.17 casts what it reads to the placeholder's dtype, and
to uint8 it would do so silently. And on disk an NF4 weight's tensors carry
bitsandbytes' names (`q_proj.weight.absmax`), in the model ours
(`q_proj.weight_absmax`), since a parameter's name cannot have a dot.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantizer

from qlora_kit.core.errors import AdapterError, ConfigError, UserError
from qlora_kit.load.conversion import (
    ListExperts,
    QuantizeOnLoad,
    ReadStored,
    missing_weights,
    nf4_owner,
    split_name,
    stored_patterns,
)
from qlora_kit.load.nf4_config import QUANT_METHOD
from qlora_kit.load.nf4_config import NF4Config as NF4Config
from qlora_kit.load.report import fit_shapes
from qlora_kit.load.stored import StoredTensor, StoredWeight, read_headers, stored_weights
from qlora_kit.nn.experts import PROJECTIONS, NF4Experts
from qlora_kit.nn.linear import NF4Linear, byte_specs
from qlora_kit.nn.swap import nf4_modules, quantizable, swap, weight_shapes
from qlora_kit.quant.format import to_bnb_tensors

_STACKING = ((MergeModulelist, Concatenate), (MergeModulelist,))


@register_quantizer(QUANT_METHOD)
class NF4HfQuantizer(HfQuantizer):
    """Quantizes while loading, reads NF4 checkpoints, writes them under bitsandbytes' names."""

    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        """Start with nothing loaded.

        Args:
            quantization_config: the settings.
            **kwargs: transformers' own arguments.
        """
        super().__init__(quantization_config, **kwargs)
        self.stored: dict[str, StoredTensor] = {}
        self.filled: set[str] = set()
        self.failure: UserError | None = None
        self._weights: list[str] = []
        self._shapes: dict[str, torch.Size] = {}

    # Before loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse placements whose weights would not be on a device when they are needed.

        Args:
            *args: none are used; transformers' signature.
            device_map: as given to `from_pretrained`.
            **kwargs: none are used.

        Raises:
            ConfigError: the map puts modules on disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "device_map puts modules on disk, which an NF4 base does not support. Use one "
                "device, for instance device_map={'': 'cuda'}."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Load onto the current GPU, or the CPU without one, unless told otherwise."""
        if device_map is not None:
            return device_map
        return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Put empty NF4 modules in place of the layers that are, or will be, quantized."""
        dtype = dtype or torch.get_default_dtype()
        config = self.quantization_config.quant
        self.stored = read_headers(checkpoint_files)
        weights: dict[str, StoredWeight] = {}
        if self.pre_quantized and self.stored:
            weights = stored_weights(self.stored, model)
            configs = {split_name(name)[0]: weight.config for name, weight in weights.items()}
        else:
            configs = dict.fromkeys(quantizable(model, config), config)
        swap(model, configs, dtype=dtype, placeholder=not self.pre_quantized)
        for name, weight in weights.items():
            # bitsandbytes may have stored the bytes as another dtype; no cast happens if the
            # empty parameter has the same.
            path, leaf = split_name(name)
            data = torch.empty(weight.packed.shape, dtype=weight.packed.dtype, device="meta")
            setattr(model.get_submodule(path), leaf, nn.Parameter(data, requires_grad=False))
        self._weights = [
            f"{path}.{leaf}"
            for path, module in nf4_modules(model)
            for leaf in weight_shapes(module)
        ]
        packed = set(self._weights)
        self._shapes = {n: p.shape for n, p in model.named_parameters() if n not in packed}
        return model

    # While loading

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a parameter is the weight of an NF4 module."""
        return nf4_owner(model, param_name) is not None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element to reserve on a GPU: of a placeholder, what its codes will take."""
        if param.is_floating_point() and self.param_needs_quantization(model, param_name):
            return 0.5
        return float(param.element_size())

    def get_quantize_ops(self) -> ConversionOps:
        """The operation for a float weight."""
        return QuantizeOnLoad(self)

    def get_weight_conversions(self) -> list[WeightTransform]:
        """One converter per distinct layer name of an NF4 checkpoint."""
        if not self.pre_quantized:
            return []
        readers = [ReadStored(self, ending) for ending in stored_patterns(self._weights)]
        return [WeightConverter(list(r.patterns), r.ending, [r]) for r in readers]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """Quantize per-expert weights one by one instead of stacking them first."""
        for entry in weight_conversions:
            if (
                isinstance(entry, WeightConverter)
                and entry.target_patterns[0].rpartition(".")[2] in PROJECTIONS
                and tuple(type(op) for op in entry.operations) in _STACKING
            ):
                entry.operations = [ListExperts(entry.operations)]
        return weight_conversions + self.get_weight_conversions()

    # After loading

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Raise what went wrong, freeze the base, and mark the model as a 4-bit one."""
        failure = self.failure or missing_weights(model, self.filled, self._weights)
        self.stored, self.failure, self.filled = {}, None, set()
        if failure is not None:
            raise failure
        fit_shapes(model, self._shapes)
        for _, module in nf4_modules(model):
            module.requires_grad_(False)
        # On saving, transformers undoes renamings; it cannot undo what we did to the weights.
        model._weight_conversions = [
            entry
            for entry in getattr(model, "_weight_conversions", None) or []
            if not isinstance(entry, WeightConverter)
        ]
        model.is_loaded_in_4bit = True  # what TRL, PEFT and accelerate ask
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets `transformers.Trainer` accept the model without PEFT's wrapper around it."""
        return True

    # Saving and undoing

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict under bitsandbytes' names.

        Args:
            model: a model this quantizer loaded.

        Returns:
            Tensor name to tensor, and no metadata.

        Raises:
            AdapterError: adapters are attached, so names are not those of the base.
        """
        tensors = model.state_dict()
        for path, module in nf4_modules(model):
            if path.rpartition(".")[2] == "base":
                raise AdapterError(
                    f"{path} lies inside an adapter, so save_pretrained would not write the base. "
                    "Save the adapter with adapter.save(folder), or merge it with qk.merge."
                )
            for leaf, shape in weight_shapes(module).items():
                for key in byte_specs(shape, module.config, leaf):
                    del tensors[f"{path}.{key}"]
                nf4 = (
                    module.nf4_weight if isinstance(module, NF4Linear) else module.nf4_weight(leaf)
                )
                for suffix, tensor in to_bnb_tensors(nf4).items():
                    tensors[f"{path}.{leaf}{suffix}"] = tensor
        return tensors, {}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Put ordinary layers with decoded weights back in place."""
        for path, module in list(nf4_modules(model)):
            dense = (
                module.to_experts(dtype)
                if isinstance(module, NF4Experts)
                else _dense(module, dtype)
            )
            model.set_submodule(path, dense)
        model.is_loaded_in_4bit = False
        return model


def _dense(module: NF4Linear, dtype: torch.dtype | None) -> nn.Module:
    """An ordinary linear layer, or `Conv1D`, with a decoded weight."""
    weight = module.dequantize(dtype)
    with torch.device("meta"):
        layer = (
            Conv1D(module.out_features, module.in_features)
            if module.transposed
            else nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        )
    layer.weight = nn.Parameter(weight.T.contiguous() if module.transposed else weight)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach().to(weight.dtype))
    return layer.train(module.training)
