"""What an export has to do for every tensor, decided before anything is written.

The plan brings four things together: the tensors of the checkpoint, the model's
parameters they become (`naming.py`), the modules that training quantized (the
loader's own rule, `nn/swap.py`), and the adapter's changes. Everything that does
not fit is refused here, before the first byte is written.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qlora_kit.adapters.formats.peft import AdapterFiles
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.mergeable import why_not_merged
from qlora_kit.adapters.selective.config import BitFit
from qlora_kit.checkpoint.source import Source
from qlora_kit.core.errors import AdapterError, FormatError
from qlora_kit.export.glora import add_supports, open_biases, split_supports
from qlora_kit.export.items import Item, MergePlan
from qlora_kit.export.naming import Entry, build_skeleton, is_transposed, map_names
from qlora_kit.export.rows import (
    Decoded,
    InMemory,
    Rows,
    as_matrix,
    nf4_weight,
    quantized_stack,
    rows_step,
)
from qlora_kit.nn.experts import PROJECTIONS
from qlora_kit.nn.swap import quantizable
from qlora_kit.ops.nf4_quantize.op import quantize_weight
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.weight import NF4Weight

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_plan(
    source: Source, files: AdapterFiles | None, *, into: str, device: torch.device
) -> MergePlan:
    """Decide what becomes of every tensor.

    Args:
        source: the base.
        files: the adapter, or None for none.
        into: `quantized` or `original`.
        device: where to compute.

    Returns:
        The plan.

    Raises:
        FormatError: `into="original"` of a 4-bit base, or a tensor that has to change
            is converted while loading in a way that is not followed.
        AdapterError: the adapter does not fit the base.
    """
    reason = None if files is None else why_not_merged(files.config)
    if reason is not None:
        raise AdapterError(f"this adapter cannot be merged. {reason}")
    notes: list[str] = []
    if files is not None and into == "original" and getattr(files.config, "init", "") == "loftq":
        raise AdapterError(
            "the adapter started as the error of quantization (init loftq), which the original "
            "weights do not have. Merge into the quantized base."
        )
    quant = _quantization(source, files, into, notes)
    task = files.task_type if files is not None else None
    labels = _num_labels(files)
    model = build_skeleton(source, task_type=task, num_labels=labels)
    supports: dict[str, dict[str, Tensor]] = {}
    new: set[str] = set()
    if files is not None and isinstance(files.config, GLoRA):
        supports, files = split_supports(files)
        source, new = open_biases(model, source, supports)
    if files is not None and isinstance(files.config, BitFit):
        added = {n.removesuffix(".bias"): {"E": t} for n, t in files.modules.items()}
        source, new = open_biases(model, source, added, "BitFit has added one")
        new -= files.modules.keys()
    entries = map_names(model, source.weight_names())
    compute = _DTYPES.get(files.base.dtype or "") if files is not None else None
    plan = MergePlan(
        source=source,
        model=model,
        items=[],
        device=device,
        compute=compute,
        quant=quant,
        num_labels=labels,
        notes=notes,
    )
    planner = _Planner(plan, entries, into)
    planner.add_weights()
    if files is not None:
        planner.add_changes(files)
        add_supports(plan, planner.by_param, supports, new=new, transposed=planner.is_transposed)
        planner.replace_modules(files)
    return plan


class _Planner:
    """Builds the items of a plan."""

    def __init__(self, plan: MergePlan, entries: dict[str, Entry], into: str) -> None:
        self.plan, self.entries, self.into = plan, entries, into
        self.prefix = f"{plan.model.base_model_prefix}."
        self.modules = dict(plan.model.named_modules())
        self.params = plan.params
        self.requantized: set[str] = set()
        if into == "quantized" and plan.quant is not None and not plan.source.is_nf4:
            for module in quantizable(plan.model, plan.quant):
                self.requantized |= {f"{module}.{leaf}" for leaf in ("weight", *PROJECTIONS)}
        self.by_param: dict[str, Item] = {}

    def add_weights(self) -> None:
        """One item per weight of the checkpoint that the model uses, or that costs nothing."""
        source, classifier = self.plan.source, self.plan.num_labels is not None
        stacks: dict[str, dict[int, str]] = {}
        for name, entry in self.entries.items():
            if entry.part is not None and entry.param in self.requantized:
                stacks.setdefault(entry.param, {})[entry.part] = name
        opened = {param: _Stack(self, param, parts) for param, parts in stacks.items()}
        for name, entry in self.entries.items():
            if entry.param is None and classifier:
                continue  # the head of another task
            if name in source.quantized_names():
                item = self._stored_nf4(entry)
            elif entry.param in opened:
                item = self._item(entry, opened[entry.param].opener(entry))
                item.decoded = True
            elif entry.param in self.requantized:
                item = self._requantized(entry)
            else:
                item = self._item(entry, partial(self.stored, name))
            self.plan.items.append(item)
            if entry.param is not None and entry.part is None:
                self.by_param[entry.param] = item

    def stored(self, name: str) -> Rows:
        """A float tensor of the source, as the model saw it."""
        seen_as = self.plan.compute if self.into == "quantized" else None
        return self.plan.stored_rows(name, seen_as)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype that decoded values were rounded to."""
        return self.plan.compute or torch.float32

    def _item(self, entry: Entry, open_rows: Callable[[], Rows]) -> Item:
        info = self.plan.source.tensors[entry.name]
        columns = as_matrix(info.shape)[1]
        block = self.plan.quant.block_size if self.plan.quant is not None else 1
        return Item(
            name=entry.name,
            shape=info.shape,
            dtype=info.dtype,
            param=entry.param,
            stored=entry.name,
            part=entry.part or 0,
            cast=info.dtype.is_floating_point and entry.param in self.params,
            step=rows_step(columns, block) if columns else 1,
            open_rows=open_rows,
            raw=lambda: self.plan.source.read(entry.name),
        )

    def _requantized(self, entry: Entry) -> Item:
        """A linear weight that training had quantized."""
        self._refuse_opaque(entry)
        config = self.plan.quant
        assert config is not None
        assert entry.param is not None
        name, dtype = entry.name, self.compute_dtype

        def open_rows() -> Rows:
            if not self.is_transposed(entry.param):
                rows = self.plan.stored_rows(name)
                weight = nf4_weight([rows], config, shape=rows.shape, dtype=dtype, name=name)
                return Decoded.of(weight, dtype)
            matrix = self.plan.source.read(name).to(self.plan.device).T.contiguous()
            weight = quantize_weight(
                matrix, block_size=config.block_size, double_quant=config.double_quant, name=name
            )
            return InMemory(weight.dequantize(dtype).T)

        item = self._item(entry, open_rows)
        item.decoded = True
        return item

    def _stored_nf4(self, entry: Entry) -> Item:
        """A weight the checkpoint holds as NF4."""
        source, name = self.plan.source, entry.name
        transposed = self.is_transposed(entry.param)
        dtype = self.compute_dtype

        def weight() -> NF4Weight:
            found = source.read_weight(name)
            assert isinstance(found, NF4Weight)
            return found.to(self.plan.device)

        def open_rows() -> Rows:
            found = weight()
            return InMemory(found.dequantize(dtype).T) if transposed else Decoded.of(found, dtype)

        shape = source.weight_shape(name)
        shape = shape[::-1] if transposed else shape
        block_size = source.quant_of(name).block_size
        return Item(
            name=name,
            shape=shape,
            dtype=source.weight_dtype(name),
            param=entry.param,
            stored=name,
            decoded=True,
            step=1 if transposed else rows_step(as_matrix(shape)[1], block_size),
            open_rows=open_rows,
            raw=lambda: weight().dequantize(),
        )

    def is_transposed(self, param: str | None) -> bool:
        """Whether a parameter is stored as (in, out)."""
        return param is not None and is_transposed(self.modules[param.rpartition(".")[0]])

    def _refuse_opaque(self, entry: Entry) -> None:
        if entry.opaque:
            raise FormatError(
                f"{entry.name} is converted to {entry.param} while loading, in a way a streamed "
                "merge does not follow. Load the model, save it with save_pretrained(folder, "
                "save_original_format=False), and merge into that folder."
            )

    def add_changes(self, files: AdapterFiles) -> None:
        """Attach every low-rank change to the item it belongs to."""
        tied = {n for pair in self.plan.model.all_tied_weights_keys.items() for n in pair}
        for module, pair in files.deltas.items():
            name = self._module_name(module)
            item = self.by_param.get(f"{name}.weight")
            if item is None or f"{name}.weight" in tied:
                raise AdapterError(
                    f"the adapter changes {module}, whose weight is tied to the embeddings or "
                    f"missing from {self.plan.source.folder}. Merging would untie it; train "
                    "without this module."
                )
            self._refuse_opaque(self.entries[item.name])
            item.transposed = pair.embedding or self.is_transposed(item.param)
            expected = item.shape[::-1] if item.transposed else item.shape
            if (pair.b.shape[0], pair.a.shape[1]) != tuple(expected):
                raise AdapterError(
                    f"{module} is {tuple(expected)} (out, in) in {self.plan.source.folder}, but "
                    f"the adapter was trained on {(pair.b.shape[0], pair.a.shape[1])}. It belongs "
                    f"to another base{_named(files)}."
                )
            item.pair = pair.folded()

    def _module_name(self, module: str) -> str:
        """The adapter's name of a module as the model's, with or without the base's prefix."""
        for name in (module, self.prefix + module, module.removeprefix(self.prefix)):
            if name in self.modules:
                return name
        raise AdapterError(
            f"{type(self.plan.model).__name__} has no module {module!r}, which the adapter changes."
        )

    def replace_modules(self, files: AdapterFiles) -> None:
        """Take over tensors the adapter trained whole; a new head's are added."""
        shapes = {name: tuple(p.shape) for name, p in self.plan.model.named_parameters()}
        for name, value in files.modules.items():
            if name not in shapes or shapes[name] != tuple(value.shape):
                raise AdapterError(
                    f"the adapter trained {name} of shape {tuple(value.shape)}, the base has "
                    f"{shapes.get(name, 'none')}. It belongs to another base{_named(files)}."
                )
            item = self.by_param.get(name)
            if item is None:
                item = Item(
                    name=name,
                    shape=tuple(value.shape),
                    dtype=value.dtype,
                    param=name,
                    open_rows=partial(InMemory, value),
                    raw=value.detach,
                )
                self.plan.items.append(item)
            item.value, item.pair, item.decoded = value, None, False


class _Stack:
    """The members of one stacked parameter: their scales are decided together, once."""

    def __init__(self, planner: _Planner, param: str, parts: dict[int, str]) -> None:
        self.planner, self.param, self.parts = planner, param, parts
        self.rows: dict[str, Rows] = {}

    def opener(self, entry: Entry) -> Callable[[], Rows]:
        """Open one member; its scales are dropped with it."""

        def open_rows() -> Rows:
            if not self.rows:
                self._decide()
            return self.rows.pop(entry.name)

        return open_rows

    def _decide(self) -> None:
        planner, names = self.planner, [self.parts[part] for part in sorted(self.parts)]
        config = planner.plan.quant
        assert config is not None
        dtype = planner.compute_dtype
        members = [planner.plan.stored_rows(name) for name in names]
        stack = quantized_stack(members, config, dtype, self.param)
        self.rows = dict(zip(names, stack, strict=True))


def _quantization(
    source: Source, files: AdapterFiles | None, into: str, notes: list[str]
) -> QuantConfig | None:
    """How the base was quantized while the adapter was trained."""
    if source.is_nf4 and into == "original":
        named = files.base.path if files is not None else None
        raise FormatError(
            f"{source.folder} is a 4-bit model, which has no original weights to merge into. Name "
            f"the 16-bit model it was made from as the base"
            f"{f' (the adapter names {named})' if named else ''}, or merge into the quantized one."
        )
    if into == "original":
        return None
    if source.is_nf4:
        return QuantConfig()
    if files is None or not files.base.recorded:
        notes.append(
            "the adapter does not say how its base was quantized: NF4 with blocks of 64 and "
            "double quantization is assumed"
        )
        return QuantConfig()
    if files.base.quant is None:
        notes.append("the adapter was trained on an unquantized base: nothing is decoded")
    return files.base.quant


def _num_labels(files: AdapterFiles | None) -> int | None:
    """Classes of a classifier's head that was trained whole."""
    if files is None or files.task_type != "SEQ_CLS":
        return None
    weights = [value for name, value in files.modules.items() if name.endswith(".weight")]
    return weights[-1].shape[0] if weights else None


def _named(files: AdapterFiles) -> str:
    return f" ({files.base.path})" if files.base.path else ""
