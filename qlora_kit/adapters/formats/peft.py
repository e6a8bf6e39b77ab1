"""Adapter folders in PEFT's format: written whole or not at all, read without a model.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, which PEFT 0.21
loads, and our `qlora_kit.json` (see `peft_config`). The tensor names are defined here
and nowhere else:

    base_model.model.<module>.lora_A.weight   (r, in)    <module>.lora_A
    base_model.model.<module>.lora_B.weight   (out, r)   <module>.lora_B
    base_model.model.<module>.lora_magnitude_vector (out,) <module>.lora_magnitude, of DoRA
    base_model.model.<module>.lora_embedding_A (r, V)    <module>.lora_embedding_A
    base_model.model.<module>.lora_embedding_B (H, r)    <module>.lora_embedding_B
    base_model.model.<module>.lora_A, .lora_E, .lora_B     AdaLoRA's Q (r, in), λ (r, 1), P
    base_model.model.<name>                              <name>, of a module saved whole

`read_adapter` needs no model, so that a merge can stream; `AdapterFiles.deltas` holds
the low-rank pairs with their scale already worked out. The shapes of the tensors and
the ranks of the configuration must agree: a file that contradicts itself is refused.
Pickle files (`adapter_model.bin`) are never opened.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from qlora_kit import __version__
from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.formats import peft_glora
from qlora_kit.adapters.formats.folder import (
    CONFIG_FILE,
    SIDE_FILE,
    WEIGHTS_FILE,
    read_tensors,
    weights_path,
)
from qlora_kit.adapters.formats.lora_variants import plain_config, with_own
from qlora_kit.adapters.formats.own import OWN_TYPE, own_config_json, parse_own_config
from qlora_kit.adapters.formats.pairs import dtype_name, pair_up
from qlora_kit.adapters.formats.peft_adalora import with_side_fields
from qlora_kit.adapters.formats.peft_config import (
    BaseInfo,
    parse_peft_config,
    parse_side_file,
    peft_config_json,
    read_json,
    side_file_json,
)
from qlora_kit.adapters.formats.peft_glora import glora_config_json, to_peft
from qlora_kit.adapters.formats.peft_prompt import (
    KEY,
    PEFT_TYPES,
    parse_prompt,
    peft_prompt_type,
    prompt_config_json,
    prompt_sizes,
)
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.adapters.method import Method
from qlora_kit.core.atomic import atomic_directory, atomic_write_text
from qlora_kit.core.errors import FormatError, SourceError

_PREFIX = "base_model.model."
_EMBEDDING = ".base_layer.weight"
_PAIR = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude": ".lora_magnitude_vector",
    "lora_E": ".lora_E",
    "lora_embedding_A": ".lora_embedding_A",
    "lora_embedding_B": ".lora_embedding_B",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter folder in memory, independent of any model."""

    config: Method
    """Method and sizes. `targets` names every adapted module."""
    deltas: dict[str, LowRank]
    """Module name to its low-rank change."""
    modules: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name to value, for modules saved whole (`classifier.weight`)."""
    module_names: tuple[str, ...] = ()
    """The modules that `modules` belongs to (`classifier`)."""
    base: BaseInfo = field(default_factory=BaseInfo)
    """The base the adapter was trained against."""
    task_type: str | None = None
    """PEFT's name of the task."""
    fan_in_fan_out: bool = False
    """Whether the checkpoint of the base stores the adapted weights as (in, out)."""
    target_modules: tuple[str, ...] = ()
    """Short endings for PEFT that select the same modules; empty: full names are written."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Of the model, for a prefix or a prompt: PEFT's `token_dim` and its like."""


def peft_key(name: str) -> str:
    r"""Translate a parameter name of ours into PEFT's.

    Args:
        name: `<module>.lora_A`, `.lora_B`, `.lora_magnitude`, or a parameter of a module
            saved whole.

    Returns:
        The key in `adapter_model.safetensors`.

    Example:
        >>> print(peft_key("model.layers.0.q_proj.lora_A"), peft_key("classifier.weight"), sep="\n")
        base_model.model.model.layers.0.q_proj.lora_A.weight
        base_model.model.classifier.weight
    """
    module, _, last = name.rpartition(".")
    return f"{_PREFIX}{module}{_PAIR[last]}" if last in _PAIR else f"{_PREFIX}{name}"


def own_name(key: str) -> str | None:
    """Translate a key of PEFT's file into our parameter name.

    Args:
        key: as in `adapter_model.safetensors`.

    Returns:
        The name, or None for a key that is not PEFT's.

    Example:
        >>> own_name("base_model.model.model.layers.0.q_proj.lora_A.weight")
        'model.layers.0.q_proj.lora_A'
    """
    if not key.startswith(_PREFIX):
        return None
    name = key.removeprefix(_PREFIX)
    for last, ending in _PAIR.items():
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}.{last}"
    return name


def write_adapter(folder: Path | str, files: AdapterFiles, *, overwrite: bool = False) -> None:
    """Write an adapter folder that PEFT and `read_adapter` read.

    A new folder appears whole. Inside an existing folder (a training checkpoint, say) the
    files are replaced one by one and `adapter_config.json`, without which nobody takes
    the folder for an adapter, comes last.

    Args:
        folder: created if needed.
        files: what to write. Tensors keep their dtype.
        overwrite: replace an adapter that is already there.

    Raises:
        SourceError: an adapter is already there and overwrite is False.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> pair = LowRank(torch.ones(2, 8), torch.ones(4, 2), 1.0)
        >>> write_adapter(folder, AdapterFiles(config=LoRA(rank=2, alpha=2), deltas={"proj": pair}))
        >>> sorted(p.name for p in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'qlora_kit.json']
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        if (folder / CONFIG_FILE).exists() and not overwrite:
            raise SourceError(
                f"{folder} already holds an adapter. Choose another folder, remove it, or allow "
                "overwriting."
            )
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        _write_files(folder, files)
        return
    with atomic_directory(folder) as partial:
        _write_files(partial, files)


def _write_files(folder: Path, files: AdapterFiles) -> None:
    lora = isinstance(files.config, LoRA)
    tensors = {peft_key(name) if lora else name: _own(t) for name, t in files.modules.items()}
    if peft_prompt_type(files.config, files.module_names) is not None:
        tensors = dict.fromkeys([KEY], next(iter(tensors.values())))
    glora = to_peft(files.config, files.modules, files.module_names)
    if glora is not None:
        tensors = {name: _own(t) for name, t in glora.tensors.items()}
    for module, pair in files.deltas.items():
        named = {f"{module}.{key}": t for key, t in pair.named().items()}
        plain = pair.values is not None  # PEFT keeps AdaLoRA's as parameters, not as modules
        tensors |= {f"{_PREFIX}{n}" if plain else peft_key(n): _own(t) for n, t in named.items()}
    partial = folder / f"{WEIGHTS_FILE}.partial-{os.getpid()}"
    try:
        save_file(dict(sorted(tensors.items())), partial, metadata={"format": "pt"})
        partial.replace(folder / WEIGHTS_FILE)
    finally:
        partial.unlink(missing_ok=True)
    atomic_write_text(folder / SIDE_FILE, side_file_json(files.config, files.base, __version__))
    atomic_write_text(folder / CONFIG_FILE, _config_text(files))


def _config_text(files: AdapterFiles) -> str:
    kind = peft_prompt_type(files.config, files.module_names)
    if kind is not None:
        return prompt_config_json(
            kind,
            files.config,
            files.sizes,
            task_type=files.task_type,
            base_path=files.base.path,
            revision=files.base.revision,
        )
    glora = to_peft(files.config, files.modules, files.module_names)
    if glora is not None:
        return glora_config_json(
            glora,
            task_type=files.task_type,
            base_path=files.base.path,
            revision=files.base.revision,
        )
    if not isinstance(files.config, LoRA):
        return own_config_json(
            files.config,
            modules_to_save=files.module_names,
            task_type=files.task_type,
            base_path=files.base.path,
            revision=files.base.revision,
        )
    sizes = {module: (pair.a.shape[0], pair.scale) for module, pair in files.deltas.items()}
    adaptive = isinstance(files.config, AdaLoRA)
    return peft_config_json(
        files.config if adaptive else plain_config(files.config, sizes),
        target_modules=files.target_modules or tuple(sorted(files.deltas)),
        modules_to_save=files.module_names,
        task_type=files.task_type,
        fan_in_fan_out=files.fan_in_fan_out,
        base=files.base,
    )


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def read_adapter(folder: Path | str) -> AdapterFiles:
    """Read an adapter folder, ours or one that PEFT wrote, without any model.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The adapter; tensors on the CPU in the file's dtype.

    Raises:
        SourceError: a file is missing, or the weights are a pickle.
        FormatError: not a LoRA adapter, a variant we would compute differently, unknown
            or missing tensors, or shapes and configuration that contradict each other.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> pair = LowRank(torch.ones(2, 8), torch.ones(4, 2), 1.0)
        >>> write_adapter(folder, AdapterFiles(config=LoRA(rank=2, alpha=2), deltas={"proj": pair}))
        >>> read_adapter(folder).deltas["proj"].scale
        1.0
    """
    folder = Path(folder)
    weights = weights_path(folder)
    where = folder / CONFIG_FILE
    fields = read_json(where)
    method, base, side = "lora", BaseInfo(), dict[str, Any]()
    if (folder / SIDE_FILE).exists():
        side = read_json(folder / SIDE_FILE)
        method, base = parse_side_file(side, where=folder / SIDE_FILE)
    if base.path is None:
        path, revision = fields.get("base_model_name_or_path"), fields.get("revision")
        base = replace(base, path=path, revision=revision)
    if fields.get("peft_type") == OWN_TYPE:
        return _read_own(fields, weights, base)
    if fields.get("peft_type") == peft_glora.PEFT_TYPE:
        return _read_glora(fields, weights, base)
    if fields.get("peft_type") in PEFT_TYPES:
        prompt, own = parse_prompt(fields, read_tensors(weights), folder)
        task = fields.get("task_type")
        sizes = prompt_sizes(fields)
        return AdapterFiles(
            config=prompt, deltas={}, modules=own, base=base, task_type=task, sizes=sizes
        )
    config = parse_peft_config(fields, method=method, where=where)
    if isinstance(config, AdaLoRA):
        config = with_side_fields(config, side)
    tensors = read_tensors(weights)
    saved = tuple(fields.get("modules_to_save") or ())
    pairs, modules = _sort_tensors(tensors, saved, weights)
    deltas = pair_up(pairs, config, weights)
    config = replace(
        with_own(config, side, where=folder / SIDE_FILE),
        targets=tuple(deltas),
        train_modules=tuple(m for m in saved if _belongs(m, modules)),
        dtype=dtype_name(next(iter(deltas.values())).a.dtype, weights),
    )
    return AdapterFiles(
        config=config,
        deltas=deltas,
        modules=modules,
        module_names=config.train_modules,
        base=base,
        task_type=fields.get("task_type"),
        fan_in_fan_out=bool(fields.get("fan_in_fan_out", False)),
        target_modules=_listed(fields.get("target_modules")),
    )


def _read_own(fields: Mapping[str, Any], weights: Path, base: BaseInfo) -> AdapterFiles:
    saved = tuple(fields.get("modules_to_save") or ())
    tensors = read_tensors(weights)
    # heads last: the last of their weights tells how many classes there are
    order = sorted(tensors, key=lambda name: any(name.startswith(f"{m}.") for m in saved))
    return AdapterFiles(
        config=parse_own_config(fields, where=weights.parent / CONFIG_FILE),
        deltas={},
        modules={name: tensors[name] for name in order},
        module_names=saved,
        base=base,
        task_type=fields.get("task_type"),
    )


def _read_glora(fields: Mapping[str, Any], weights: Path, base: BaseInfo) -> AdapterFiles:
    tensors = read_tensors(weights)
    try:
        dtype = dtype_name(next(iter(tensors.values())).dtype, weights) if tensors else "float32"
        config, modules = peft_glora.from_peft(fields, tensors, dtype)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{weights}: {error}") from error
    return AdapterFiles(
        config=config,
        deltas={},
        modules=modules,
        module_names=tuple(fields.get("modules_to_save") or ()),
        base=base,
        task_type=fields.get("task_type"),
    )


def _sort_tensors(
    tensors: Mapping[str, Tensor], saved: tuple[str, ...], where: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, Tensor] = {}
    adapted = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    for key, tensor in tensors.items():
        if key.removesuffix(_EMBEDDING) in adapted:
            continue  # PEFT saves the table of an adapted embedding, frozen, beside the pair
        name = own_name(key)
        module, _, last = (name or "").rpartition(".")
        if name is not None and last in _PAIR:
            pairs.setdefault(module, {})[last] = tensor
        elif name is not None and any(_belongs(m, (name,)) for m in saved):
            modules[name] = tensor
        else:
            raise FormatError(
                f"{where}: unexpected tensor {key!r}. Expected lora_A and lora_B pairs and the "
                f"modules named in modules_to_save ({', '.join(saved) or 'none'})."
            )
    return pairs, modules


def _belongs(module: str, names: Mapping[str, Tensor] | tuple[str, ...]) -> bool:
    """Whether a parameter lies in a module given by its name or the ending of it."""
    return any(f".{module}." in f".{name}" for name in names)


def _listed(value: object) -> tuple[str, ...]:
    """PEFT's `target_modules`: a list, or one regular expression, which we expand to names."""
    return tuple(str(v) for v in value) if isinstance(value, list) else ()
