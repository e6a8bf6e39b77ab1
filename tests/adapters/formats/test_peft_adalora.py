"""AdaLoRA and PEFT's: the same model from either's files, pruned or not."""

import json
from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.core.errors import FormatError
from tests import tiny_models
from tests.adapters.bases import load_bitsandbytes, load_nf4

pytestmark = pytest.mark.transformers_compat

BUDGET = RankBudget(target_rank=2, final_updates=3, orthogonality_form="paper")
OURS = {
    "llama": AdaLoRA(rank=4, alpha=6),
    "gpt2": AdaLoRA(rank=4, alpha=6, budget=BUDGET),
    "bert": AdaLoRA(rank=4, alpha=6, targets=("query", "value")),
}
THEIRS = {
    "llama": {"target_modules": ["q_proj", "v_proj"]},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "bert": {"target_modules": ["query", "value"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        family: tiny_models.save(family, root / family, num_labels=3 if family == "bert" else None)
        for family in OURS
    }


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens()).logits


def adapted(folder, config):
    """A model with random P, λ and Q, every second λ zero."""
    model = load_nf4(folder, classifier="bert" in folder.name)
    base = answer(model)
    adapter = attach(model, config)
    torch.manual_seed(11)
    with torch.no_grad():
        for tensor in adapter.state_dict().values():
            tensor.normal_(0, 0.3)
        for piece in adapter.pieces:
            if hasattr(piece, "lora_E"):
                piece.lora_E[1::2] = 0.0
    return model, adapter, base


@pytest.mark.parametrize("family", OURS)
def test_our_adapter_answers_alike_in_peft(family, folders, tmp_path):
    folder = folders[family]
    model, adapter, base = adapted(folder, OURS[family])
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    classifier = family == "bert"
    peft = PeftModel.from_pretrained(
        load_bitsandbytes(folder, classifier=classifier), tmp_path / "adapter"
    ).train()
    assert (answer(model) - answer(peft)).abs().max() < 2e-5  # PEFT divides by r + 1e-5
    assert (base - answer(peft)).abs().max() > 0.01


@pytest.mark.parametrize("family", OURS)
def test_our_adapter_comes_back_as_it_was(family, folders, tmp_path):
    folder = folders[family]
    model, adapter, _ = adapted(folder, OURS[family])
    adapter.save(tmp_path / "adapter", base_model=str(folder))
    again = load_nf4(folder, classifier=family == "bert")
    loaded = load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answer(again), answer(model))
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert replace(loaded.config, targets="", train_modules=()) == replace(
        adapter.config, targets="", train_modules=()
    )


@pytest.mark.parametrize("updates", [0, 2, 6], ids=["whole", "pruning", "pruned"])
@pytest.mark.parametrize("family", THEIRS)
def test_pefts_adapter_answers_alike_here(family, updates, folders, tmp_path):
    """Saved before, between and after its distributions: PEFT then writes kept triplets only."""
    folder, classifier = folders[family], family == "bert"
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=6,
        total_step=6,
        tinit=1,
        tfinal=2,
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        **THEIRS[family],
    )
    peft = get_peft_model(load_bitsandbytes(folder, classifier=classifier), config).train()
    trained = [p for p in peft.parameters() if p.requires_grad]
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.2)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = tiny_models.tokens()
    labels = torch.tensor([0, 2]) if classifier else ids
    for update in range(1, updates + 1):
        peft(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        peft.base_model.update_and_allocate(update)
        optimizer.zero_grad()
    peft.save_pretrained(tmp_path / "adapter")

    model = load_nf4(folder, classifier=classifier)
    base = answer(model)
    adapter = load_adapter(model, tmp_path / "adapter")
    assert (answer(model) - answer(peft)).abs().max() < 2e-5
    assert (base - answer(peft)).abs().max() > 0.01
    ranks = [piece.rank for piece in adapter.pieces if hasattr(piece, "lora_E")]
    assert (sum(ranks) == 2 * len(ranks)) == (updates == 6)
    assert {piece.scale for piece in adapter.pieces if hasattr(piece, "lora_E")} == {1.5}


def test_files_that_contradict_themselves_are_refused(folders, tmp_path):
    _, adapter, _ = adapted(folders["llama"], OURS["llama"])
    adapter.save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    key = next(name for name in whole if name.endswith("lora_E"))
    for wrong in (whole[key][:1], whole[key][:, 0], torch.cat([whole[key], whole[key]])):
        save_file(whole | {key: wrong.contiguous()}, path)
        with pytest.raises(FormatError, match="lora_"):
            read_adapter(tmp_path)
    save_file({name: t for name, t in whole.items() if name != key}, path)
    with pytest.raises(FormatError, match="belong"):
        read_adapter(tmp_path)
    save_file(whole, path)
    read_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_r": "many"}))
    with pytest.raises(FormatError, match="many"):
        read_adapter(tmp_path)
