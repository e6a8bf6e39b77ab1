"""The tokenizer that comes with a model, and its pad token."""

import json

import pytest

from qlora_kit.core.errors import SourceError
from qlora_kit.load.model import load
from tests import tiny_models

pytestmark = pytest.mark.transformers_compat


@pytest.fixture
def folder(tmp_path):
    """A model whose configuration names no pad token, with a tokenizer that has none."""
    tiny_models.build("llama", pad_token_id=None).save_pretrained(tmp_path)
    tiny_models.tokenizer(tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_a_pad_token_an_existing_one_is_taken(folder):
    model, tokenizer = load(folder)
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == 256
    assert model.get_input_embeddings().weight.shape[0] == 256
    assert model.config.pad_token_id == 0
    assert model.generation_config.pad_token_id == 0
    batch = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 4)


def test_the_models_own_pad_token_comes_first(folder):
    edit(folder / "config.json", pad_token_id=9)
    model, tokenizer = load(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 9


def test_a_tokenizers_pad_token_is_kept(folder):
    edit(folder / "tokenizer_config.json", pad_token="</s>")
    edit(folder / "config.json", pad_token_id=9)
    _, tokenizer = load(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_a_pad_token_without_an_embedding_is_not_used(folder):
    """Some repositories add a pad token to the tokenizer and never resize the model."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 256
    tokenizer.save_pretrained(folder)
    model, loaded = load(folder)
    assert loaded.pad_token_id < 256
    assert model.get_input_embeddings().weight.shape[0] == 256


def test_the_chat_template_is_kept(folder):
    _, tokenizer = load(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s>user\nhi</s>"


def test_a_classifier_knows_its_padding(folder):
    """A causal classifier reads the last token that is not padding: it needs the id."""
    model, tokenizer = load(folder, task="sequence_classification", num_labels=2)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
    assert model(input_ids=batch["input_ids"].to(model.device)).logits.shape == (2, 2)


def test_a_folder_without_tokenizer():
    assert load(tiny_models.saved("llama"))[1] is None


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="tokenizer"):
        load(folder)
