"""GGUF conversion: weights, configuration and tokenizer arrive whole, on every transformers."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.checkpoint import gguf
from qlora_kit.checkpoint.gguf import convert_gguf
from qlora_kit.checkpoint.source import open_source
from qlora_kit.core.errors import FormatError, SourceError
from tests import tiny_models
from tests.checkpoint import gguf_files

DEMO = Path(__file__).parents[2] / "demo" / "smollm2-135m-instruct.gguf"


def decoded(value: np.ndarray, kind: str) -> torch.Tensor:
    """What a block format keeps of a weight."""
    if value.ndim == 1:
        return torch.from_numpy(value)
    stored = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(value, stored), stored))


@pytest.mark.parametrize("at_a_time", [gguf.DECODE_VALUES, 1000])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "F32"])
def test_weights_equal_the_decoded_blocks(tmp_path, monkeypatch, kind, at_a_time):
    monkeypatch.setattr(gguf, "DECODE_VALUES", at_a_time)
    state = gguf_files.write_llama(tmp_path / "m.gguf", kind=kind)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == state.keys()  # tied: no lm_head
    matrix = {"F16": torch.float16, "F32": torch.float32}.get(kind, torch.bfloat16)
    for name, value in state.items():
        expected = decoded(value, kind).to(torch.float32 if value.ndim == 1 else matrix)
        assert got[name].dtype == expected.dtype
        assert torch.equal(got[name], expected), name
    name = "model.layers.0.self_attn.q_proj.weight"
    permuted = decoded(gguf_files.permute(state[name], 4), kind).to(matrix)
    assert not torch.equal(got[name], permuted)  # a forgotten un-permutation would show


def test_converted_model_computes_like_the_original(tmp_path):
    gguf_files.write_llama(tmp_path / "m.gguf", kind="F32")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = tiny_models.build("llama_tied")
    ids = tiny_models.tokens()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert model.config.tie_word_embeddings
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert model.generation_config.eos_token_id == 2


def test_fused_experts(tmp_path):
    state = gguf_files.write_qwen3_moe(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == state.keys()
    assert all(np.array_equal(got[name].numpy(), state[name]) for name in state)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = tiny_models.build("qwen3_moe")
    ids = tiny_models.tokens()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)


def test_tokenizer_of_the_converted_folder(tmp_path):
    gguf_files.write_llama(tmp_path / "m.gguf")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = gguf_files.tokens()
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("hel 12</s><think>")["input_ids"])
    assert pieces == ["hel", "Ġ", "1", "2", "</s>", "<think>"]
    assert tokenizer.decode(tokenizer(" hé 12x")["input_ids"]) == " hé 12x"
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<s>", "</s>", "</s>", "<unk>")
    assert tokenizer.chat_template == gguf_files.TEMPLATE
    assert tokenizer.decode([2, words.index("he")], skip_special_tokens=True) == "he"
    assert tokenizer.model_max_length == 512


def test_conversion_is_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    runs = []
    convert = gguf.convert_gguf

    def counted(*args, **options):
        runs.append(args)
        convert(*args, **options)

    monkeypatch.setattr(gguf, "convert_gguf", counted)
    (tmp_path / "a").mkdir()
    gguf_files.write_llama(tmp_path / "a" / "m.gguf")
    first = open_source(tmp_path / "a" / "m.gguf")
    assert first.folder.parent == tmp_path / "cache" / "gguf"
    os.utime(tmp_path / "a" / "m.gguf", (1, 1))
    assert open_source(tmp_path / "a").folder == first.folder  # the folder's only GGUF file
    assert len(runs) == 1
    gguf_files.write_llama(tmp_path / "a" / "m.gguf", kind="Q5_0")
    assert open_source(tmp_path / "a" / "m.gguf").folder != first.folder
    assert len(runs) == 2
    # An interrupted conversion leaves no config.json and is redone.
    (first.folder / "config.json").unlink()
    gguf_files.write_llama(tmp_path / "a" / "m.gguf")
    assert open_source(tmp_path / "a" / "m.gguf").folder == first.folder
    assert len(runs) == 3


def test_a_missing_tensor_is_named_and_nothing_is_left(tmp_path):
    gguf_files.write_llama(tmp_path / "m.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(FormatError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_files_that_are_no_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK not one")
    with pytest.raises(FormatError, match="is not a GGUF file"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    gguf_files.write_llama(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for length in (12, 2000, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="damaged or truncated"):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")


def test_unknown_architecture_is_refused(tmp_path):
    writer = gguf_files.GGUFWriter(tmp_path / "m.gguf", "martian")
    gguf_files.write_tokenizer(writer)
    gguf_files.finish(writer)
    with pytest.raises(FormatError, match=r"this GGUF model is not supported.*martian"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_without_the_package_the_error_says_so(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(SourceError, match="pip install gguf"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.exists(), reason="scripts/prepare_demo.py has not fetched it")
def test_the_demo_model_speaks_english(tmp_path):
    convert_gguf(DEMO, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert tokenizer.convert_ids_to_tokens(tokenizer("12")["input_ids"]) == ["1", "2"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_sentencepiece_vocabulary(tmp_path):
    """Built by transformers' converter; special tokens and BOS as the file says."""
    gguf_files.write_llama(tmp_path / "m.gguf", tokenizer=gguf_files.write_sentencepiece)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("hello hello")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁hello", "▁hello"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello hello"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    ids = tokenizer("hé", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁h", "<0xC3>", "<0xA9>"]
