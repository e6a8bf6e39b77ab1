"""Checkpoints of real shapes with random weights, which every library can load.

    python -m qlora_kit.bench.random_checkpoint Llama-3.1-8B /dev/shm/llama --storage nf4

Weights are made where the GPU is and written by several threads at once, so that 8B
takes seconds. `nf4` is bitsandbytes' 4-bit layout, which all of them read, so that
nobody's time goes into quantizing and everybody trains on the same bits; `bf16` is for
measuring that too. The tokenizer is trained on the spot: it is there to be loaded.
Never use these for quality.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qlora_kit.bench.shapes import MODELS, config_of
from qlora_kit.bench.subject import Stage
from qlora_kit.checkpoint.tensor_file import TensorInfo
from qlora_kit.checkpoint.writer import ShardWriter
from qlora_kit.export.live import quantization_config
from qlora_kit.nn.swap import quantizable
from qlora_kit.quant.config import QuantConfig
from qlora_kit.quant.double_quant import GROUP_SIZE
from qlora_kit.quant.format import to_bnb_tensors
from qlora_kit.quant.weight import NF4Weight

Storage = Literal["nf4", "bf16"]
SHARD_BYTES = 2_000_000_000
WRITERS = 8

_SENTENCES = (
    "A frozen base in four bits, and a few million trained numbers beside it.",
    "The quick brown fox jumps over the lazy dog; 0123456789.",
)
_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer on a few words and save it.

    Args:
        folder: existing; ids are below 512.
    """
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = _TEMPLATE
    made.save_pretrained(folder)


class RandomWeights:
    """Random tensors of a model, the same for the same name."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        """Remember where and what.

        Args:
            device: tensors are made here.
            dtype: of what is not quantized.
        """
        self.device, self.dtype = device, dtype

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A matrix of small normal numbers, or a vector of ones."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.normal_(0, 0.02, generator=self._generator(name))

    def nf4(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Random codes and scales of an NF4 weight, by suffix as bitsandbytes stores them."""
        generator = self._generator(name)

        def codes(*size: int) -> Tensor:
            made = torch.empty(size, dtype=torch.uint8, device=self.device)
            return made.random_(0, 256, generator=generator)

        count = math.prod(shape)
        blocks = -(-count // 64)
        groups = -(-blocks // GROUP_SIZE)
        weight = NF4Weight(
            packed=codes((count + 1) // 2, 1),
            absmax=codes(blocks),
            nested_absmax=torch.full((groups,), 0.01, device=self.device),
            offset=torch.tensor(0.05, device=self.device),
            shape=shape,
            block_size=64,
            dtype=self.dtype,
        )
        return {name + suffix: tensor for suffix, tensor in to_bnb_tensors(weight).items()}


def _meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _plan(
    model: PreTrainedModel, quantized: set[str], weights: RandomWeights
) -> tuple[dict[str, tuple[int, ...]], list[TensorInfo]]:
    """Shapes by weight name, and every tensor of the files."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    drop = tied if model.config.tie_word_embeddings else set()
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in drop}
    examples: dict[tuple[int, ...], dict[str, TensorInfo]] = {}
    infos = []
    for name, shape in shapes.items():
        if name not in quantized:
            infos.append(TensorInfo(name, shape, weights.dtype))
            continue
        if shape not in examples:
            made = weights.nf4("", shape)
            examples[shape] = {k: TensorInfo(k, tuple(t.shape), t.dtype) for k, t in made.items()}
        infos += [TensorInfo(name + k, i.shape, i.dtype) for k, i in examples[shape].items()]
    return shapes, infos


def write_checkpoint(
    name: str, folder: Path, *, storage: Storage, device: str, dtype: torch.dtype
) -> int:
    """Write a checkpoint of random weights.

    Args:
        name: as `config_of` takes it.
        folder: created; what it held is replaced.
        storage: `nf4` or `bf16` (which means `dtype`).
        device: where weights are made.
        dtype: of what is not quantized, and what bitsandbytes will compute in.

    Returns:
        Bytes of weights. `config.json` is written last: it marks the folder as whole.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = _meta_model(config_of(name), dtype)
    linears = set(quantizable(model, QuantConfig())) if storage == "nf4" else set()
    quantized = {f"{linear}.weight" for linear in linears}
    weights = RandomWeights(device, dtype)
    shapes, infos = _plan(model, quantized, weights)
    with ShardWriter(folder, infos, SHARD_BYTES) as writer, ThreadPoolExecutor(WRITERS) as pool:

        def write(weight: str) -> None:
            if weight in quantized:
                for key, tensor in weights.nf4(weight, shapes[weight]).items():
                    writer.write(key, tensor)
            else:
                writer.write(weight, weights.dense(weight, shapes[weight]))

        list(pool.map(write, shapes))
    save_tokenizer(folder)
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantized:
        config["quantization_config"] = quantization_config(
            "bitsandbytes", QuantConfig(), model, linears, config["dtype"]
        )
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return sum(info.nbytes for info in infos)


def roomy_folder(needed_bytes: int) -> Path:
    """A folder for temporary files with enough room, in memory if there is enough of it.

    Args:
        needed_bytes: of the checkpoint.

    Returns:
        A folder for this user's benchmark files; not created.
    """
    memory = Path("/dev/shm")
    base = Path(tempfile.gettempdir())
    if memory.is_dir() and shutil.disk_usage(memory).free > 1.1 * needed_bytes:
        base = memory
    return base / "qlora-kit-bench"


def checkpoint_bytes(name: str, storage: Storage) -> int:
    """About how large a checkpoint will be.

    Args:
        name: as `config_of` takes it.
        storage: as for `write_checkpoint`.

    Returns:
        Bytes.
    """
    model = _meta_model(config_of(name), torch.bfloat16)
    names = quantizable(model, QuantConfig()) if storage == "nf4" else []
    small = sum(model.get_submodule(linear).weight.numel() for linear in names)
    large = sum(p.numel() for p in model.parameters()) - small
    return int(2 * large + small * QuantConfig().bits_per_weight / 8)


def main() -> None:
    """Write one checkpoint."""
    stage = Stage()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"{', '.join(MODELS)}, a folder or a hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--storage", choices=["nf4", "bf16"], default="nf4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    stage("imports")
    began = time.perf_counter()
    size = write_checkpoint(
        arguments.model,
        arguments.folder,
        storage=arguments.storage,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
    )
    seconds = time.perf_counter() - began
    stage("written", f"{size / 1e9:.2f} GB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
