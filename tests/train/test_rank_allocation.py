"""AdaLoRA in the loop: the loss, accumulation, exact resume, the record and its picture."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from qlora_kit.adapters.adalora.config import AdaLoRA, RankBudget
from qlora_kit.adapters.adalora.layer import orthogonality
from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.inject import attach
from qlora_kit.core.errors import ConfigError, SourceError
from qlora_kit.train.checkpoints import last_checkpoint
from qlora_kit.train.config import ExportConfig
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.describe import describe_training
from qlora_kit.train.rank_allocation import RankAllocation
from qlora_kit.train.rank_picture import rank_map
from qlora_kit.train.report import render_report
from qlora_kit.train.run import run_training
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.block.helpers import counted
from tests.train.helpers import arguments, rows, state
from tests.train.sample_record import record
from tests.train.test_run import make_config, quiet

BUDGET = RankBudget(target_rank=2, start_updates=1, final_updates=3, every=2)


def make(folder: Path, budget: RankBudget = BUDGET, callbacks: Any = (), **changes: Any) -> Trainer:
    model = tiny_models.build("llama")
    config = AdaLoRA(rank=4, alpha=8, budget=budget, dropout=changes.pop("dropout", 0.0))
    step = changes.pop("step", "auto")
    settings = {"max_steps": 9, "save_steps": 3} | changes
    return Trainer(
        model,
        attach(model, config, seed=3),
        arguments(folder, **settings),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
        callbacks=callbacks,
        step=step,
    )


class _Stop(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [4, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "dropout": 0.3},
        {"optim": "adamw_8bit"},
        {"step": "fused"},
    ],
)
def test_resume_gives_the_same_bits(tmp_path: Path, settings: dict[str, Any], stop: int) -> None:
    """Killed while ranks fall, and when they are final."""
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    killed = make(tmp_path / "killed", callbacks=[_Stop(stop)], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    wanted, found = state(whole), state(resumed)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert resumed.ranks.allocator.history == whole.ranks.allocator.history
    kept = sum(int((t != 0).sum()) for name, t in wanted.items() if name.endswith("lora_E"))
    assert kept == 2 * 14
    ranks = resumed.ranks.allocator.history.ranks[-1]
    assert sum(ranks) == kept
    assert len(set(ranks)) > 1  # it did choose
    assert sum(t.numel() for n, t in wanted.items() if n.endswith("lora_E")) == 4 * 14


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=6, save_steps=6, budget=RankBudget(target_rank=2))
    trainer.train()
    (last_checkpoint(tmp_path) / "adalora.safetensors").unlink()
    with pytest.raises(SourceError, match="no checkpoint of an AdaLoRA run"):
        make(tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_a_run_too_short_for_its_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave none of the run's 3"):
        make(tmp_path, max_steps=3).train()


@pytest.mark.parametrize("form", ["code", "paper"])
def test_the_regularizer_is_in_the_loss(tmp_path: Path, form: str) -> None:
    """Loss and gradients of one update: with γ minus without is γ·R."""
    results = {}
    for weight in (0.0, 0.5):
        budget = RankBudget(target_rank=2, orthogonality=weight, orthogonality_form=form)
        trainer = make(tmp_path, budget)
        batch = PadCollator(0)(rows(2))
        count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=count)
        results[weight] = loss.item(), [p.grad.clone() for p in trainer.adapter.parameters()]
        trainer.model.eval()
        with torch.no_grad():
            alone = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    modules = list(trainer.adapter.pieces)
    term = 0.5 * orthogonality(modules, form)
    assert results[0.5][0] - results[0.0][0] == pytest.approx(term.item(), rel=1e-5)
    assert alone.item() == pytest.approx(results[0.0][0], rel=1e-6)  # not where nothing is trained
    exact = torch.autograd.grad(
        term, [p for m in modules for p in m.trainable().values()], allow_unused=True
    )
    for with_it, without, part in zip(results[0.5][1], results[0.0][1], exact, strict=True):
        part = torch.zeros_like(without) if part is None else part
        torch.testing.assert_close(with_it - without, part, rtol=1e-4, atol=1e-6)


class _InTheLoss(Trainer):
    """As the method is stated: autograd has the term in the loss of each batch."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        term = self.ranks.weight * orthogonality(self.ranks.modules, self.ranks.form)
        return loss + term / self.current_gradient_accumulation_steps

    def with_penalty(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_trains_as_with_the_term_in_the_loss(
    tmp_path: Path, accumulated: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, ranks and values, but for rounding; an epoch's last update has fewer batches. Not so
    without the term."""
    budget = replace(BUDGET, orthogonality=0.5, orthogonality_form=form)
    found = []
    for kind, own in (
        (_InTheLoss, budget),
        (Trainer, budget),
        (Trainer, replace(budget, orthogonality=0.0)),
    ):
        monkeypatch.setattr(f"{__name__}.Trainer", kind)
        settings = {
            "gradient_accumulation_steps": accumulated,
            "optim": "sgd",
            "max_grad_norm": 0.0,
        }
        trainer = make(tmp_path / str(len(found)), own, learning_rate=1e-2, **settings)
        trainer.train()
        losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
        found.append((losses, trainer.ranks.allocator.history.ranks, state(trainer)))
    (losses, ranks, values), (ours, our_ranks, our_values), (_, _, without) = found
    assert ours == pytest.approx(losses, rel=1e-5)
    assert our_ranks == ranks
    off = [torch.linalg.norm(our_values[n] - values[n]) for n in values]
    gone = [torch.linalg.norm(without[n] - values[n]) for n in values]
    assert sum(off) < 1e-3 * sum(gone)


def test_accumulated_batches_share_it(tmp_path: Path) -> None:
    """Four rows at once or in four batches: the same update, so the term counts once."""
    found = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = make(
            tmp_path / str(batch),
            RankBudget(target_rank=2, orthogonality=3.0),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,
            max_steps=2,
            learning_rate=1e-2,
        )
        trainer.group_by_length = False
        trainer.ranks.allocator.budget = RankBudget(target_rank=2, start_updates=0, final_updates=0)
        trainer.train()
        found.append(state(trainer))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-7)


def test_an_overflow_in_float16_leaves_the_scores_alone(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    ranks, control = trainer.ranks, trainer.control
    parameters = list(trainer.adapter.parameters())
    for value in (1.0, float("inf")):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        before = ranks.allocator.scores().clone()
        args, trainer.state.max_steps = replace(trainer.args, bf16=False), 9
        args.fp16 = True
        ranks.on_pre_optimizer_step(args, trainer.state, control)
        moved = not torch.equal(ranks.allocator.scores(), before)
        assert moved == (value == 1.0)


def test_fused_layers_run_it(tmp_path: Path) -> None:
    """Where they are asked for; `auto` takes the model's own code on a CPU.

    That both come to the same ranks is tested with the layers, in `tests/block/test_methods.py`.
    """
    assert make(tmp_path / "auto").fused is None
    trainer = make(tmp_path / "fused", step="fused")
    assert trainer.fused is not None
    with counted(trainer.fused.blocks) as ran:
        trainer.train()
    assert ran == [0, 1] * 9
    assert trainer.ranks.allocator.history.budget[-1] == 2 * 14


def test_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        trainer = make(tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        trainer.train()
        results.append(state(trainer))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor)


def test_the_record_and_the_report_have_the_ranks(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    training = describe_training(trainer, 1.0)
    ranks = training["ranks"]
    assert ranks["updates"] == [0, 2, 4, 6]
    assert len(ranks["modules"]) == len(ranks["ranks"][-1]) == 14
    assert all(entry["penalty"] > 0 for entry in training["history"])
    page = record()
    page["training"] = page["training"] | {"ranks": ranks, "updates": 9}
    text = render_report(page)
    assert "Rank of every matrix" in text
    assert "0 q_proj" in text
    assert "Rank of every matrix" not in render_report(record())
    assert read_adapter(last_checkpoint(tmp_path)).config.target_rank == 2


@pytest.mark.parametrize("modules", [1, 14, 224, 560])
def test_the_picture(modules: int) -> None:
    names = [f"model.layers.{i // 7}.self_attn.<q{i % 7}>" for i in range(modules)]
    falling = [12 - i % 13 for i in range(modules)]
    ranks = [[12] * modules, falling, falling[::-1]]
    history = {"modules": names, "updates": [0, 10, 20], "budget": [12, 6, 6], "ranks": ranks}
    svg = ET.fromstring(str(rank_map(history, 100)))
    height = float(svg.attrib["viewBox"].split()[3])
    assert height < 1500
    rectangles = [e for e in svg.iter() if e.tag.endswith("rect")]
    assert 0 < len(rectangles) <= 3 * modules
    for e in rectangles:
        assert 0 <= float(e.attrib["y"]) < height
        assert float(e.attrib["width"]) > 0
        assert 0.1 <= float(e.attrib["fill-opacity"]) <= 1
    texts = [e.text for e in svg.iter() if e.tag.endswith("text")]
    assert "0 <q0>" in texts
    assert str(rank_map({"modules": [], "updates": [], "ranks": []}, 5)) == ""


def test_the_picture_shows_the_ranks() -> None:
    """Read back: at every time, the row of every matrix is as dark as its rank is high."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    ranks = [[8, 8, 8, 8], [8, 4, 0, 6], [8, 1, 0, 7]]
    history = {"modules": names, "updates": [0, 10, 30], "budget": [32, 18, 16], "ranks": ranks}
    svg = ET.fromstring(str(rank_map(history, 100)))
    cells = [
        [float(e.attrib[key]) for key in ("x", "width", "y", "fill-opacity")]
        for e in svg.iter()
        if e.tag.endswith("rect")
    ]
    rows = sorted({y for _, _, y, _ in cells})
    assert len(rows) == 3 + 1  # the third is there until update 10
    left, right = min(x for x, *_ in cells), max(x + width for x, width, *_ in cells)

    def drawn(module: int, update: float) -> float:
        at = left + (right - left) * update / 100
        there = [o for x, w, y, o in cells if y == rows[module] and x <= at < x + w]
        assert len(there) <= 1
        return there[0] if there else 0.0

    for update, step in ((5, ranks[0]), (20, ranks[1]), (99, ranks[2])):
        for module, rank in enumerate(step):
            wanted = 0.12 + 0.88 * rank / 8 if rank else 0.0
            assert abs(drawn(module, update) - wanted) < 0.006, (module, update)


def test_a_whole_run(tmp_path: Path) -> None:
    """From the configuration: NF4, merged, resumed from the middle, ranks in record and report."""
    base = tiny_models.save("llama", tmp_path / "base")
    tiny_models.tokenizer(base)
    config = make_config(
        base,
        tmp_path,
        method="adalora",
        adalora=RankBudget(target_rank=2, start_updates=1, final_updates=2, every=2),
        export=ExportConfig(merge=True, dtype="float32"),
    )
    result = run_training(config, console=quiet())
    ranks = result.record["training"]["ranks"]
    assert sum(ranks["ranks"][-1]) == ranks["budget"][-1] == 2 * 14
    assert result.record["merge"]["deviation"]["kl"] < 1e-6
    assert "Rank of every matrix" in result.report.read_text()
    adapter = read_adapter(result.adapter)
    assert adapter.config.budget == config.adalora
    values = [pair.values for pair in adapter.deltas.values()]
    assert sum(int((value != 0).sum()) for value in values) == 2 * 14


class _Launches(TorchDispatchMode):
    """Counts calls that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("when", ["ranks fall", "ranks are final"])
def test_an_update_has_as_many_launches_however_many_layers(tmp_path: Path, when: str) -> None:
    """Of what AdaLoRA adds: its term, scores and masks; not ten for each shape of P and Q."""
    found = []
    for layers in (1, 4):
        model = tiny_models.build("llama", num_hidden_layers=layers)
        config = AdaLoRA(rank=4, alpha=8, budget=BUDGET)
        ranks = RankAllocation.of(attach(model, config))
        assert ranks is not None
        for module in ranks.modules:
            for parameter in module.trainable().values():
                parameter.grad = torch.ones_like(parameter)
        if when == "ranks are final":
            ranks.allocator.allocate(6, updates=9)
            ranks.allocator.allocate(7, updates=9)
        update = 3 if when == "ranks fall" else 8  # neither distributes
        with _Launches() as launches:
            ranks.add_gradients(None)
            ranks.allocator.observe(update, updates=9)
            ranks.allocator.allocate(update, updates=9)
        found.append(launches.calls)
    assert found[0] == found[1]
    shapes = {(k, p.shape) for m in ranks.modules for k, p in m.trainable().items()} - {
        ("lora_E", ranks.modules[0].lora_E.shape)
    }
    assert 10 < found[0].total() <= 10 * len(shapes) + 10
