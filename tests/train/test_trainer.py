"""The loop: exact resume, whole checkpoints, token-weighted losses, gradients that exist."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.core.errors import AdapterError, NonFiniteError, SourceError
from qlora_kit.step.loss import causal_lm_loss
from qlora_kit.train.checkpoints import last_checkpoint, whole_checkpoints
from qlora_kit.train.trainer import Trainer
from tests.train.helpers import adapted, make_trainer, rows, state


class _Stop(TrainerCallback):
    """Dies right after an update, as a killed process would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"group_by_length": False},
        {"dropout": 0.3},
        {"dropout": 0.3, "count": 6},  # the checkpoint is at the end of an epoch
        {"dropout": 0.3, "count": 5, "max_steps": 9},  # in the middle of the second epoch
        {"gradient_accumulation_steps": 2, "count": 9, "dropout": 0.3, "max_steps": 7},
        {"eval_rows": 5, "eval_strategy": "steps", "eval_steps": 2, "dropout": 0.3},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
        {"optim": "adamw_8bit"},
    ],
)
def test_resume_gives_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Killed one update after a checkpoint and resumed: as if nothing had happened."""
    whole = make_trainer(tmp_path / "whole", **settings)
    start = state(whole)
    whole.train()
    wanted = state(whole)
    killed = make_trainer(tmp_path / "killed", callbacks=[_Stop(4)], **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    torch.rand(7)  # a new process is in another random state
    resumed = make_trainer(tmp_path / "killed", **settings)
    torch.rand(3)
    assert_same(state(resumed), start)
    resumed.train(resume_from_checkpoint=True)
    assert_same(state(resumed), wanted)
    changed = sum(not torch.equal(start[name], wanted[name]) for name in start)
    assert changed > len(start) // 2  # it did train
    history = [[h[k] for k in ("step", "loss")] for h in resumed.state.log_history if "loss" in h]
    expected = [[h[k] for k in ("step", "loss")] for h in whole.state.log_history if "loss" in h]
    assert history == expected
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen > 0


def test_checkpoint_holds_the_adapter_only(tmp_path: Path) -> None:
    """PEFT files, optimizer, schedule, random state; no base weights, no pickled arguments."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    folder = last_checkpoint(tmp_path)
    assert folder.name == "checkpoint-6"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names
    assert not any(name.startswith(("model", "pytorch_model", "training_args")) for name in names)
    saved = read_adapter(folder).deltas
    for module, pair in saved.items():
        assert torch.equal(pair.b, trainer.adapter.state_dict()[f"{module}.lora_B"])
    small = sum(path.stat().st_size for path in folder.iterdir())
    assert small < 4 * sum(p.numel() * 4 for p in trainer.adapter.parameters()) + 100_000


def test_half_written_checkpoints_are_ignored(tmp_path: Path) -> None:
    """Whatever is missing or cut off, resume takes the newest whole one."""
    trainer = make_trainer(tmp_path, save_steps=1, max_steps=3)
    trainer.train()
    good = tmp_path / "checkpoint-2"
    broken = tmp_path / "checkpoint-3"
    for name in (
        "trainer_state.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
    ):
        shutil.rmtree(broken)
        shutil.copytree(good, broken)
        (broken / name).unlink()
        assert last_checkpoint(tmp_path) == good
        shutil.copy(good / name, broken / name)
        content = (good / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
        assert last_checkpoint(tmp_path) == good
        shutil.copy(good / name, broken / name)
        assert last_checkpoint(tmp_path) == broken
    shutil.copytree(good, tmp_path / "checkpoint-9.partial-123")
    assert [p.name for p in whole_checkpoints(tmp_path)][-1] == "checkpoint-3"
    with pytest.raises(SourceError, match="nothing to resume"):
        last_checkpoint(tmp_path / "empty")


def test_dying_while_saving_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle of a checkpoint leaves the one before as the newest."""
    trainer = make_trainer(tmp_path, save_steps=2, max_steps=4)
    real = trainer._save_rng_state

    def fail_second(folder: str) -> None:
        if trainer.state.global_step == 4:
            raise OSError("disk full")
        real(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", fail_second)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    """Two are kept: the newest and the best; leftovers of killed runs are removed."""
    (tmp_path / "checkpoint-1.partial-77").mkdir()
    trainer = make_trainer(
        tmp_path,
        eval_rows=4,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.5,  # far too high: the first evaluations are the best ones
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {best.name, "checkpoint-6"}
    assert best.name != "checkpoint-6"
    pair = next(iter(read_adapter(best).deltas.items()))
    assert torch.equal(trainer.adapter.state_dict()[f"{pair[0]}.lora_B"], pair[1].b)


def test_early_stopping_survives_resume(tmp_path: Path) -> None:
    """The patience counted before the kill still counts after it."""
    settings = {
        "eval_rows": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 12,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 0.5,
    }
    whole = make_trainer(tmp_path / "a", callbacks=[EarlyStoppingCallback(3)], **settings)
    whole.train()
    stopped = whole.state.global_step
    assert stopped < 12
    killed = make_trainer(
        tmp_path / "b", callbacks=[EarlyStoppingCallback(3), _Stop(stopped - 1)], **settings
    )
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = make_trainer(tmp_path / "b", callbacks=[EarlyStoppingCallback(3)], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == stopped
    assert_same(state(resumed), state(whole))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_accumulation_weighs_tokens_alike(tmp_path: Path, smoothing: float) -> None:
    """One batch of four, or four of one: the same update, although rows differ in length."""
    settings = {"max_steps": 1, "label_smoothing_factor": smoothing}
    together = make_trainer(tmp_path / "a", per_device_train_batch_size=4, **settings)
    apart = make_trainer(
        tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    order = list(together._get_train_sampler())[:4]
    apart._get_train_sampler = lambda *_: order  # type: ignore[method-assign]
    grads: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            named = kw["model"].named_parameters()
            grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    losses = []
    for trainer in (together, apart):
        trainer.args.max_grad_norm = 0.0
        trainer.add_callback(Keep())
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name in grads[0]:
        scale = grads[0][name].abs().max().clamp_min(1e-8)
        assert (grads[0][name] - grads[1][name]).abs().max() < 1e-4 * scale, name
    four = [rows(20)[i] for i in order]
    collate = together.data_collator
    model, _ = adapted()
    naive = torch.stack([causal_lm_loss(model, collate([row])) for row in four]).mean()
    assert abs(naive.item() - losses[0]) > 1e-3  # averaging batches would be another number
    wanted = causal_lm_loss(model, collate(four), label_smoothing=smoothing)
    assert losses[0] == pytest.approx(wanted.item(), rel=1e-4)


def test_evaluation_weighs_tokens_and_ignores_batch_size(tmp_path: Path) -> None:
    """Loss over all tokens, whatever the batches; named sets are reported by name."""
    found = []
    for size in (1, 3, 8):
        trainer = make_trainer(tmp_path, eval_rows=7, per_device_eval_batch_size=size)
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) == pytest.approx(found[2], rel=1e-5)
    collate = trainer.data_collator
    alone = [(causal_lm_loss(trainer.model, b), b) for b in ([collate([r]) for r in rows(7, 9)])]
    counts = [int((b["labels"] != -100).sum()) for _, b in alone]
    weighted = sum(float(x) * n for (x, _), n in zip(alone, counts, strict=True)) / sum(counts)
    assert found[0] == pytest.approx(weighted, rel=1e-5)
    unweighted = sum(float(loss) for loss, _ in alone) / 7
    assert abs(found[0] - unweighted) > 1e-4
    metrics = trainer.evaluate({"seen": rows(3), "unseen": rows(3, 4)})
    assert {"eval_seen_loss", "eval_unseen_perplexity"} <= metrics.keys()


def test_silent_zero_gradients_are_refused(tmp_path: Path) -> None:
    """An adapter that is not part of the graph stops the run at its first update."""
    trainer = make_trainer(tmp_path)
    for piece in trainer.adapter.pieces:
        piece.enabled = False
    with pytest.raises((AdapterError, RuntimeError), match="grad"):
        trainer.train()
    model, adapter = adapted()
    for name, parameter in adapter.named_parameters():
        if name.endswith("lora_B"):
            parameter.requires_grad_(False)  # A alone has gradient zero while B is zero
    cut = Trainer(
        model,
        adapter,
        trainer.args,
        train_dataset=rows(4),
        data_collator=trainer.data_collator,
    )
    with pytest.raises(AdapterError, match="no gradient reaches the adapter"):
        cut.train()


def test_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    """Recomputed activations on a frozen base: every B gets the same gradient."""
    plain = make_trainer(tmp_path / "a", max_steps=2)
    again = make_trainer(
        tmp_path / "b",
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    plain.train()
    again.train()
    left, right = state(plain), state(again)
    for name in left:
        assert torch.allclose(left[name], right[name], atol=1e-6), name


def test_nan_loss_stops_with_advice(tmp_path: Path) -> None:
    """A loss that is not a number is an error the user can act on, not a silent night."""
    trainer = make_trainer(tmp_path, logging_nan_inf_filter=False)
    with torch.no_grad():
        trainer.model.lm_head.weight[5].fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="learning_rate"):
        trainer.train()


def test_logs_carry_throughput_and_memory(tmp_path: Path) -> None:
    """Every training record has tokens per second, tokens so far and memory."""
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert len(records) == 3
    assert all(r["tokens_per_s"] > 0 and r["memory_gib"] > 0 for r in records)
    assert records[-1]["tokens"] == trainer.state.num_input_tokens_seen
    order = list(trainer._get_train_sampler())[: 3 * trainer.args.per_device_train_batch_size]
    assert records[-1]["tokens"] == sum(len(rows(20)[i]["input_ids"]) for i in order)  # no padding
    stored = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert stored["num_input_tokens_seen"] == records[-1]["tokens"]


def test_no_trainable_parameters_is_refused(tmp_path: Path) -> None:
    """A trainer needs something to train."""
    model, adapter = adapted()
    adapter.pieces = ()
    with pytest.raises(AdapterError, match="no trainable parameters"):
        Trainer(model, adapter, make_trainer(tmp_path).args, train_dataset=rows(2))
