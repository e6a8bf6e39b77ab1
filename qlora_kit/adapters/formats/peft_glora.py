"""GLoRA in PEFT's files, in both directions, where PEFT has the structure.

    base_model.model.<module>.glora_A.Xd, .Xu    <module>.A_d, <module>.A_u    of `lora`
    base_model.model.<module>.glora_A.X          <module>.A_d, <module>.D      of the others
    base_model.model.<module>.glora_A.zeros      nothing: PEFT's `none` is a matrix of zeros

PEFT gives A and B one form, D and E one form, all linears the same, and a linear without a
bias neither C nor E. An adapter of another structure, or a super-net, is written in our own
format (`own.py`), which PEFT refuses by name. PEFT runs GLoRA on `nn.Linear` alone, not
on 4-bit or GPT-2's layers; the files are the same.

Reading takes the forms from the tensors: a linear without a bias has C and E `none` then.

Source: peft 0.21.2, tuners/glora.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_kit.adapters.glora.config import FORMS, GLoRA, Structure
from qlora_kit.adapters.method import Method

PEFT_TYPE = "GLORA"

_PREFIX = "base_model.model."
_TO_PEFT = {"scalar": "constant"}
_LETTERS = tuple(letter.upper() for letter in FORMS)


@dataclass(frozen=True, slots=True)
class PeftGLoRA:
    """A GLoRA adapter as PEFT has it."""

    settings: dict[str, Any]
    """Fields of `adapter_config.json` that say what it is."""
    tensors: dict[str, Tensor]
    """Of `adapter_model.safetensors`."""


def to_peft(
    config: Method, tensors: Mapping[str, Tensor], module_names: tuple[str, ...]
) -> PeftGLoRA | None:
    """Say an adapter in PEFT's words.

    Args:
        config: of any method.
        tensors: `<module>.<key>` to tensor, heads included.
        module_names: modules trained whole.

    Returns:
        None where PEFT has no words for it, other methods included.

    Example:
        >>> import torch
        >>> found = to_peft(GLoRA(structure="scalar scalar none none none"),
        ...     {"q.A_d": torch.ones(1, 1), "q.B_d": torch.ones(1, 1)}, ())
        >>> found.settings["config_A_B"], list(found.tensors)
        ('constant', ['base_model.model.q.glora_A.X', 'base_model.model.q.glora_B.X'])
    """
    if not isinstance(config, GLoRA) or config.super_net or config.structures:
        return None
    wanted = Structure.parse(config.structure)
    if wanted.a != wanted.b or wanted.d != wanted.e:
        return None
    own = {n: t for n, t in tensors.items() if not any(f".{m}." in f".{n}" for m in module_names)}
    modules = sorted({name.rpartition(".")[0] for name in own})
    for module in modules:
        has_bias = f"{module}.D" in own  # nothing else tells: so C alone is not written
        if not has_bias and (wanted.c, wanted.e) != ("none", "none"):
            return None
    settings = {
        "peft_type": PEFT_TYPE,
        "r": config.rank,
        "target_modules": modules,
        "modules_to_save": list(module_names) or None,
        "config_A_B": _TO_PEFT.get(wanted.a, wanted.a),
        "config_C": wanted.c,
        "config_D_E": _TO_PEFT.get(wanted.d, wanted.d),
        "init_weights": True,
        "bias": "none",
        "inference_mode": True,
    }
    return PeftGLoRA(
        settings, {_peft_key(n, n not in own, tensors): t for n, t in _shaped(tensors)}
    )


def glora_config_json(
    found: PeftGLoRA, *, task_type: str | None, base_path: str | None, revision: str | None
) -> str:
    """Write the text of `adapter_config.json`.

    Args:
        found: of `to_peft`.
        task_type: PEFT's name of the task, or None.
        base_path: folder or hub id of the base.
        revision: of a hub id.

    Returns:
        JSON.

    Example:
        >>> text = glora_config_json(PeftGLoRA({"r": 4}, {}), task_type=None, base_path="base",
        ...     revision=None)
        >>> json.loads(text)["r"]
        4
    """
    base = {"task_type": task_type, "base_model_name_or_path": base_path, "revision": revision}
    return json.dumps(found.settings | base, indent=2) + "\n"


def from_peft(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str
) -> tuple[GLoRA, dict[str, Tensor]]:
    """Read an adapter that PEFT wrote, or we in its words.

    Args:
        fields: of `adapter_config.json`.
        tensors: of `adapter_model.safetensors`.
        dtype: of the tensors.

    Returns:
        config: with the adapted modules by name.
        tensors: by our names, heads last.

    Raises:
        ValueError: a tensor or setting that is not GLoRA's.

    Example:
        >>> import torch
        >>> config, own = from_peft({"r": 4}, {"base_model.model.q.glora_E.X": torch.ones(3)},
        ...     "float32")
        >>> config.structure, list(own)
        ('none none none none vector', ['q.E'])
    """
    if str(fields.get("bias", "none")) != "none":
        raise ValueError(f"trained biases (bias={fields['bias']!r}) are not supported.")
    heads, own = dict[str, Tensor](), dict[str, Tensor]()
    forms: dict[str, dict[str, str]] = {}
    for key, tensor in tensors.items():
        module, _, rest = key.removeprefix(_PREFIX).partition(".glora_")
        letter, _, part = rest.partition(".")
        if not key.startswith(_PREFIX) or (rest and letter not in _LETTERS):
            raise ValueError(f"unexpected tensor {key!r}.")
        if not rest:
            heads[module] = tensor
        elif part in ("Xd", "Xu"):
            own[f"{module}.{letter}_{part[1]}"] = tensor
            forms.setdefault(module, {})[letter] = "lora"
        elif part == "X":
            narrow = letter in "DE"
            name = f"{module}.{letter}" if narrow else f"{module}.{letter}_d"
            own[name] = tensor if narrow else tensor.reshape(-1, 1)
            form = "vector" if tensor.numel() > 1 else "scalar"
            forms.setdefault(module, {})[letter] = form
        elif part != "zeros":
            raise ValueError(f"unexpected tensor {key!r}.")
    if not forms:
        raise ValueError("there is no support in it.")
    texts = {
        module: " ".join(found.get(letter, "none") for letter in _LETTERS)
        for module, found in forms.items()
    }
    uniform = len(set(texts.values())) == 1
    config = GLoRA(
        rank=int(fields.get("r", 8)),  # PEFT's default
        structure=next(iter(texts.values())),
        structures={} if uniform else texts,
        targets=tuple(texts),
        dtype=dtype,
    )
    return config, own | heads


def _shaped(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """In PEFT's shapes: a scalar is (1,)."""
    return [
        (name, t.reshape(1) if name.endswith(("A_d", "B_d")) and t.numel() == 1 else t)
        for name, t in tensors.items()
    ]


def _peft_key(name: str, head: bool, tensors: Mapping[str, Tensor]) -> str:
    if head:
        return f"{_PREFIX}{name}"
    module, _, key = name.rpartition(".")
    letter, _, part = key.partition("_")
    last = f"X{part}" if f"{module}.{letter}_u" in tensors else "X"
    return f"{_PREFIX}{module}.glora_{letter}.{last}"
