"""The door in transformers: `from_pretrained(..., quantization_config=NF4Config())`.

transformers asks a registered quantizer, in this order: to replace modules of the
empty model, which parameters it quantizes, with which operation, what to do when
all weights are in, and for a state dict when the model is saved. The answers are
the same on every version from 5.17 on; where a hook was renamed in between, both
names are given.

Two things are easy to get wrong. transformers casts what it reads to the dtype of
the empty parameter, silently, to uint8 as well: so while loading, the place of the
packed weight is held by a parameter of the dtype the weight is stored in, and
nothing is rounded before it is quantized. And on disk an NF4 weight's tensors
carry bitsandbytes' names (`q_proj.weight.absmax`), in the model ours
(`q_proj.weight_absmax`), since a parameter's name cannot have a dot.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantizer

from qlora_kit.checkpoint.upload import Uploader
from qlora_kit.core.errors import AdapterError, ConfigError, UserError
from qlora_kit.load.conversion import (
    ListExperts,
    QuantizeOnLoad,
    ReadStored,
    endings,
    missing_weights,
    name_pattern,
    nf4_owner,
    split_name,
)
from qlora_kit.load.finite import FiniteCheck
from qlora_kit.load.nf4_config import QUANT_METHOD
from qlora_kit.load.nf4_config import NF4Config as NF4Config
from qlora_kit.load.report import fit_shapes
from qlora_kit.load.stored import read_headers, stored_dtypes, stored_weights
from qlora_kit.nn.experts import PROJECTIONS, NF4Experts
from qlora_kit.nn.linear import NF4Linear, byte_specs
from qlora_kit.nn.swap import nf4_modules, quantizable, swap, weight_shapes
from qlora_kit.ops import precompile
from qlora_kit.quant.format import to_bnb_tensors

UPLOADED_TO: tuple[str, ...] = ("cuda",)
"""Kinds of devices that weights are taken to by us, not by transformers."""

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
        self.filled: set[str] = set()
        self.failure: UserError | None = None
        self.finite = FiniteCheck()
        self.uploader: Uploader | None = None
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
        device_map: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Put empty NF4 modules in place of the layers that are, or will be, quantized."""
        self.uploader = _uploader(device_map)
        dtype = dtype or torch.get_default_dtype()
        if self.uploader is not None:
            precompile.begin(self.uploader.device, dtype)
        config = self.quantization_config.quant
        stored = read_headers(checkpoint_files)
        if self.pre_quantized and stored:
            weights = stored_weights(stored, model)
            configs = {split_name(name)[0]: weight.config for name, weight in weights.items()}
            swap(model, configs, dtype=dtype)
            empty = {name: (w.packed.shape, w.packed.dtype) for name, w in weights.items()}
        else:
            swap(model, dict.fromkeys(quantizable(model, config), config), dtype=dtype)
            empty = {}
            if not self.pre_quantized:
                dtypes = stored_dtypes(stored, model, _weight_names(model), dtype)
                empty = {n: (tuple(model.get_parameter(n).shape), d) for n, d in dtypes.items()}
        for name, (shape, stored_dtype) in empty.items():
            path, leaf = split_name(name)
            data = torch.empty(shape, dtype=stored_dtype, device="meta")
            setattr(model.get_submodule(path), leaf, nn.Parameter(data, requires_grad=False))
        self._weights = _weight_names(model)
        packed = set(self._weights)
        self._shapes = {n: p.shape for n, p in model.named_parameters() if n not in packed}
        return model

    # While loading

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a stored parameter may change its shape while it is read.

        Not whether it is to be quantized: transformers casts such weights to the
        compute dtype first. Ours are quantized by converters, from the stored dtype.
        """
        return self.pre_quantized and nf4_owner(model, param_name) is not None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes per element to reserve on a GPU; the codes' bytes for a placeholder."""
        if not self.pre_quantized and nf4_owner(model, param_name) is not None:
            return 0.5
        return float(param.element_size())

    def get_weight_conversions(self) -> list[WeightTransform]:
        """One converter per distinct layer name."""
        # Left on the CPU by transformers: ours take them to the GPU.
        ours = self.uploader is not None
        if self.pre_quantized:
            readers = [ReadStored(self, ending) for ending in endings(self._weights)]
            return [
                WeightConverter(list(r.patterns), r.ending, [r], force_cpu=ours) for r in readers
            ]
        return [
            WeightConverter(name_pattern(ending), ending, [QuantizeOnLoad(self)], force_cpu=ours)
            for ending in endings(self._weights)
        ]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel | None = None
    ) -> list[WeightTransform]:
        """Let the model's own converters end in ours; experts are not stacked before."""
        for entry in weight_conversions:
            if self.pre_quantized or not isinstance(entry, WeightConverter):
                continue
            if (
                entry.target_patterns[0].rpartition(".")[2] in PROJECTIONS
                and tuple(type(op) for op in entry.operations) in _STACKING
            ):
                entry.operations = [ListExperts(self, entry.operations)]
                entry.force_cpu |= self.uploader is not None
            entry.operations.append(QuantizeOnLoad(self))
        return weight_conversions + self.get_weight_conversions()

    # After loading

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Raise what went wrong, freeze the base, and mark the model as a 4-bit one."""
        failure = self.failure or self.finite.error()
        failure = failure or missing_weights(model, self.filled, self._weights)
        self.failure, self.filled, self.finite = None, set(), FiniteCheck()
        if self.uploader is not None:
            self.uploader.close()
        self.uploader = None
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


def _uploader(device_map: Any) -> Uploader | None:
    """One for a model that goes to one GPU as a whole; others are left to transformers."""
    places = [*device_map.values()] if isinstance(device_map, dict) else []
    if len(places) != 1 or places[0] == "disk":
        return None
    place = places[0]
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return Uploader(device) if device.type in UPLOADED_TO else None


def _weight_names(model: nn.Module) -> list[str]:
    """Full names of all NF4 weights of a model."""
    return [
        f"{path}.{leaf}" for path, module in nf4_modules(model) for leaf in weight_shapes(module)
    ]


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
