"""Tiny GGUF files, written the way llama.cpp's converter lays models out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

from tests import tiny_models

WORDS = ["<unk>", "<s>", "</s>", "<think>"]
ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
ALPHABET += [chr(256 + i) for i in range(68)]  # the bytes without a printable character
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary halves in q and k."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def tokens() -> list[str]:
    """256 tokens: four special ones, bytes, and a few merged ones."""
    return [*WORDS, *ALPHABET[:248], "12", "he", "hel", "Ġh"]


def write_tokenizer(writer: GGUFWriter, pre: str = "smollm") -> None:
    types = [TokenType.NORMAL] * 256
    types[0:4] = [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types(types)
    writer.add_token_merges(["1 2", "h e", "he l", "Ġ h"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def write_sentencepiece(writer: GGUFWriter) -> None:
    """A vocabulary of pieces with scores and byte fallback, as Llama 2 has."""
    pieces = ["▁", "h", "e", "l", "o", "▁h", "el", "lo", "ello", "▁hello"]
    words = [*WORDS[:3], *(f"<0x{byte:02X}>" for byte in range(243)), *pieces]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 243 + [TokenType.NORMAL] * len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * 246 + [-10.0] * 5 + [float(i) for i in range(-5, 0)])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_llama(
    file: Path,
    *,
    kind: str = "Q8_0",
    leave_out: str = "",
    tokenizer: Callable[[GGUFWriter], None] = write_tokenizer,
) -> dict[str, np.ndarray]:
    """Write the tiny tied Llama; returns the weights under transformers' names.

    Args:
        file: to write.
        kind: block format of the matrices, or F32, F16.
        leave_out: a GGUF tensor name to forget.
        tokenizer: writes the tokenizer's metadata.
    """
    model = tiny_models.build("llama_tied")
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer(writer)
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in state.items():
        part = name.split(".")[-2]
        if part in heads:
            value = permute(value, heads[part])
        gguf_name = llama_name(name)
        if gguf_name == leave_out:
            continue
        add(writer, gguf_name, value, "F32" if value.ndim == 1 else kind)
    finish(writer)
    return state


def llama_name(name: str) -> str:
    """transformers' parameter name to llama.cpp's."""
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("mlp.gate.", "ffn_gate_inp."),
        ("lm_head", "output"),
    ):
        name = name.replace(theirs, ours)
    return name


def write_qwen3_moe(file: Path) -> dict[str, np.ndarray]:
    """Write the tiny Qwen3 MoE in float32: its experts are stored as three stacks per layer."""
    model = tiny_models.build("qwen3_moe")
    config = model.config
    writer = GGUFWriter(file, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    write_tokenizer(writer, "qwen2")
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            gate, up = np.split(value, 2, axis=1)
            add(writer, f"blk.{layer}.ffn_gate_exps.weight", gate, "F32")
            add(writer, f"blk.{layer}.ffn_up_exps.weight", up, "F32")
        elif name.endswith("experts.down_proj"):
            add(writer, f"blk.{name.split('.')[2]}.ffn_down_exps.weight", value, "F32")
        else:
            add(writer, llama_name(name), value, "F32")
    finish(writer)
    return state


def add(writer: GGUFWriter, name: str, value: np.ndarray, kind: str) -> None:
    stored = GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(value))
    elif kind == "F16":
        writer.add_tensor(name, np.ascontiguousarray(value.astype(np.float16)))
    else:
        writer.add_tensor(name, quantize(np.ascontiguousarray(value), stored), raw_dtype=stored)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
