"""GLoRA's super-net in the loop: draws that repeat, the search, and the adapter cut out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.lora.layer import LoRALinear
from qlora_kit.adapters.super_net.search import SearchSettings
from qlora_kit.adapters.super_net.structures import use
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.step.prepare import prepare_model
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.glora import cut_out, search_structures
from qlora_kit.train.held_out import loss_totals
from qlora_kit.train.run import run_training
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.adapters.bases import quantize
from tests.train.helpers import arguments, rows, state
from tests.train.test_run import make_config, quiet

SMALL = SearchSettings(population=6, top=2, mutations=2, crossovers=2, generations=3)


def make(folder: Path, callbacks: Any = (), bits: int = 16, **changes: Any) -> Trainer:
    model = tiny_models.build("llama")
    if bits == 4:
        quantize(model)
    adapter = attach(model, GLoRA(rank=2, super_net=True), seed=3)
    settings = {"max_steps": 6, "save_steps": 3} | changes
    return Trainer(
        model,
        adapter,
        arguments(folder, **settings),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
        callbacks=callbacks,
    )


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


class _Watch(TrainerCallback):
    """Structures seen by the forward passes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def attach_to(self, trainer: Trainer) -> None:
        def note(*_: Any) -> None:
            self.seen.append(tuple(str(piece.choice) for piece in trainer.adapter.pieces))

        trainer.model.register_forward_pre_hook(note)


@pytest.mark.parametrize("steps", [1, 2])
def test_resume_gives_the_same_bits(tmp_path: Path, steps: int) -> None:
    """The draws of a resumed run are those that the whole run made."""
    whole = make(tmp_path / "whole", gradient_accumulation_steps=steps)
    watch = _Watch()
    watch.attach_to(whole)
    start = state(whole)
    whole.train()
    assert len(set(watch.seen)) == 6 * steps  # one draw per batch
    assert all(len(set(seen)) > 1 for seen in watch.seen)  # and per linear
    killed = make(tmp_path / "killed", [_Stop()], gradient_accumulation_steps=steps)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(tmp_path / "killed", gradient_accumulation_steps=steps)
    again = _Watch()
    again.attach_to(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert again.seen == watch.seen[3 * steps :]
    wanted, found = state(whole), state(resumed)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert sum(not torch.equal(start[name], tensor) for name, tensor in wanted.items()) > 40
    assert all(piece.choice == piece.structure for piece in whole.adapter.pieces)


def test_recomputation_uses_the_same_structures(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        trainer = make(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        trainer.train()
        results.append(state(trainer))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor)


@pytest.mark.parametrize("bits", [4, 16])
def test_from_super_net_to_adapter(tmp_path: Path, bits: int) -> None:
    trainer = make(tmp_path, bits=bits)
    trainer.train()
    model, adapter = trainer.model, trainer.adapter
    batches = [PadCollator(0)(rows(4, seed=9))]
    limit = 4000
    found = search_structures(model, adapter, batches, limit=limit, settings=SMALL)
    assert found.measured == 18
    assert found.best.parameters <= limit < adapter.num_trainable
    assert list(found.best_by_generation) == sorted(found.best_by_generation, reverse=True)
    again = search_structures(model, adapter, batches, limit=limit, settings=SMALL)
    assert again == found  # decided by its seed
    assert all(piece.choice == piece.structure for piece in adapter.pieces)

    use(list(adapter.pieces), found.best.structures)
    ids = tiny_models.tokens()
    with torch.no_grad():
        wanted = model(ids).logits
    assert loss_totals(model, batches).metrics()["loss"] == pytest.approx(found.best.loss)
    small = cut_out(model, adapter, found)
    assert small.num_trainable == found.best.parameters
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    small.save(tmp_path / "small")
    small.detach_from_model()
    load_adapter(model, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)


def test_the_search_finds_what_is_best() -> None:
    """A loss with a known minimum: the search comes closer to it than chance, by generations."""
    model = tiny_models.build("llama")
    adapter = attach(model, GLoRA(rank=2, super_net=True))

    def loss() -> float:
        return float(sum(piece.choice.a != "vector" for piece in adapter.pieces))

    from qlora_kit.adapters.super_net.search import search

    sizes = SearchSettings(population=50, generations=12, mutations=20, crossovers=20)
    found = search(adapter, loss, limit=10**9, settings=sizes)
    assert found.measured == 600
    assert found.best.loss < found.best_by_generation[0] - 3
    alone = SearchSettings(population=600, generations=1, mutations=0, crossovers=0)
    assert search(adapter, loss, limit=10**9, settings=alone).best.loss > found.best.loss


def test_the_limit_holds_down_to_nothing() -> None:
    model = tiny_models.build("gpt2")
    adapter = attach(model, GLoRA(rank=2, super_net=True))
    seen = []
    from qlora_kit.adapters.super_net.search import search

    def loss() -> float:
        total = sum(
            p.choice.count(p.out_features, p.in_features, rank=2, bias=p.has_bias)
            for p in adapter.pieces
        )
        seen.append(total)
        return -float(total)

    for limit in (0, 1, 500):
        seen.clear()
        found = search(adapter, loss, limit=limit, settings=SMALL)
        assert max(seen) == found.best.parameters <= limit
        assert len(seen) == found.measured
    with pytest.raises(ConfigError, match="at least 0"):
        search(adapter, loss, limit=-1)


def test_nan_is_the_worst_loss_and_structures_come_back_after_an_error() -> None:
    from qlora_kit.adapters.super_net.search import search

    model = tiny_models.build("gpt2")
    adapter = attach(model, GLoRA(rank=2, super_net=True))
    losses = iter([float("nan"), 2.0, float("nan"), 1.0, 3.0, 4.0] + [float("nan")] * 100)
    assert search(adapter, lambda: next(losses), limit=10**9, settings=SMALL).best.loss == 1.0

    def fails() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        search(adapter, fails, limit=10**9, settings=SMALL)
    assert all(piece.choice == piece.structure for piece in adapter.pieces)
    adapter.detach_from_model()
    with pytest.raises(AdapterError, match="no GLoRA super-net"):
        search(attach(model, GLoRA(rank=2)), lambda: 0.0, limit=1)


def test_sizes_that_are_no_search_are_refused() -> None:
    for wrong in ({"population": 0}, {"mutations": 40, "crossovers": 40}, {"probability": 0.0}):
        with pytest.raises(ConfigError):
            SearchSettings(**wrong)
    assert SearchSettings().refill == 0


def test_it_trains_through_the_models_own_layers(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with pytest.raises(ConfigError, match="GLoRALinear"):
        prepare_model(trainer.model, trainer.args, "fused", "auto")
    assert not any(isinstance(piece, LoRALinear) for piece in trainer.adapter.pieces)


def test_a_whole_run(tmp_path: Path) -> None:
    """From the configuration: NF4, trained, merged with new biases, checked."""
    from qlora_kit.train.config import ExportConfig

    base = tiny_models.save("llama", tmp_path / "base")
    tiny_models.tokenizer(base)
    config = make_config(
        base,
        tmp_path,
        method="glora",
        glora=GLoRA(rank=2),
        export=ExportConfig(merge=True, dtype="float32"),
    )
    result = run_training(config, console=quiet())
    assert result.record["merge"]["deviation"]["kl"] < 1e-6
    assert (result.adapter / "adapter_config.json").exists()
