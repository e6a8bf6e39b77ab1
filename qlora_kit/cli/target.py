"""What `eval`, `chat` and `merge` are pointed at: a model, an adapter, or the folder of a run.

An adapter says which base it was trained on and how that base was stored, so
naming the adapter is enough. `--base-model` wins where the base has moved.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from qlora_kit.cli.arguments import Parser
from qlora_kit.cli.logs import quiet_progress
from qlora_kit.core.errors import ConfigError, DataError
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_kit.adapters.attached import AttachedAdapter
    from qlora_kit.adapters.multi_adapter.bank import AdapterBank

Task = Literal["causal_lm", "sequence_classification"]
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A base and, perhaps, an adapter for it."""

    base: str
    """Folder, `.gguf` file or hub id."""
    revision: str | None
    """Of a hub id."""
    adapter: Path | None
    """Folder of the adapter."""
    quant: QuantConfig | None
    """How the base is stored; None: as it is."""
    task: Task
    """What the model is for."""
    num_labels: int | None
    """Classes of a classifier that the adapter holds."""


def add_loading_arguments(parser: Parser) -> None:
    """Add the flags that say how a target is loaded.

    Args:
        parser: of a command.
    """
    group = parser.add_argument_group("loading")
    group.add_argument("--base-model", metavar="PATH", help="base of the adapter, if it has moved")
    group.add_argument(
        "--bits",
        choices=("4", "16"),
        help="store the base as NF4, or leave it as it is (default: as the adapter was trained; "
        "a model without adapter: as it is)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        metavar="NAME",
        help="computing in bfloat16, float16 or float32 (default: bfloat16 on a GPU, float32 on a "
        "CPU)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def find_adapter(path: str) -> Path | None:
    """Find the adapter a path names: its folder, or `adapter/` in the folder of a run.

    Args:
        path: what the user wrote.

    Returns:
        The adapter's folder; None when the path names a model.

    Example:
        >>> find_adapter("no/such/folder") is None
        True
    """
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / ADAPTER_FILE).is_file():
            return folder
    return None


def named_adapters(words: Sequence[str]) -> dict[str, Path]:
    """Read `NAME=PATH` words.

    Args:
        words: an adapter folder or the folder of a run after each `=`.

    Returns:
        Name to adapter folder.

    Raises:
        ConfigError: a word is malformed, a name comes twice or is `none`, or there is no adapter.

    Example:
        >>> named_adapters(["legal"])
        Traceback (most recent call last):
        qlora_kit.core.errors.ConfigError: --adapter takes NAME=PATH, got 'legal'.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path or " " in name:
            raise ConfigError(f"--adapter takes NAME=PATH, got {word!r}.")
        if name in found or name == "none":
            raise ConfigError(f"--adapter {name!r}: each adapter needs a name of its own.")
        folder = find_adapter(path)
        if folder is None:
            raise ConfigError(f"--adapter {name}: {path} holds no adapter ({ADAPTER_FILE}).")
        found[name] = folder
    return found


def run_settings(path: str) -> RunConfig | None:
    """Find the settings of the run that a target came from.

    Args:
        path: the folder of a run, or its `adapter` or `merged`.

    Returns:
        The run as it was started; None when the path belongs to no run.

    Example:
        >>> run_settings("no/such/folder") is None
        True
    """
    from qlora_kit.cli.run_config import build_config

    for folder in (Path(path), Path(path).resolve().parent):
        file = folder / "config.json"
        made = folder / "adapter"
        trained = (made / ADAPTER_FILE).is_file() or (made / "config.json").is_file()
        if trained and file.is_file():
            return build_config(json.loads(file.read_text(encoding="utf-8")))
    return None


def resolve_target(path: str, options: argparse.Namespace) -> Target:
    """Read what an adapter says of its base, or take the path for a model.

    Args:
        path: a model, an adapter or the folder of a run.
        options: the flags of `add_loading_arguments`.

    Returns:
        The target; nothing is loaded yet.

    Raises:
        ConfigError: the adapter does not name its base, or a base is given for a model.
    """
    folder = find_adapter(path)
    if folder is None:
        whole = Path(path) / "adapter"
        if (whole / "config.json").is_file():  # the run was a full fine-tuning
            path = str(whole)
        if options.base_model:
            raise ConfigError(f"--base-model goes with an adapter, and {path} is none.")
        in_nf4 = options.bits == "4" or (options.bits is None and _stored_as_nf4(path))
        return Target(
            base=path,
            revision=None,
            adapter=None,
            quant=QuantConfig() if in_nf4 else None,
            task=_task(path),
            num_labels=None,
        )
    from qlora_kit.adapters.formats.peft import read_adapter

    files = read_adapter(folder)
    base = options.base_model or files.base.path
    if base is None:
        raise ConfigError(f"{folder} does not name its base. Give it with --base-model PATH.")
    quant = files.base.quant if files.base.recorded else QuantConfig()
    if options.bits == "16":
        quant = None
    elif options.bits == "4":
        quant = quant or QuantConfig()
    heads = [v.shape[0] for k, v in files.modules.items() if k.endswith(".weight")]
    classifier = files.task_type == "SEQ_CLS"
    return Target(
        base=base,
        revision=None if options.base_model else files.base.revision,
        adapter=folder,
        quant=quant,
        task="sequence_classification" if classifier else "causal_lm",
        num_labels=heads[-1] if classifier and heads else None,
    )


def _stored_as_nf4(path: str) -> bool:
    from qlora_kit.checkpoint.source import open_source

    return open_source(path).is_nf4


def _task(path: str) -> Task:
    """A classifier says so in its configuration."""
    from qlora_kit.checkpoint.source import open_source

    names = open_source(path).config.get("architectures") or []
    is_classifier = any(str(name).endswith("ForSequenceClassification") for name in names)
    return "sequence_classification" if is_classifier else "causal_lm"


def load_target(
    target: Target, options: argparse.Namespace, others: Mapping[str, Path] | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, AttachedAdapter | AdapterBank | None]":
    """Load a target.

    Args:
        target: from `resolve_target`.
        options: the flags of `add_loading_arguments`.
        others: more adapters for the same base, by name.

    Returns:
        model: in evaluation mode.
        tokenizer: saved with the adapter if there is one, else the base's.
        adapter: None when the target has none. With others a bank, in which the target's is
            called after its folder and answers; or the first of the others does.

    Raises:
        ConfigError: one of the others has the name of the target's.
        DataError: there is no tokenizer.
    """
    from qlora_kit.adapters.inject import load_adapter
    from qlora_kit.adapters.multi_adapter.load import load_adapters
    from qlora_kit.load.model import load
    from qlora_kit.load.tokenizer import load_tokenizer

    quiet_progress()
    model, tokenizer = load(
        target.base,
        quant=target.quant,
        dtype=options.dtype,
        device=options.device,
        task=target.task,
        num_labels=target.num_labels,
        revision=target.revision,
    )
    adapter: AttachedAdapter | AdapterBank | None = None
    if others:
        adapter = load_adapters(model, _with_own(target, others))
        adapter.use(adapter.names[0])
    elif target.adapter is not None:
        adapter = load_adapter(model, target.adapter)
    if target.adapter is not None and (target.adapter / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(target.adapter) or tokenizer
    model.eval()
    if tokenizer is None:
        raise DataError(f"{target.base} has no tokenizer. Copy its tokenizer files there.")
    return model, cast("PreTrainedTokenizerBase", tokenizer), adapter


def class_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """Name the classes a model was saved with.

    Args:
        model: of any task.

    Returns:
        By id; empty if it has only numbers for them.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     vocab_size=16, id2label={0: "no", 1: "yes"})
        >>> class_names(BertForSequenceClassification(tiny))
        ('no', 'yes')
    """
    names = model.config.id2label or {}
    found = tuple(str(names[key]) for key in sorted(names))
    return () if all(name.startswith("LABEL_") for name in found) else found


def _with_own(target: Target, others: Mapping[str, Path]) -> dict[str, Path]:
    """All adapters, the target's first: called after its folder, or the run's it is in."""
    if target.adapter is None:
        return dict(others)
    folder = target.adapter.resolve()
    name = (folder.parent if folder.name == "adapter" else folder).name
    if name in others:
        raise ConfigError(f"--adapter {name!r}: this is what the adapter of the target is called.")
    return {name: target.adapter, **others}
