"""PEFT on a bitsandbytes NF4 base and we on ours are the same model, and train alike."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.config import LoRA, LoRAFA
from qlora_kit.load.model import load
from tests import tiny_models
from tests.adapters.bases import SKIP, load_bitsandbytes, load_nf4

pytestmark = pytest.mark.transformers_compat

PATTERNS = {
    "rank_pattern": {"v_proj": 2, r"re:.*layers\.0\..*(up|down)_proj": 8},
    "alpha_pattern": {"q_proj": 5.0, r"re:.*layers\.1\..*": 3.0},
}
OURS = {
    "llama-lora": ("llama", LoRA(rank=4, alpha=6)),
    "llama-rslora": ("llama", LoRA(rank=4, alpha=6, rslora=True)),
    "llama-lora_fa": ("llama", LoRAFA(rank=4, alpha=6, targets=("q_proj", "v_proj"))),
    "llama-patterns": ("llama", LoRA(rank=4, alpha=6, **PATTERNS)),
    "llama-rslora-patterns": ("llama", LoRA(rank=4, alpha=6, rslora=True, **PATTERNS)),
    "llama-one-layer": ("llama", LoRA(rank=4, alpha=6, targets=r"re:.*\.1\..*q_proj")),
    "gpt2-lora": ("gpt2", LoRA(rank=4, alpha=6)),
    "bert-classifier": ("bert", LoRA(rank=4, alpha=6)),
    "roberta-classifier": ("roberta", LoRA(rank=4, alpha=6, targets=("query", "value"))),
    "llama-classifier": ("llama", LoRA(rank=4, alpha=6)),
}
THEIRS = {
    "llama-lora": ("llama", {"target_modules": "all-linear"}),
    "llama-rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "llama-expression": ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    "llama-patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 11},
        },
    ),
    "gpt2-lora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert-classifier": ("bert", {"target_modules": ["query", "value"]}),
    "roberta-classifier": ("roberta", {"target_modules": ["query", "value"]}),
    "llama-classifier": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(family, classifier) to a saved tiny model."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family: str, classifier: bool) -> Path:
        path = root / f"{family}-{classifier}"
        if not path.exists():
            tiny_models.save(family, path, num_labels=3 if classifier else None)
        return path

    return folder


def shake(parameters) -> None:
    """Random values everywhere, B and heads included."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.2)


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens()).logits


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 2e-5  # logits of size 1 to 10 in float32
    assert (base - theirs).abs().max() > 0.01  # and the adapter matters


@pytest.mark.parametrize("case", OURS)
def test_our_adapter_answers_alike_in_peft(case, bases, tmp_path):
    family, config = OURS[case]
    classifier = case.endswith("classifier")
    folder = bases(family, classifier)
    model = load_nf4(folder, classifier=classifier)
    base = answer(model)
    adapter = attach(model, config)
    shake(adapter.state_dict().values())
    adapter.save(tmp_path / "adapter", base_model=str(folder))

    peft = PeftModel.from_pretrained(
        load_bitsandbytes(folder, classifier=classifier), tmp_path / "adapter"
    ).train()
    assert_same(answer(model), answer(peft), base)


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_adapter_answers_alike_here(case, bases, tmp_path):
    family, fields = THEIRS[case]
    classifier = case.endswith("classifier")
    folder = bases(family, classifier)
    task = "SEQ_CLS" if classifier else "CAUSAL_LM"
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": task} | fields)
    peft = get_peft_model(load_bitsandbytes(folder, classifier=classifier), config).train()
    shake(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path / "adapter")

    model = load_nf4(folder, classifier=classifier)
    base = answer(model)
    adapter = load_adapter(model, tmp_path / "adapter")
    assert_same(answer(model), answer(peft), base)
    assert adapter.num_trainable == sum(p.numel() for p in peft.parameters() if p.requires_grad)


def test_what_a_loader_started_at_random_is_saved_too(tmp_path):
    """BERT's pooler, missing from a language model's checkpoint, would differ at each load."""
    folder = tiny_models.save("bert", tmp_path / "bert")
    options = {"task": "sequence_classification", "num_labels": 3}
    model, _ = load(folder, dtype="float32", device="cpu", **options)
    adapter = attach(model, LoRA(rank=4, alpha=6))
    assert {"bert.pooler.dense", "classifier"} <= set(adapter.module_names)
    shake(adapter.state_dict().values())
    adapter.save(tmp_path / "adapter", base_model=str(folder))

    again, _ = load(folder, dtype="float32", device="cpu", adapter=tmp_path / "adapter", **options)
    assert torch.equal(answer(again), answer(model))
    base = load_bitsandbytes(
        folder, classifier=True, skip=(*SKIP, "bert.pooler.dense"), num_labels=3
    )
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").train()
    assert (answer(model) - answer(peft)).abs().max() < 2e-5


def train(model, parameters, batches, labels=None) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for step, ids in enumerate(batches):
        target = ids if labels is None else labels[step]
        loss = model(ids, labels=target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", ["llama-lora", "llama-rslora", "gpt2-lora", "bert-classifier"])
def test_fifty_steps_have_pefts_losses(case, bases, tmp_path):
    """The same start, data and optimizer: 50 losses within 1e-3, in the same places."""
    family, config = OURS[case]
    classifier = case.endswith("classifier")
    folder = bases(family, classifier)
    model = load_nf4(folder, classifier=classifier).train()
    adapter = attach(model, config, seed=4)
    adapter.save(tmp_path / "start", base_model=str(folder))
    peft = PeftModel.from_pretrained(
        load_bitsandbytes(folder, classifier=classifier), tmp_path / "start", is_trainable=True
    ).train()

    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(3, tiny_models.VOCAB, (4, 4, 16), generator=generator)
    batches = [pool[i % 4] for i in range(50)]
    labels = [torch.tensor([0, 1, 2, i % 3]) for i in range(50)] if classifier else None
    ours = train(model, adapter.parameters(), batches, labels)
    theirs = train(peft, [p for p in peft.parameters() if p.requires_grad], batches, labels)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-3, worst
    assert ours[-1] < 0.8 * ours[0]  # it learned, so the agreement means something
    # the bound bites: another start leads elsewhere
    other_model = load_nf4(folder, classifier=classifier).train()
    other = attach(other_model, config, seed=5)
    moved = train(other_model, other.parameters(), batches[:10], labels)
    assert max(abs(a - b) for a, b in zip(moved, theirs, strict=False)) > 1e-3
