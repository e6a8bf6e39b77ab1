"""GGUF files, converted once to a safetensors folder.

GGUF is how llama.cpp ships models: block-quantized weights, configuration and
tokenizer in one file. Training needs plain weights under transformers' names, so
the file is converted once, into a cache, and everything else in this package
sees an ordinary folder.

Dequantization is the `gguf` package's, names and layout fixes (llama.cpp permutes
q and k, stores Gemma norms plus one) are transformers' tables; both are the
same in transformers 5.17 and 5.23. What is ours is the loop: one target tensor
at a time goes to disk, where `from_pretrained(gguf_file=...)` holds the whole
model in float32, and the check that every parameter of the model was found.

Weights stored as blocks become bfloat16, whose rounding is far below that of any
4- to 8-bit block format; weights stored as floats keep their dtype.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qlora_kit.checkpoint.gguf_tokenizer import build_tokenizer
from qlora_kit.checkpoint.tensor_file import TensorInfo
from qlora_kit.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardWriter
from qlora_kit.core.atomic import atomic_directory
from qlora_kit.core.errors import FormatError, SourceError
from qlora_kit.core.log import logger

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PretrainedConfig, PreTrainedModel

CONVERTER_VERSION = 1
"""Part of the cache key: raised whenever the result of a conversion changes."""
DECODE_VALUES = 4_000_000
"""Weights decoded at a time."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def cache_root() -> Path:
    """Folder for converted models: QLORA_KIT_CACHE, or qlora_kit in the user's cache folder.

    Returns:
        The folder; it may not exist yet.

    Example:
        >>> cache_root().name != ""
        True
    """
    if named := os.environ.get("QLORA_KIT_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_kit"


def convert_cached(file: Path) -> Path:
    """Convert a GGUF file, or find the result of an earlier conversion.

    The cache key is made of the file's size and of samples of its content, so a
    renamed, copied or re-downloaded file is found again.

    Args:
        file: the GGUF file.

    Returns:
        A folder with config.json, safetensors and tokenizer.

    Raises:
        FormatError: the file is no GGUF file, or its model is not supported.
        SourceError: the `gguf` package is missing.

    Example:
        >>> convert_cached(Path("none.gguf"))
        Traceback (most recent call last):
        qlora_kit.core.errors.SourceError: none.gguf does not exist.
    """
    if not file.is_file():
        raise SourceError(f"{file} does not exist.")
    folder = cache_root() / "gguf" / f"{file.stem}-{_fingerprint(file)}"
    if not (folder / "config.json").is_file():
        logger.info("converting %s once to %s", file.name, folder)
        convert_gguf(file, folder, overwrite=True)
    return folder


def convert_gguf(file: Path, out: Path, *, overwrite: bool = False) -> None:
    """Convert a GGUF file to a folder plain transformers loads.

    Args:
        file: the GGUF file.
        out: folder to create; it appears when it is complete.
        overwrite: replace `out` if it exists.

    Raises:
        FormatError: the file is no GGUF file, or its model is not supported.
        SourceError: the `gguf` package is missing.

    Example:
        >>> convert_gguf(Path(__file__), Path("out"))
        Traceback (most recent call last):
        qlora_kit.core.errors.FormatError: ... is not a GGUF file ...
    """
    reader = _open(file)
    with atomic_directory(out, overwrite=overwrite) as folder:
        fields = _fields(reader, "tokenizer.")
        tokenizer = build_tokenizer(file, fields)
        config, model = _skeleton(file, reader)
        tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or int(1e30)
        tokenizer.save_pretrained(folder)
        _write_weights(file, reader, config, model, folder)
        _write_configs(config, model, tokenizer, _stored_dtype(reader), folder)


def read_gguf_config(file: Path) -> "PretrainedConfig":
    """Read the configuration of a GGUF file's model; its weights are not touched.

    Args:
        file: the GGUF file.

    Returns:
        The configuration.

    Raises:
        FormatError: the file is no GGUF file, or its model is not supported.
        SourceError: the `gguf` package is missing.

    Example:
        >>> read_gguf_config(Path(__file__))
        Traceback (most recent call last):
        qlora_kit.core.errors.FormatError: ... is not a GGUF file ...
    """
    return _skeleton(file, _open(file))[0]


def _fingerprint(file: Path) -> str:
    """Hash of the size and of 64 evenly spread samples of 64 KiB."""
    size_bytes = file.stat().st_size
    digest = hashlib.sha256(f"{CONVERTER_VERSION}:{size_bytes}".encode())
    with file.open("rb") as stream:
        for i in range(64):
            stream.seek(size_bytes * i // 64)
            digest.update(stream.read(65536))
    return digest.hexdigest()[:16]


def _open(file: Path) -> "GGUFReader":
    """Map the file and parse its metadata."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise FormatError(
                f"{file} is not a GGUF file (it does not start with 'GGUF'). Download it again."
            )
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise SourceError(
            "reading GGUF files needs the `gguf` package: pip install gguf."
        ) from error
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} is damaged or truncated: {error}. Download it again.") from error


def _fields(reader: "GGUFReader", prefix: str) -> dict[str, Any]:
    """Metadata under a prefix, as Python values."""
    return {key: field.contents() for key, field in reader.fields.items() if key.startswith(prefix)}


def _skeleton(file: Path, reader: "GGUFReader") -> tuple["PretrainedConfig", "PreTrainedModel"]:
    """The configuration, by transformers' tables, and the model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        # transformers' tables leave the width of experts at its default.
        for key, width in _fields(reader, "").items():
            if key.endswith(".expert_feed_forward_length") and hasattr(
                config, "moe_intermediate_size"
            ):
                config.moe_intermediate_size = width
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise FormatError(
            f"{file}: this GGUF model is not supported ({error}). Use its safetensors release."
        ) from error
    return config, model


def _stored_dtype(reader: "GGUFReader") -> torch.dtype:
    """The model's dtype: the file's half type, float32 if all is float32, else bfloat16."""
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    if kinds <= set(_FLOATS):
        return next((_FLOATS[k] for k in ("BF16", "F16") if k in kinds), torch.float32)
    return torch.bfloat16


def _write_weights(
    file: Path,
    reader: "GGUFReader",
    config: "PretrainedConfig",
    model: "PreTrainedModel",
    folder: Path,
) -> None:
    """Dequantize, rename and write every parameter, one at a time."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = _fields(reader, "general.architecture")["general.architecture"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    sources: dict[str, list[ReaderTensor]] = {}
    for tensor in reader.tensors:
        target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if target is not None:
            sources.setdefault(target, []).append(tensor)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if missing := sorted(set(shapes) - set(sources)):
        raise FormatError(
            f"{file} ({architecture}) lacks {len(missing)} tensors that {type(model).__name__} "
            f"needs: {', '.join(missing[:5])}. Use the model's safetensors release."
        )
    dtypes = {
        name: _FLOATS.get(sources[name][0].tensor_type.name, torch.bfloat16) for name in shapes
    }
    infos = [TensorInfo(name, shape, dtypes[name]) for name, shape in shapes.items()]
    with ShardWriter(folder, infos, DEFAULT_SHARD_BYTES) as writer:
        for name in shapes:
            value = _convert_one(name, sources[name], processor, names)
            writer.write(name, value.to(dtypes[name]))


def _convert_one(
    target: str, sources: "list[ReaderTensor]", processor: Any, names: dict[str, str]
) -> Tensor:
    """Dequantize and lay out one parameter; fused experts come from two stored tensors."""
    parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
    for source in sources:
        result = processor.process(
            weights=_dequantize(source),
            name=source.name,
            tensor_key_mapping=names,
            parsed_parameters=parsed,
        )
        if result.name is not None:
            # A tensor stored as floats is a read-only view of the mapped file.
            weights = np.ascontiguousarray(result.weights)
            return torch.from_numpy(weights if weights.flags.writeable else weights.copy())
    return parsed["tensors"][target]


def _dequantize(source: "ReaderTensor") -> "np.ndarray":
    """Decode one stored tensor to float32, by parts: the decoders' temporaries are several times
    their output.
    """
    from gguf import dequantize

    data = source.data
    rows = max(1, DECODE_VALUES * len(data) // max(1, int(source.n_elements)))
    if data.ndim < 2 or rows >= len(data):
        return dequantize(data, source.tensor_type)
    first = dequantize(data[:rows], source.tensor_type)
    values = np.empty((len(data), *first.shape[1:]), dtype=np.float32)
    values[:rows] = first
    for start in range(rows, len(data), rows):
        part = data[start : start + rows]
        values[start : start + rows] = dequantize(part, source.tensor_type)
    return values


def _write_configs(
    config: "PretrainedConfig",
    model: "PreTrainedModel",
    tokenizer: Any,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write config.json and generation_config.json with the tokenizer's own special ids."""
    from transformers import GenerationConfig

    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    for key, value in ids.items():
        setattr(config, key, value)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)
