"""Tiny random models of every supported family, for tests of any room.

Two layers, hidden size 64, 256 tokens: small enough that a test builds several,
regular enough that every linear has whole quantization blocks. `FAMILIES` maps a
family's name to a function that makes its configuration; `build` makes the model
with weights that depend on the seed alone; `save` writes it as a (sharded)
safetensors folder. `saved` caches one folder per family and process: use it
read-only.

Biases and norm weights are made random too: a loader that drops or mixes them up
must not go unnoticed because they were all zeros or ones.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
)

VOCAB = 256
HIDDEN = 64
LAYERS = 2

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **_TOKENS,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **_TOKENS,
}


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**_DECODER)


def _llama_tied() -> PreTrainedConfig:
    return LlamaConfig(**_DECODER, tie_word_embeddings=True)


def _mistral() -> PreTrainedConfig:
    return MistralConfig(**_DECODER, sliding_window=64)


def _qwen2() -> PreTrainedConfig:
    return Qwen2Config(**_DECODER)


def _qwen3() -> PreTrainedConfig:
    return Qwen3Config(**_DECODER, head_dim=16)


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(**_DECODER, head_dim=16, query_pre_attn_scalar=16, sliding_window=64)


def _gemma3() -> PreTrainedConfig:
    return Gemma3TextConfig(**_DECODER, head_dim=16, query_pre_attn_scalar=16, sliding_window=64)


def _phi() -> PreTrainedConfig:
    return PhiConfig(**_DECODER | {"num_key_value_heads": 4}, partial_rotary_factor=0.5)


def _phi3() -> PreTrainedConfig:
    return Phi3Config(**_DECODER, sliding_window=64)


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_TOKENS,
    )


def _bert() -> PreTrainedConfig:
    return BertConfig(**_ENCODER, max_position_embeddings=512)


def _roberta() -> PreTrainedConfig:
    return RobertaConfig(**_ENCODER, max_position_embeddings=514, type_vocab_size=1)


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **_DECODER,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama_tied": _llama_tied,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _roberta,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
"""Family name to a function that makes its configuration."""

ENCODERS = ("bert", "roberta")
"""Families without causal attention; `build` makes them masked language models."""

MOE = ("mixtral", "qwen3_moe")
"""Families whose experts transformers fuses into three-dimensional parameters."""


def build(
    family: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    num_labels: int | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Make a tiny random model.

    Args:
        family: a key of `FAMILIES`.
        seed: decides every weight; the global random state is left as it was.
        dtype: of all parameters.
        num_labels: make a sequence classification model with so many labels.
        **changes: fields to set on the configuration.

    Returns:
        The model in evaluation mode, on the CPU.
    """
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if num_labels is not None:
            config.num_labels = num_labels
            model = AutoModelForSequenceClassification.from_config(config)
        elif family in ENCODERS:
            model = AutoModelForMaskedLM.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                else:  # the default 0.02 leaves logits too small to compare
                    parameter.mul_(4.0)
    model = model.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def save(family: str, folder: Path | str, **options: Any) -> Path:
    """Write a tiny random model as a safetensors folder of several shards.

    Args:
        family: a key of `FAMILIES`.
        folder: created if needed.
        **options: handed to `build`, except `max_shard_size` (default `"100KB"`).

    Returns:
        The folder.
    """
    shard = options.pop("max_shard_size", "100KB")
    build(family, **options).save_pretrained(folder, max_shard_size=shard)
    return Path(folder)


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="qk-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def saved(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Folder of a family's tiny model, written once per process. Do not change it."""
    name = f"{family}-{seed}-{str(dtype).removeprefix('torch.')}"
    return save(family, _root() / name, seed=seed, dtype=dtype)


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length) int64 that avoid the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def tokenizer(folder: Path | str | None = None) -> Any:
    """Make a byte-level tokenizer of 256 tokens that fits every tiny model.

    Args:
        folder: where to save it too, beside the model.

    Returns:
        A fast tokenizer with bos, eos and a ChatML-like template, and no pad token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters
    names = ["<unk>", "<s>", "</s>", *alphabet[:-3]]
    core = Tokenizer(
        models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    if folder is not None:
        made.save_pretrained(folder)
    return made
