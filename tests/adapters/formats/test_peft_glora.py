"""GLoRA and PEFT's: the same model from either's files, where PEFT has the structure."""

import json

import pytest
import torch
from peft import GloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.core.errors import FormatError
from tests import tiny_models
from tests.adapters.bases import load_plain

pytestmark = pytest.mark.transformers_compat

OURS = {
    "llama-lora": ("llama", "lora lora none none none"),
    "llama-scalar": ("llama", "scalar scalar none none none"),
    "roberta": ("roberta", "lora lora lora vector vector"),
    "roberta-small": ("roberta", "vector vector vector scalar scalar"),
}
THEIRS = {
    "llama": ("llama", ["q_proj", "down_proj"], "lora", "lora", "vector"),
    "roberta": ("roberta", ["query", "value"], "lora", "lora", "constant"),
    "roberta-vectors": ("roberta", ["query", "dense"], "vector", "vector", "vector"),
    "roberta-bias-alone": ("roberta", ["query"], "none", "lora", "vector"),
    "roberta-one-factor": ("roberta", ["query"], "constant", "none", "none"),
}
NOT_PEFTS = [
    ("roberta", GLoRA(rank=2, structure="lora none lora vector vector")),
    ("roberta", GLoRA(rank=2, structure="lora lora lora vector scalar")),
    ("roberta", GLoRA(rank=2, structures={"query": "none none none none vector"})),
    ("roberta", GLoRA(rank=2, super_net=True)),
    ("llama", GLoRA(rank=2)),  # new biases
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny_models.save("llama", root / "llama"),
        "roberta": tiny_models.save("roberta", root / "roberta", num_labels=3),
    }


def load(folder):
    return load_plain(folder, classifier=folder.name == "roberta")


def shake(parameters) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.15)


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens()).logits


def kind(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("case", OURS)
def test_our_adapter_answers_alike_in_peft(case, folders, tmp_path):
    family, structure = OURS[case]
    model = load(folders[family])
    base = answer(model)
    adapter = attach(model, GLoRA(rank=2, structure=structure))
    shake(adapter.parameters())
    adapter.save(tmp_path / "adapter", base_model=str(folders[family]))
    assert kind(tmp_path / "adapter") == "GLORA"
    peft = PeftModel.from_pretrained(load(folders[family]), tmp_path / "adapter").eval()
    assert (answer(model) - answer(peft)).abs().max() < 1e-4  # sums in another order
    assert (base - answer(peft)).abs().max() > 0.01
    again = load(folders[family])
    loaded = load_adapter(again, tmp_path / "adapter")
    assert torch.equal(answer(again), answer(model))
    assert (loaded.config.rank, loaded.config.structure) == (2, structure)


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_adapter_answers_alike_here(case, folders, tmp_path):
    """On Llama without biases PEFT drops C, D and E."""
    family, targets, ab, c, de = THEIRS[case]
    task = "SEQ_CLS" if family == "roberta" else "CAUSAL_LM"
    config = GloraConfig(
        r=2, target_modules=targets, config_A_B=ab, config_C=c, config_D_E=de, task_type=task
    )
    peft = get_peft_model(load(folders[family]), config).eval()
    shake(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path / "adapter")
    model = load(folders[family])
    base = answer(model)
    adapter = load_adapter(model, tmp_path / "adapter")
    assert (answer(model) - answer(peft)).abs().max() < 1e-4
    assert (base - answer(peft)).abs().max() > 0.01
    assert adapter.num_trainable == sum(p.numel() for p in peft.parameters() if p.requires_grad)
    adapter.save(tmp_path / "again")
    again = PeftModel.from_pretrained(load(folders[family]), tmp_path / "again").eval()
    assert torch.equal(answer(again), answer(peft))


@pytest.mark.parametrize(("family", "config"), NOT_PEFTS)
def test_what_peft_has_no_words_for_is_ours(family, config, folders, tmp_path):
    model = load(folders[family])
    adapter = attach(model, config)
    shake(adapter.parameters())
    adapter.save(tmp_path / "adapter")
    assert kind(tmp_path / "adapter") == "QLORA_KIT"
    again = load(folders[family])
    assert load_adapter(again, tmp_path / "adapter").config == config
    assert torch.equal(answer(again), answer(model))


def test_files_that_are_not_gloras_are_refused(folders, tmp_path):
    adapter = attach(load(folders["llama"]), GLoRA(rank=2, structure="lora lora none none none"))
    adapter.save(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, text = load_file(path), config.read_text()
    name = "base_model.model.model.layers.0.self_attn.q_proj.glora_"
    for wrong in (f"{name}A.Y", f"{name}F.X", "other.weight"):
        save_file(whole | {wrong: torch.ones(1)}, path)
        with pytest.raises(FormatError, match="unexpected tensor"):
            read_adapter(tmp_path)
    save_file({}, path)
    with pytest.raises(FormatError, match="no support"):
        read_adapter(tmp_path)
    save_file(whole, path)
    config.write_text(json.dumps(json.loads(text) | {"bias": "all"}))
    with pytest.raises(FormatError, match="trained biases"):
        read_adapter(tmp_path)
