"""What happens to a weight between the checkpoint's file and the model.

transformers reads tensors one by one and hands each to a `ConversionOps`, which
may return several parameters for one tensor. Three of them are ours:

- `QuantizeOnLoad` turns a float weight into the parameters of an NF4 module;
- `ReadStored` turns the tensors of a stored NF4 weight into the same parameters;
- `ListExperts` stands in for the stacking of per-expert weights, so that
  `QuantizeOnLoad` gets them one by one and the 16-bit stack never exists.

For a model that goes to one GPU, transformers is told to leave these weights on the
CPU, which costs it nothing: what it hands over is a view of the mapped file. We take
it to the GPU ourselves (`checkpoint/upload.py`), several times as fast as it would.

transformers swallows an exception in here, prints its traceback and ends the
load with a general error much later. So a user's error is recorded on the
quantizer instead and raised, as itself, when loading ends; later weights are
then skipped.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from qlora_kit.core.errors import FormatError, UserError
from qlora_kit.load.report import check_shape, shorten
from qlora_kit.nn.experts import NF4Experts, quantize_stack
from qlora_kit.nn.linear import NF4Linear, byte_specs, weight_to_bytes
from qlora_kit.nn.swap import weight_shapes
from qlora_kit.ops.nf4_quantize.op import quantize_weight
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.format import COMPANION_SUFFIXES, from_bnb_tensors
from qlora_kit.quant.weight import NF4Weight

if TYPE_CHECKING:
    from qlora_kit.load.hf_quantizer import NF4HfQuantizer

_SUFFIXES = ("", *COMPANION_SUFFIXES)


@dataclass
class ExpertList:
    """The experts of one stack, each in pieces to be put one above the other."""

    pieces: list[list[Tensor]]
    """Per source (gate, up), the experts' (n, K) tensors; emptied while they are read."""
    place: Callable[[Tensor], Tensor]
    """Takes a piece to where it is to be quantized."""

    def __len__(self) -> int:
        """How many experts every source has."""
        return min(len(source) for source in self.pieces)

    def __iter__(self) -> "ExpertList":
        """Iterate over (N, K) experts, giving up each piece once it was used."""
        return self

    def __next__(self) -> Tensor:
        """The next expert."""
        if not all(self.pieces):
            raise StopIteration
        pieces = [self.place(source.pop(0)) for source in self.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def split_name(name: str) -> tuple[str, str]:
    """Split a parameter's name into its module and its own name."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def nf4_owner(model: nn.Module, name: str) -> tuple[NF4Linear | NF4Experts, str] | None:
    """The NF4 module whose weight a name is, with the weight's own name; None for others."""
    path, leaf = split_name(name)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if isinstance(module, NF4Linear | NF4Experts) and leaf in weight_shapes(module):
        return module, leaf
    return None


class _SharedOps(ConversionOps):
    """Base of our ops: transformers deep-copies ops per weight, ours refer to one quantizer."""

    def __init__(self, hf_quantizer: "NF4HfQuantizer") -> None:
        """Keep the quantizer.

        Args:
            hf_quantizer: records errors and what was filled. Its presence under this
                name tells transformers to hand over tensors in the dtype they are
                stored in.
        """
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedOps":
        """Stay one object."""
        return self

    def place(self, tensor: Tensor) -> Tensor:
        """Take a tensor to the model's GPU, if there is one and the tensor is not there yet."""
        uploader = self.hf_quantizer.uploader
        if uploader is None or tensor.device.type != "cpu":
            return tensor
        return uploader.upload(tensor)

    def store(
        self, module: NF4Linear | NF4Experts, name: str, weight: NF4Weight
    ) -> dict[str, Tensor]:
        """Note a weight as loaded and return its parameters by full name."""
        path, leaf = split_name(name)
        if isinstance(module, NF4Linear):
            module.weight_dtype = weight.dtype
        else:
            module.weight_dtypes[leaf] = weight.dtype
        self.hf_quantizer.filled.add(name)
        return {f"{path}.{key}": data for key, data in weight_to_bytes(weight, leaf).items()}

    def give_up(
        self, module: NF4Linear | NF4Experts, name: str, error: UserError | None
    ) -> dict[str, Tensor]:
        """Record an error and return zeros, so that the load goes on to where it is raised."""
        self.hf_quantizer.failure = self.hf_quantizer.failure or error
        path, leaf = split_name(name)
        sizes = byte_specs(weight_shapes(module)[leaf], module.config, leaf)
        return {
            f"{path}.{key}": torch.zeros((size, 1) if key == leaf else (size,), dtype=torch.uint8)
            for key, size in sizes.items()
        }


class QuantizeOnLoad(_SharedOps):
    """A float weight becomes the parameters of its NF4 module."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **_unused: Any,
    ) -> dict[str, Tensor]:
        """Quantize what belongs to an NF4 module and pass on the rest.

        Args:
            input_dict: one pattern (or several, of an operation before this one) to a
                tensor, a list of one, or an `ExpertList`; emptied.
            full_layer_name: full name of the first weight.
            model: being loaded.
            **_unused: transformers' other arguments.

        Returns:
            Full parameter name to tensor.
        """
        assert model is not None
        results: dict[str, Tensor] = {}
        for name, key in _full_names(input_dict, full_layer_name).items():
            value = input_dict.pop(key)
            if isinstance(value, list):
                value = value[0]
            owner = nf4_owner(model, name)
            if owner is None:
                results[name] = value
                continue
            module, leaf = owner
            if self.hf_quantizer.failure is not None:
                results |= self.give_up(module, name, None)
                continue
            try:
                weight = self._quantize(module, leaf, value, name)
            except UserError as error:
                results |= self.give_up(module, name, error)
            else:
                results |= self.store(module, name, weight)
        return results

    def _quantize(
        self,
        module: NF4Linear | NF4Experts,
        leaf: str,
        value: Tensor | ExpertList,
        name: str,
    ) -> NF4Weight:
        """Quantize what the checkpoint holds, in the dtype it is stored in."""
        shape, config = weight_shapes(module)[leaf], module.config
        experts = shape[0] if isinstance(module, NF4Experts) else 1
        watch = self.hf_quantizer.finite.watch(name, experts)
        if isinstance(value, ExpertList):
            check_shape(name, (len(value), *shape[1:]), shape)
            return quantize_stack(value, config, name=name, watch=watch)
        transposed = isinstance(module, NF4Linear) and module.transposed
        came = tuple(value.shape[::-1] if transposed else value.shape)
        check_shape(name, came, shape)
        value = self.place(value)
        return quantize_weight(
            value.T if transposed else value,
            block_size=config.block_size,
            double_quant=config.double_quant,
            name=name,
            watch=watch,
        )


def _full_names(keys: Iterable[str], full_layer_name: str) -> dict[str, str]:
    """Full parameter name of each key, as transformers completes an operation's results."""
    keys = list(keys)
    if len(keys) == 1:
        return {full_layer_name: keys[0]}
    stem = next((key for key in keys if key in full_layer_name), None)
    if stem is None:  # complete already
        return {key: key for key in keys}
    start, _, end = full_layer_name.partition(stem)
    return {start + key + end: key for key in keys}


class ReadStored(_SharedOps):
    """The tensors of a stored NF4 weight become the parameters of its NF4 module."""

    def __init__(self, hf_quantizer: "NF4HfQuantizer", ending: str) -> None:
        """Prepare to read weights of one name ending.

        Args:
            hf_quantizer: records errors and what was filled.
            ending: last two parts of the weights' names, such as `q_proj.weight`.
        """
        super().__init__(hf_quantizer)
        self.ending = ending

    @property
    def patterns(self) -> dict[str, str]:
        """Regular expression of each stored tensor's name, to the suffix it stands for."""
        return {name_pattern(self.ending, suffix): suffix for suffix in _SUFFIXES}

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **_unused: Any,
    ) -> dict[str, Tensor]:
        """Check and take over one weight's tensors.

        Args:
            input_dict: one of `patterns` to a list of one tensor.
            full_layer_name: the weight's full name in the model.
            model: being loaded.
            **_unused: transformers' other arguments.

        Returns:
            Full parameter name to tensor.
        """
        assert model is not None
        suffixes = self.patterns
        tensors = {
            suffixes[key]: value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        owner = nf4_owner(model, full_layer_name)
        if owner is None:  # shares its name with quantized layers, but is none
            wanted = model.get_parameter_or_buffer(full_layer_name).dtype
            return {full_layer_name: tensors[""].to(wanted)}
        module, leaf = owner
        try:
            weight = from_bnb_tensors(tensors, name=full_layer_name)
            check_shape(full_layer_name, weight.shape, weight_shapes(module)[leaf])
            _check_settings(full_layer_name, weight, module.config)
        except UserError as error:
            return self.give_up(module, full_layer_name, error)
        return self.store(module, full_layer_name, self._placed(weight))

    def _placed(self, weight: NF4Weight) -> NF4Weight:
        """The weight where the model is. Checked before: on a GPU each look would wait for it."""
        nested, offset = weight.nested_absmax, weight.offset
        return replace(
            weight,
            packed=self.place(weight.packed),
            absmax=self.place(weight.absmax),
            nested_absmax=None if nested is None else self.place(nested),
            offset=None if offset is None else self.place(offset),
        )


class ListExperts(_SharedOps):
    """Collects per-expert weights without stacking them, where the stack is to be quantized."""

    def __init__(self, hf_quantizer: "NF4HfQuantizer", dense: list[ConversionOps]) -> None:
        """Keep the operations this one stands in for.

        Args:
            hf_quantizer: knows where tensors go.
            dense: transformers' own stacking, for experts that stay dense.
        """
        super().__init__(hf_quantizer)
        self.dense = dense

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Sequence[str] = (),
        target_patterns: Sequence[str] = (),
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Collect one stack's experts.

        Args:
            input_dict: source pattern to the experts' tensors, in order; emptied.
            source_patterns: in the order the pieces are put one above the other.
            target_patterns: the stack's name; one.
            full_layer_name: the stack's full name.
            model: being loaded.
            **others: transformers' other arguments, for the dense operations.

        Returns:
            The target pattern to an `ExpertList`, or to the dense stack.
        """
        assert model is not None
        if nf4_owner(model, full_layer_name) is None:
            input_dict = {key: [self.place(t) for t in ts] for key, ts in input_dict.items()}
            for op in self.dense:
                input_dict = op.convert(
                    input_dict,
                    source_patterns=source_patterns,
                    target_patterns=target_patterns,
                    full_layer_name=full_layer_name,
                    model=model,
                    **others,
                )
            return input_dict
        pieces = [input_dict.pop(key) for key in source_patterns if key in input_dict]
        return {target_patterns[0]: ExpertList(pieces, self.place)}


def endings(names: Iterable[str]) -> list[str]:
    """Distinct last two parts (`q_proj.weight`, `experts.down_proj`) of weights' names."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def name_pattern(ending: str, suffix: str = "") -> str:
    """Regular expression for names with an ending: whole parts, up to the end."""
    return rf"(?<!\w){re.escape(ending + suffix)}$"


def _check_settings(name: str, weight: NF4Weight, config: QuantConfig) -> None:
    came = (weight.block_size, weight.nested_absmax is not None)
    if came != (config.block_size, config.double_quant):
        raise FormatError(
            f"{name} is stored with (block size, double quantization) = {came}, the other stack of "
            f"the same experts with {(config.block_size, config.double_quant)}. Both must agree."
        )


def missing_weights(
    model: nn.Module, filled: set[str], expected: Sequence[str]
) -> FormatError | None:
    """The error for NF4 weights the checkpoint did not have, if there are any."""
    missing = [name for name in expected if name not in filled]
    if not missing:
        return None
    return FormatError(
        f"the checkpoint lacks {len(missing)} weights of {type(model).__name__}: "
        f"{shorten(missing)}. The download is incomplete, or the weights belong to another "
        "architecture."
    )
