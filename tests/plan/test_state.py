"""What an update keeps and takes: full fine-tuning by Transformers' own optimizers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plan.methods import Run, config_for
from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.selective.config import Full
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.predict import predict
from qlora_kit.plan.setup import Setup
from qlora_kit.plan.state import kept_in_32_bits, optimizer_bytes, passing_bytes
from qlora_kit.train.arguments import training_arguments
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.trainer import Trainer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


def tiny() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=2, **SIZES))


def trained(optimizer: str, folder) -> tuple[LlamaForCausalLM, dict]:
    """A model after one update of all its weights, and the optimizer's state."""
    config = config_for(Run(case="full", model="tiny", batch=1, seq=8, optimizer=optimizer))
    model = tiny()
    arguments = training_arguments(config, folder=folder, rows=1, device="cpu")
    arguments = arguments.set_save(strategy="no")
    arguments.max_steps = 1
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    made = Trainer(
        model,
        attach(model, Full(), seed=0),
        arguments,
        train_dataset=[row],
        data_collator=PadCollator(0, 1),
    )
    made.train()
    return model, getattr(made.optimizer, "optimizer", made.optimizer).state


def state_bytes(state: dict) -> int:
    tensors = [t for entry in state.values() for t in entry.values() if torch.is_tensor(t)]
    codes = {id(entry[n]) for entry in state.values() for n in ("qmap1", "qmap2") if n in entry}
    return sum(
        t.numel() * t.element_size() for t in tensors if id(t) not in codes and t.numel() > 1
    )


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_full_fine_tuning_keeps_what_transformers_keeps(optimizer, tmp_path):
    """Its embeddings' state has 32 bits under an 8-bit name."""
    model, state = trained(optimizer, tmp_path)
    parameters = list(model.parameters())
    held = state_bytes(state)
    wide = kept_in_32_bits(model)
    rounding = 2 * 2 * 512 * len(parameters)  # what an allocation is rounded up by
    counted = sum(optimizer_bytes(parameters, optimizer, wide))
    assert abs(counted - held) < rounding
    if optimizer == "adamw_8bit":
        assert held - sum(optimizer_bytes(parameters, optimizer)) > 150_000 > rounding


def test_a_plan_has_the_state_of_embeddings_in_32_bits():
    """8-bit state: 8 bytes a value of the table, a little over 2 of everything else."""
    asked = Setup(method="full", bits=16, seq=64, optimizer="adamw_8bit")
    model = tiny()
    made = predict(model.config, asked, find_gpu("l4"))
    table = model.get_input_embeddings().weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - table
    assert made.components["optimizer"] == pytest.approx(8 * table + 2.1 * rest, rel=0.1)


class _Sizes(TorchDispatchMode):
    """Bytes that operations on lists give back at once, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, (list, tuple)) and "foreach" in func.__name__:
            size = sum(t.numel() * t.element_size() for t in made)
            self.most[func.__name__] = max(size, self.most.get(func.__name__, 0))
        return made


def test_torchs_own_adamw_has_all_denominators_at_once():
    """On a GPU its lists of tensors are the default, which is asked for here."""
    weights = [torch.nn.Parameter(torch.randn(1024, 4)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW(weights, foreach=True)
    optimizer.step()  # makes the state
    with _Sizes() as found:
        optimizer.step()
    values = sum(w.numel() * 4 for w in weights)
    large = [size for size in found.most.values() if size >= values // 2]
    assert large == [values] == [passing_bytes(weights, "adamw_torch", flat=False)]


def test_a_plan_has_them_where_the_update_is_the_peak():
    def made(optimizer: str, method: str = "full"):
        bits = 16 if method == "full" else 4
        asked = Setup(method=method, bits=bits, seq=4, optimizer=optimizer)
        return predict(tiny().config, asked, find_gpu("l4"))

    plain, fused = made("adamw_torch"), made("adamw_torch_fused")
    values = 4 * plain.trained
    assert plain.peak_bytes - fused.peak_bytes == pytest.approx(values, rel=0.25)
    lists, one = made("adamw_torch", "lora"), made("adamw_torch_fused", "lora")
    assert lists.peak_bytes == one.peak_bytes  # a flat buffer is updated by one call
