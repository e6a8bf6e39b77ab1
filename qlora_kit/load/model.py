"""`load`: from a path or a hub id to a model on a 4-bit base and its tokenizer.

One function for every kind of source. A 16-bit checkpoint is quantized weight by
weight as it streams in; a bitsandbytes 4-bit checkpoint and a model this package
saved are taken over bit for bit; a GGUF file is converted first. transformers
does the reading, through the quantizer in `hf_quantizer`.

transformers is lenient: it initialises missing weights at random and says so in
a log line. A base model with random layers trains without complaint and answers
with noise, so here it is an error, except for the new head of a classifier.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from qlora_kit.checkpoint.source import Source, open_source
from qlora_kit.core.errors import ConfigError, FormatError
from qlora_kit.load.hf_quantizer import NF4Config
from qlora_kit.load.report import check_report
from qlora_kit.load.tokenizer import load_tokenizer, settle_pad_token
from qlora_kit.quant.config import QuantConfig

Task = Literal["causal_lm", "sequence_classification"]

_AUTO: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path_or_id: str | Path,
    *,
    quant: QuantConfig | None = QuantConfig(),  # noqa: B008  frozen
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    task: Task = "causal_lm",
    num_labels: int | None = None,
    revision: str | None = None,
    attn: str | None = None,
    adapter: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model on a 4-bit base, and its tokenizer.

    Weights that go to a GPU are quantized there and need 128 MiB of host memory on the
    way; on a CPU, memory peaks at what is loaded so far plus the largest tensor. Custom
    code from the hub is never run.

    Args:
        path_or_id: a folder of safetensors, a `.gguf` file, or a hub id. The folder
            may be 16-bit, bitsandbytes 4-bit (nf4), or saved by this package.
        quant: how linears are stored; None for a 16-bit base. A checkpoint that is
            NF4 already keeps its own settings, and is decoded if this is None.
        dtype: everything else is stored in, and computation runs in: `float32`,
            `bfloat16`, `float16`, or `auto` for bfloat16 on a GPU, float32 on a CPU.
        device: `auto` for the current GPU if there is one, else the CPU.
        task: `causal_lm` or `sequence_classification`.
        num_labels: of a classifier; as the checkpoint says if None.
        revision: branch, tag or commit of a hub id.
        attn: transformers' attention implementation, such as `sdpa`.
        adapter: folder of an adapter in PEFT's format to attach.

    Returns:
        model: in evaluation mode on `device`; its NF4 weights are frozen.
        tokenizer: with a pad token, its chat template kept; None if there is none.

    Raises:
        SourceError: nothing loadable is at `path_or_id`.
        FormatError: the checkpoint is damaged, incomplete, of an unknown architecture
            or quantized in another way.
        ConfigError: an argument does not fit the model.
        NonFiniteError: a weight to be quantized holds NaN or infinity.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        ...                      num_attention_heads=1, vocab_size=32)
        >>> folder = tempfile.mkdtemp()
        >>> LlamaForCausalLM(config).save_pretrained(folder)
        >>> model, tokenizer = load(folder)
        >>> type(model.model.layers[0].mlp.up_proj).__name__, tokenizer
        ('NF4Linear', None)
    """
    if task not in _AUTO:
        raise ConfigError(f"task must be one of {', '.join(_AUTO)}, got {task!r}.")
    place = _device(device)
    compute = _dtype(dtype, place)
    source = open_source(path_or_id, revision=revision)
    config = _config(source, task, num_labels)
    if source.is_nf4:
        config.quantization_config = NF4Config.from_quant(quant or QuantConfig()).to_dict()
    options: dict[str, Any] = {} if attn is None else {"attn_implementation": attn}
    if quant is not None and not source.is_nf4:
        options["quantization_config"] = NF4Config.from_quant(quant)
    model = _from_pretrained(source, task, config, compute, place, options)
    if source.is_nf4 and quant is None:
        model = model.dequantize(compute)
    tokenizer = load_tokenizer(source.folder)
    if tokenizer is not None:
        settle_pad_token(tokenizer, model)
    if adapter is not None:
        from qlora_kit.adapters.inject import load_adapter

        load_adapter(model, adapter)
    return model, tokenizer


def _device(device: str | torch.device) -> torch.device:
    """The device meant, checked to exist."""
    if device == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else (torch.device("cpu"))
        )
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device {device!r} is not one: write auto, cpu, cuda or cuda:1."
        ) from error
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            raise ConfigError(
                f"device {str(device)!r} is not here: torch sees {count} CUDA devices. Use "
                "device='auto', or install torch for your CUDA version."
            )
        place = torch.device("cuda", place.index if place.index is not None else 0)
    return place


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype meant, `auto` resolved."""
    if isinstance(dtype, str) and dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}, got {dtype!r}.")
    assert isinstance(found, torch.dtype)
    return found


def _config(source: Source, task: str, num_labels: int | None) -> PreTrainedConfig:
    """The model's configuration, for an architecture that has the task."""
    kind = source.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        remote = (
            " It brings its own code, which is never run; ask for support of the architecture."
            if "auto_map" in source.config
            else " A newer transformers may know it."
        )
        raise FormatError(
            f"{source.folder} has model_type {kind!r}, which transformers does not know.{remote}"
        )
    if num_labels is not None and task != "sequence_classification":
        raise ConfigError(f"num_labels is for sequence_classification, not for {task}.")
    options = {} if num_labels is None else {"num_labels": num_labels}
    try:
        config = AutoConfig.from_pretrained(source.folder, **options)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise FormatError(f"{source.folder / 'config.json'} cannot be used: {error}") from error
    if type(config) not in _AUTO[task]._model_mapping:
        raise ConfigError(
            f"transformers has no {task} model of type {kind!r}; choose another task."
        )
    return config


def _from_pretrained(
    source: Source,
    task: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
) -> PreTrainedModel:
    """Let transformers load, its report kept quiet and turned into errors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, report = _AUTO[task].from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise ConfigError(f"loading needs a package that is not installed: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_report(model, report, source.folder)
    assert isinstance(model, PreTrainedModel)
    return model
