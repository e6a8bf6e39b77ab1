"""Which batches are recorded as a CUDA graph: a rule that training and plans share."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.bench.shapes import config_of
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.outline import outline
from qlora_kit.plan.predict import is_recorded
from qlora_kit.plan.setup import Setup
from qlora_kit.step import graph
from qlora_kit.step.graph import LAUNCH_S, MOST_TOKENS, StepGraphs, recorded_tokens, room_beside
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.train.helpers import arguments

H100 = find_gpu("h100").matrix_flops
OLD_LIMIT = 4096


def empty(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "tokens", "wanted"),
    [
        ("Llama-3.2-1B", 4 * 2048, True),  # 152 ms without a graph for 105 of the GPU's
        ("Llama-3.2-1B", 16 * 1024, True),
        ("Llama-3.2-1B", 32 * 1024, False),  # in tiles
        ("Llama-3.2-3B", 4 * 2048, True),
        ("Llama-3.1-8B", 2 * 2048, True),
        ("Llama-3.1-8B", 4 * 2048, False),  # 15 ms a layer: no host takes as long
        ("Llama-3.3-70B", 512, True),
        ("Llama-3.3-70B", 4096, False),
    ],
)
def test_the_limit_follows_the_layers(model: str, tokens: int, wanted: bool) -> None:
    assert (tokens <= recorded_tokens(empty(model), H100)) is wanted


def test_one_limit_for_all_models_would_be_wrong() -> None:
    """The cases above tell the old rule, whatever its number, from this one."""
    small, large = empty("Llama-3.2-1B"), empty("Llama-3.3-70B")
    assert recorded_tokens(large, H100) < OLD_LIMIT < recorded_tokens(small, H100)


def test_it_is_the_time_of_the_products() -> None:
    """4 FLOPs per element and token, forward and backward of a frozen layer: half the rate, half
    the tokens; a head and a layer more change nothing."""
    wide = nn.Linear(4096, 8192, device="meta")
    layers = nn.ModuleList([nn.Sequential(wide)])
    found = recorded_tokens(layers, 1e14)
    assert found == int(LAUNCH_S * 1e14 / (4 * 4096 * 8192))
    assert recorded_tokens(layers, 5e13) == found // 2
    twice = nn.ModuleList([nn.Sequential(wide), nn.Sequential(wide)])
    assert recorded_tokens(nn.ModuleDict({"layers": twice, "head": wide}), 1e14) == found
    assert recorded_tokens(layers, 1e18) == MOST_TOKENS


def test_adapters_and_four_bits_do_not_change_it() -> None:
    """What training asks of its model, plans ask of an outline."""
    config = config_of("Llama-3.2-3B")
    plain = recorded_tokens(empty("Llama-3.2-3B"), H100)
    for setup in (Setup(), Setup(bits=16), Setup(method="lora_fa", rank=64)):
        made = outline(config, setup)
        assert recorded_tokens(made.model, H100) == plain
        for tokens in (plain, plain + 1):
            wanted = tokens <= plain
            assert is_recorded(made, setup.with_tokens(seq=tokens), find_gpu("h100")) is wanted


def test_training_asks_the_same(tmp_path: Path) -> None:
    """The trainer's limit is the rule's, for the model that it trains."""
    model = tiny_models.build("llama")
    adapter = attach(model, LoRA(rank=4))
    trainer = Trainer(model, adapter, arguments(tmp_path), step="fused")
    assert trainer.graphs is not None
    assert trainer.graphs._most_tokens == recorded_tokens(model, H100)


def test_batches_beyond_the_limit_run_without() -> None:
    asked: list[int] = []
    graphs = StepGraphs(lambda inputs, items: items, [], most_tokens=8)
    graphs._run = lambda inputs, items: asked.append(inputs["input_ids"].numel())  # type: ignore[method-assign]

    class OnGpu(torch.Tensor):
        is_cuda = True

    def batch(tokens: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(tokens).as_subclass(OnGpu)}

    items = torch.ones(()).as_subclass(OnGpu)
    for tokens in (4, 8, 9):
        graphs.run(batch(tokens), items)
    assert asked == [4, 8]


def test_room_is_left_beside_it() -> None:
    """Evaluations need less than the step; unrecorded shapes may need more."""
    assert room_beside(10, 100, shapes=1) == 5
    assert room_beside(100, 30, shapes=3) == 100
    assert room_beside(100, 130, shapes=3) == 130


@pytest.mark.gpu
@pytest.mark.parametrize("room", [0, 1 << 60])
def test_a_recording_that_leaves_no_room_is_dropped(room: int, monkeypatch, caplog) -> None:
    """And the step goes on without, its gradient the same."""
    monkeypatch.setattr(graph, "room_beside", lambda *sizes, shapes: room)
    weight = nn.Parameter(torch.ones(1 << 20, device="cuda"))

    def loss(inputs: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        return (weight * inputs["input_ids"].sum()).square().sum() / items

    graphs = StepGraphs(loss, [weight])
    batch = {"input_ids": torch.ones(1, 8, device="cuda", dtype=torch.int64)}
    items = torch.tensor(8.0, device="cuda")
    found = []
    for _ in range(4):
        weight.grad = None
        if graphs.run(batch, items) is None:
            loss(batch, items).backward()
        found.append(weight.grad.clone())
    assert all(torch.equal(one, found[0]) for one in found)
    assert bool(graphs._recorded) is (room == 0)
    assert ("training without CUDA graphs" in caplog.text) is (room > 0)
