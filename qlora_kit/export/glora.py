"""GLoRA merged, streamed: W* = W + W⊙A + B, b* = b + b⊙D + E + W·C.

W is the weight that is merged into, quantized or original, and passes by rows; its bias needs
one more pass over it for W·C, with memory for a few rows.

A linear without a bias gets E + W·C as a new one, where the model's class has a place for it:
Llama and its relatives take biases by `attention_bias` and `mlp_bias` of config.json, for all
linears of attention or feed-forward at once; those that are not adapted get zeros. Other
classes have no such place, and the merge is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_kit.adapters.formats.peft import AdapterFiles
from qlora_kit.checkpoint.source import Source
from qlora_kit.core.errors import AdapterError
from qlora_kit.export.items import Item, MergePlan
from qlora_kit.export.rows import InMemory, Rows, chunks

SUPPORTS = ("A_d", "A_u", "B_d", "B_u", "C_d", "C_u", "D", "E")
FLAGS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
"""Part of a module's name to the field of config.json that gives its linears biases."""

Supports = Mapping[str, Tensor]


def split_supports(files: AdapterFiles) -> tuple[dict[str, dict[str, Tensor]], AdapterFiles]:
    """Take the supports out of an adapter's tensors.

    Args:
        files: of a GLoRA adapter.

    Returns:
        supports: module to key to tensor.
        rest: the adapter with what is trained whole alone.

    Example:
        >>> from qlora_kit.adapters.glora.config import GLoRA
        >>> tensors = {"proj.E": torch.ones(2), "score.weight": torch.ones(2, 2)}
        >>> supports, rest = split_supports(
        ...     AdapterFiles(config=GLoRA(), deltas={}, modules=tensors, module_names=("score",)))
        >>> list(supports), list(rest.modules)
        (['proj'], ['score.weight'])
    """
    supports: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in files.modules.items():
        module, _, key = name.rpartition(".")
        if key in SUPPORTS and module not in files.module_names:
            supports.setdefault(module, {})[key] = tensor
        else:
            rest[name] = tensor
    return supports, replace(files, modules=rest)


def open_biases(
    model: PreTrainedModel,
    source: Source,
    supports: Mapping[str, Supports],
    method: str = "GLoRA adds E + W·C to one",
) -> tuple[Source, set[str]]:
    """Give the skeleton the biases that a merge needs, and config.json the fields for them.

    Args:
        model: on the meta device; changed in place.
        source: the base.
        supports: module to key to tensor.
        method: what adds a bias, for messages.

    Returns:
        source: with the fields set.
        new: names of the biases that were added.

    Raises:
        AdapterError: the model's class has no place for one.
    """
    modules = dict(model.named_modules())
    config, new = dict(source.config), set[str]()
    for place, own in supports.items():
        linear = modules.get(place)
        if (
            linear is None
            or getattr(linear, "bias", None) is not None
            or not {"C_d", "E"} & set(own)
        ):
            continue
        part = next((p for p in place.split(".") if p in FLAGS), "")
        if not hasattr(model.config, FLAGS.get(part, "no place")):
            without = "structure `lora lora none none none`"
            advice = f"Train without C and E ({without}), or keep" if "GLoRA" in method else "Keep"
            raise AdapterError(
                f"{place} has no bias, and {method}, for which {type(model).__name__} has no "
                f"place. {advice} the adapter beside the base."
            )
        config[FLAGS[part]] = True
        for name, module in modules.items():
            free = isinstance(module, nn.Linear) and getattr(module, "bias", None) is None
            if free and f".{part}." in f".{name}":
                size = module.get_parameter("weight").shape[0]
                module.bias = nn.Parameter(torch.empty(size, device="meta"))
                new.add(f"{name}.bias")
    return replace(source, config=config), new


def add_supports(
    plan: MergePlan,
    items: Mapping[str, Item],
    supports: Mapping[str, Supports],
    *,
    new: set[str],
    transposed: Callable[[str], bool],
) -> None:
    """Attach every module's supports to its weight and bias.

    Args:
        plan: with an item per tensor of the checkpoint; new biases are added.
        items: of the plan, by the model's parameter.
        supports: module to key to tensor, by the model's names.
        new: biases that the checkpoint does not have.
        transposed: whether a parameter is stored as (in, out).

    Raises:
        AdapterError: a weight is tied or missing.
    """
    tied = {name for pair in plan.model.all_tied_weights_keys.items() for name in pair}
    adapted: set[str] = set()
    for module, own in supports.items():
        weight = items.get(f"{module}.weight")
        if weight is None or f"{module}.weight" in tied:
            raise AdapterError(
                f"the adapter changes {module}, whose weight is tied to the embeddings or missing "
                f"from {plan.source.folder}. Train without this module."
            )
        held = {key: tensor.to(plan.device, torch.float32) for key, tensor in own.items()}
        turned, name = transposed(f"{module}.weight"), f"{module}.bias"
        opener, step = weight.open_rows, weight.step
        weight.change = partial(ScaledRows, supports=held, transposed=turned)
        shift = partial(ShiftedBias, supports=held, weight=opener, step=step, transposed=turned)
        bias = items.get(name)
        if bias is not None:
            bias.change = shift
        elif name in new:
            size = weight.shape[1 if turned else 0]
            plan.items.append(_new_bias(plan, name, size, weight.dtype, shift))
            adapted.add(name)
    sizes = {n: p.shape[0] for n, p in plan.model.named_parameters()}
    for name in sorted(new - adapted):
        plan.items.append(_new_bias(plan, name, sizes[name], torch.float32, None))


def _new_bias(
    plan: MergePlan,
    name: str,
    size: int,
    dtype: torch.dtype,
    change: Callable[[Rows], Rows] | None,
) -> Item:
    zeros = torch.zeros(size, device=plan.device)
    return Item(
        name=name,
        shape=(size,),
        dtype=dtype,
        param=name,
        change=change,
        open_rows=partial(InMemory, zeros),
        raw=zeros.clone,
    )


@dataclass(frozen=True)
class ScaledRows:
    """W + W⊙A + B by rows.

    Example:
        >>> rows = ScaledRows(InMemory(torch.ones(2, 3)), {"A_d": torch.ones(1, 1)}, False)
        >>> rows.read(0, 1)
        tensor([[2., 2., 2.]])
    """

    rows: Rows
    supports: Supports
    transposed: bool
    """Whether rows are inputs, as in GPT-2's Conv1D."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.shape

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start:stop in float32."""
        values = self.rows.read(start, stop)
        scale, shift = self._part("A", start, stop), self._part("B", start, stop)
        if scale is not None:
            values = values + values * scale
        return values if shift is None else values + shift

    def _part(self, letter: str, start: int, stop: int) -> Tensor | None:
        down, up = self.supports.get(f"{letter}_d"), self.supports.get(f"{letter}_u")
        if down is None:
            return None
        if not self.transposed:
            down = down[start:stop] if down.shape[0] > 1 else down
            return down if up is None else down @ up
        return down.T if up is None else up[:, start:stop].T @ down.T


@dataclass(frozen=True)
class ShiftedBias:
    """b + b⊙D + E + W·C, one row."""

    rows: Rows
    """b, or zeros."""
    supports: Supports
    weight: Callable[[], Rows]
    """Opens W, for one pass of its own."""
    step: int
    """Chunks of W start at multiples of so many rows."""
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """One row."""
        return self.rows.shape

    def read(self, start: int, stop: int) -> Tensor:
        """The row, float32."""
        bias = self.rows.read(start, stop)
        total = bias
        if "D" in self.supports:
            total = total + bias * self.supports["D"]
        if "E" in self.supports:
            total = total + self.supports["E"]
        if "C_d" in self.supports:
            total = total + self._image(total.shape[1])
        return total

    def _image(self, size: int) -> Tensor:
        """W·C, (size,)."""
        column = self.supports["C_d"]
        if "C_u" in self.supports:
            column = column @ self.supports["C_u"]
        found = torch.zeros(size, device=column.device)
        position = 0
        for values in chunks(self.weight(), self.step):
            end = position + values.shape[0]
            if self.transposed:
                found += column[position:end, 0] @ values
            else:
                found[position:end] = values @ column[:, 0]
            position = end
        return found
