"""PEFT's `adapter_config.json` for LoRA, and our side file: JSON to dataclasses and back.

PEFT selects modules and overrides ranks by regular expressions where we have name
endings and `re:` patterns; the translation in both directions is here and exact: a
pattern of ours becomes one that PEFT matches to the same modules, and the reverse.

Reading is strict about what changes the result and tolerant about the rest: fields of
other versions, hints for other libraries and training-only settings are ignored;
quantization-aware starts that rewrite the base (PiSSA, OLoRA, LoftQ, ...), biases and
everything else this package would silently compute differently are refused by name.

`qlora_kit.json` beside it records what PEFT's format has no place for: the method, and
which base the adapter was trained against (path, revision, how it was quantized, its
dtype), so that a merge can rebuild exactly that base.

Source: peft 0.21.2, tuners/lora/config.py and utils/other.py (`get_pattern_key`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.adapters.adalora.config import AdaLoRA
from qlora_kit.adapters.formats.lora_variants import own_fields
from qlora_kit.adapters.formats.peft_adalora import (
    PEFT_TYPE,
    adalora_fields,
    parse_adalora,
    side_fields,
)
from qlora_kit.adapters.lora.config import DoRA, LoRA
from qlora_kit.adapters.method import Method
from qlora_kit.adapters.registry import METHODS, OTHERS, method_name
from qlora_kit.core.errors import FormatError
from qlora_kit.quant.config import QuantConfig

FORMAT_VERSION = 1
"""Of `qlora_kit.json`. A reader refuses newer versions."""

_UNSUPPORTED = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias on lora_B",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained tokens",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
_BASE_CHANGING_STARTS = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseInfo:
    """The base model an adapter was trained against.

    Example:
        >>> BaseInfo(path="models/base").recorded
        False
    """

    path: str | None = None
    """Folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    quant: QuantConfig | None = None
    """How the base was stored; None: not quantized, or unknown."""
    dtype: str | None = None
    """Compute dtype of the base, such as `bfloat16`; None: unknown."""
    recorded: bool = False
    """Whether `quant` and `dtype` were recorded; False for adapters not made here."""


def peft_pattern(pattern: str) -> str:
    r"""Translate a module pattern of ours into PEFT's `(.*\.)?(pattern)$`.

    Args:
        pattern: an ending of whole name parts, or `re:` and a regular expression.

    Returns:
        The key for PEFT's `rank_pattern` and `alpha_pattern`.

    Example:
        >>> print(peft_pattern("self_attn.q_proj"), peft_pattern(r"re:.*\.0\..*"))
        self_attn\.q_proj ^(?:.*\.0\..*)
    """
    if not pattern.startswith("re:"):
        return re.escape(pattern)
    body = pattern[3:]
    wrapped = re.fullmatch(r"\(\?:\.\*\\\.\)\?\(\?:(.*)\)", body)  # made by own_pattern
    return wrapped[1] if wrapped else f"^(?:{body})"


def own_pattern(pattern: str) -> str:
    r"""Translate a PEFT pattern into ours.

    Args:
        pattern: a key of PEFT's `rank_pattern` or `alpha_pattern`.

    Returns:
        A name ending where it is one, else a `re:` pattern.

    Example:
        >>> print(own_pattern(r"self_attn\.q_proj"), own_pattern("q_proj|v_proj"))
        self_attn.q_proj re:(?:.*\.)?(?:q_proj|v_proj)
    """
    if re.fullmatch(r"\w+((\\\.|\.)\w+)*", pattern):
        return pattern.replace("\\.", ".")
    whole = re.fullmatch(r"\^\(\?:(.*)\)", pattern)  # made by peft_pattern
    return f"re:{whole[1]}" if whole else rf"re:(?:.*\.)?(?:{pattern})"


def peft_config_json(
    config: LoRA,
    *,
    target_modules: tuple[str, ...],
    modules_to_save: tuple[str, ...],
    task_type: str | None,
    fan_in_fan_out: bool,
    base: BaseInfo,
) -> str:
    """Write the text of `adapter_config.json`.

    Args:
        config: the method's configuration.
        target_modules: names or endings of the adapted modules.
        modules_to_save: names of modules saved whole.
        task_type: PEFT's name of the task, or None.
        fan_in_fan_out: whether the adapted modules store their weight (in, out).
        base: where the base came from.

    Returns:
        JSON. A LoRA-FA adapter reads as plain LoRA, which it is once trained.

    Example:
        >>> text = peft_config_json(LoRA(), target_modules=("q_proj",), modules_to_save=(),
        ...     task_type="CAUSAL_LM", fan_in_fan_out=False, base=BaseInfo(path="base"))
        >>> json.loads(text)["lora_alpha"]
        32
    """
    fields = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base.path,
        "revision": base.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": list(target_modules),
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": {peft_pattern(p): r for p, r in config.rank_pattern.items()},
        "alpha_pattern": {peft_pattern(p): _plain(a) for p, a in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": isinstance(config, DoRA),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
    }
    if isinstance(config, AdaLoRA):
        fields |= adalora_fields(config)
    return json.dumps(fields, indent=2) + "\n"


def side_file_json(config: Method, base: BaseInfo, version: str) -> str:
    """Write the text of `qlora_kit.json`.

    Args:
        config: the method's configuration.
        base: the base the adapter was trained against.
        version: of this package.

    Returns:
        JSON.

    Example:
        >>> json.loads(side_file_json(LoRA(), BaseInfo(quant=QuantConfig()), "0"))["method"]
        'lora'
    """
    fields = {
        "format_version": FORMAT_VERSION,
        "method": method_name(config),
        "quant": None if base.quant is None else asdict(base.quant),
        "base": {"path": base.path, "revision": base.revision},
        "dtype": base.dtype,
        "qlora_kit_version": version,
        **side_fields(config),
        **own_fields(config),
    }
    return json.dumps(fields, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        FormatError: the file is not a JSON object.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.json"
        >>> _ = file.write_text('{"r": 4}')
        >>> read_json(file)
        {'r': 4}
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{path} must hold a JSON object, not a {type(fields).__name__}.")
    return fields


def parse_peft_config(fields: Mapping[str, Any], *, method: str, where: Path) -> LoRA:
    """Turn the fields of `adapter_config.json` into a configuration.

    Args:
        fields: the JSON object; keys we do not know are ignored.
        method: from the side file; `lora` without one.
        where: the file, for messages.

    Returns:
        Rank, alpha, patterns, dropout and targets. The dtype is not known here.

    Raises:
        FormatError: not LoRA, or a variant with another forward.

    Example:
        >>> parse_peft_config({"peft_type": "LORA", "r": 4}, method="lora", where=Path("x")).rank
        4
    """
    kind = fields.get("peft_type")
    if kind not in ("LORA", PEFT_TYPE):
        raise FormatError(
            f"{where}: peft_type is {kind!r}; only LORA (LoRA, rsLoRA, LoRA-FA, "
            "DoRA) and ADALORA adapters are supported."
        )
    refused = [what for key, what in _UNSUPPORTED.items() if fields.get(key)]
    if str(fields.get("bias", "none")) != "none":
        refused.append(f"trained biases (bias={fields['bias']!r})")
    start = str(fields.get("init_lora_weights", True)).lower()
    if start.startswith(_BASE_CHANGING_STARTS):
        refused.append(f"a start that changes the base (init_lora_weights={start!r})")
    if refused:
        raise FormatError(
            f"{where}: this adapter uses {', '.join(refused)}, which is not supported. Convert it "
            "to plain LoRA with the library that made it, or merge it there."
        )
    if kind == PEFT_TYPE:
        try:
            return parse_adalora(fields)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{where}: {error}") from error
    class_ = DoRA if fields.get("use_dora") else METHODS[method]
    try:
        return class_(
            rank=int(fields.get("r", 8)),  # 8 and 8: PEFT's defaults for what a file leaves out
            alpha=float(fields.get("lora_alpha", 8)),
            dropout=float(fields.get("lora_dropout") or 0.0),
            rslora=bool(fields.get("use_rslora", False)),
            rank_pattern={own_pattern(p): r for p, r in (fields.get("rank_pattern") or {}).items()},
            alpha_pattern={
                own_pattern(p): a for p, a in (fields.get("alpha_pattern") or {}).items()
            },
            init="gaussian" if start == "gaussian" else "kaiming",
        )
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from error


def parse_side_file(fields: Mapping[str, Any], *, where: Path) -> tuple[str, BaseInfo]:
    """Turn the fields of `qlora_kit.json` into the method's name and the base.

    Args:
        fields: the JSON object.
        where: the file, for messages.

    Returns:
        (method, base).

    Raises:
        FormatError: a newer format version, or a malformed field.

    Example:
        >>> text = side_file_json(LoRA(), BaseInfo(path="base", quant=QuantConfig()), "0")
        >>> parse_side_file(json.loads(text), where=Path("x"))[1].quant == QuantConfig()
        True
    """
    version = fields.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise FormatError(
            f"{where}: format_version is {version!r}; this version reads up to {FORMAT_VERSION}. "
            "Upgrade qlora_kit, or remove the file to read the folder as a plain PEFT adapter."
        )
    method = fields.get("method")
    known = [*METHODS, *OTHERS]
    if method not in known:
        raise FormatError(f"{where}: unknown method {method!r}; known: {', '.join(known)}.")
    base = fields.get("base") or {}
    quant = fields.get("quant")
    try:
        info = BaseInfo(
            path=base.get("path"),
            revision=base.get("revision"),
            quant=None if quant is None else _quant_config(quant),
            dtype=fields.get("dtype"),
            recorded=True,
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from error
    return method, info


def _quant_config(fields: Mapping[str, Any]) -> QuantConfig:
    return QuantConfig(
        block_size=fields["block_size"],
        double_quant=fields["double_quant"],
        skip=tuple(fields.get("skip", ())),
        target=tuple(fields.get("target", ())),
    )


def _plain(value: float) -> float | int:
    """An integer where it is one: other readers of the format expect `lora_alpha: 16`."""
    return int(value) if float(value).is_integer() else value
