"""Files of prefixes and prompts: our own, and PEFT's both ways."""

import json

import pytest
import torch

from qlora_kit.adapters.formats.own import OWN_TYPE
from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.train.checkpoints import restore_adapter
from tests import tiny_models
from tests.adapters.bases import load_bitsandbytes, load_nf4, quantize
from tests.adapters.prompt.test_prompts import CONFIGS, answer, shake


@pytest.mark.parametrize("name", CONFIGS)
def test_files_go_round(name, tmp_path):
    model = quantize(tiny_models.build("llama"))
    adapter = attach(model, CONFIGS[name], seed=1)
    shake(adapter)
    wanted = answer(model)
    adapter.save(tmp_path / "a")
    adapter.save(tmp_path / "c", resumable=True)
    kind = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"]
    known = {"prefix": "PREFIX_TUNING", "prefix_mlp": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
    assert kind == known.get(name, OWN_TYPE)
    files = read_adapter(tmp_path / "a")
    assert not any("inner" in key for key in files.modules)  # the MLP is dropped

    fresh = quantize(tiny_models.build("llama"))
    loaded = load_adapter(fresh, tmp_path / "a")
    torch.testing.assert_close(answer(fresh), wanted, rtol=1e-5, atol=1e-6)
    loaded.detach_from_model()
    again = attach(fresh, CONFIGS[name], seed=9)
    restore_adapter(again, tmp_path / "c")  # a checkpoint has the MLP
    assert torch.equal(answer(fresh), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("name", ["prefix", "prefix_mlp", "prompt"])
def test_peft_loads_ours(family, name, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_models.build(family)
    adapter = attach(model, CONFIGS[name], seed=1)
    shake(adapter)
    mask = torch.ones_like(tiny_models.tokens())
    wanted = answer(model, attention_mask=mask)
    adapter.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny_models.build(family), tmp_path / "a").eval()
    found = answer(theirs, attention_mask=mask)[:, -7:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    base = answer(tiny_models.build(family), attention_mask=mask)
    assert not torch.allclose(base, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["prefix", "prefix_mlp", "prompt"])
def test_peft_on_bitsandbytes_is_ours_on_nf4(name, tmp_path):
    """Both ways on a base of 4 bits: PEFT reads ours, and what it writes again comes back."""
    peft = pytest.importorskip("peft")
    folder = tiny_models.saved("llama")
    model = load_nf4(folder)
    mask = torch.ones_like(tiny_models.tokens())
    base = answer(model, attention_mask=mask)
    adapter = attach(model, CONFIGS[name], seed=1)
    shake(adapter)
    wanted = answer(model, attention_mask=mask)
    adapter.save(tmp_path / "a", base_model=str(folder))
    theirs = peft.PeftModel.from_pretrained(load_bitsandbytes(folder), tmp_path / "a")
    found = answer(theirs.train(), attention_mask=mask)[:, -7:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(base, wanted, atol=1e-2)
    theirs.save_pretrained(tmp_path / "b")
    fresh = load_nf4(folder)
    load_adapter(fresh, tmp_path / "b")
    torch.testing.assert_close(answer(fresh, attention_mask=mask), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("projection", [False, True, None])
def test_we_load_pefts(family, projection, tmp_path):
    peft = pytest.importorskip("peft")
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    if projection is None:
        config = peft.PromptTuningConfig(**common)
    else:
        config = peft.PrefixTuningConfig(
            **common, prefix_projection=projection, encoder_hidden_size=16
        )
    theirs = peft.get_peft_model(tiny_models.build(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_(0, 0.5)
    mask = torch.ones_like(tiny_models.tokens())
    wanted = answer(theirs, attention_mask=mask)[:, -7:]
    theirs.save_pretrained(tmp_path / "a")
    model = tiny_models.build(family)
    before = answer(model, attention_mask=mask)
    adapter = load_adapter(model, tmp_path / "a")
    assert adapter.config.length == 4
    torch.testing.assert_close(answer(model, attention_mask=mask), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, rtol=1e-4, atol=1e-5)
