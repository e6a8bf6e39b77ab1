"""A run and its plan: what is chosen, refused, printed and held to measurements."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora_kit.adapters.adalora.config import RankBudget
from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.cli.main import main
from qlora_kit.cli.run_config import to_yaml
from qlora_kit.core.errors import ConfigError, UserError
from qlora_kit.plan.budget import Budget, needed_bytes
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.search import Planner
from qlora_kit.train import planning
from qlora_kit.train import run as run_module
from qlora_kit.train.callbacks import training_note
from qlora_kit.train.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from qlora_kit.train.expected import Expected, expected_of
from qlora_kit.train.held_out import language_model_losses
from qlora_kit.train.planning import (
    RunPlan,
    advice,
    bounded_evaluation,
    enforce,
    gpu_of,
    largest_batch,
    plan_run,
    setup_of,
)
from qlora_kit.train.run import run_training
from qlora_kit.train.sampling import divide
from qlora_kit.train.summary import plan_text
from tests import tiny_models
from tests.plan.shapes import llama

GPU = find_gpu("l4")
LENGTHS = [100, 4000, 3000]


def make(**changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(path="m"),
        "data": DataConfig(train="t.jsonl"),
        "adapter": LoRA(rank=8),
        "train": TrainConfig(batch_size=2, optimizer="adamw_8bit"),
    }
    return RunConfig(**settings | changes)


def test_a_run_becomes_a_setup():
    run = make(
        method="lora_fa",
        model=ModelConfig(path="m", embeddings_on_host=True, quantize_head=True),
        train=TrainConfig(gradient_checkpointing=True, gradient_accumulation=3, tile=512),
    )
    setup = setup_of(run, batch=2, seq=64)
    assert (setup.activations, setup.accumulation, setup.tile) == ("recompute_all", 3, 512)
    assert setup.adapter.freeze_a
    assert setup.quant == run.base_quant != run.quant
    assert setup.embeddings_on_host
    assert setup.graph
    assert setup_of(make(train=TrainConfig(step="compiled")), batch=1, seq=8).step == "eager"
    narrow = make(method="bottleneck", bottleneck=Bottleneck(width=3))
    assert setup_of(narrow, batch=1, seq=8).adapter == narrow.bottleneck
    ranks = make(method="adalora", adalora=RankBudget(target_rank=2))
    assert setup_of(ranks, batch=1, seq=8).adapter.budget == ranks.adalora


def test_the_largest_batch_is_that_of_the_longest_row():
    assert largest_batch(make(), LENGTHS, 8) == (2, 4000)
    assert largest_batch(make(), [13], 8) == (1, 16)


def test_the_fastest_policy_that_fits_is_chosen():
    """Of the longest batch of the data, and put into the run."""
    run = make(budget="4GiB")
    plan = plan_run(run, llama(), LENGTHS, GPU)
    assert plan is not None
    assert (plan.predicted.setup.batch, plan.predicted.setup.seq) == (2, 4000)
    assert plan.planner.budget.fits(plan.predicted)
    chosen = plan.apply(run)
    assert chosen.train.activations == plan.predicted.setup.activations != "auto"
    assert chosen.train.keep_decoded == plan.predicted.setup.keep_decoded
    assert "GiB needed" in plan.line


def test_what_was_asked_for_is_kept():
    run = make(train=TrainConfig(batch_size=2, activations="recompute_mlp", keep_decoded=1))
    plan = plan_run(run, llama(), LENGTHS, GPU)
    assert plan is not None
    assert plan.apply(run) == run
    assert plan.predicted.setup.keep_decoded == 1
    left = make(train=TrainConfig(batch_size=2, keep_decoded=0))
    again = plan_run(left, llama(), LENGTHS, GPU)
    assert again is not None
    assert again.predicted.setup.keep_decoded == 0


def test_own_code_is_recomputed_where_it_has_to_be():
    """Two ways, by the Trainer's own switch."""
    run = make(train=TrainConfig(batch_size=2, step="eager"))
    wide = plan_run(run, llama(), LENGTHS, GPU)
    assert wide is not None
    assert not wide.apply(run).train.gradient_checkpointing
    saved = needed_bytes(wide.predicted)
    tight = plan_run(replace(run, budget=str(saved - 1)), llama(), LENGTHS, GPU)
    assert tight is not None
    assert tight.apply(run).train.gradient_checkpointing
    assert tight.apply(run).train.activations == "auto"


def test_a_run_that_does_not_fit_is_refused_with_what_does():
    run = make(
        budget="1200MiB",
        train=TrainConfig(batch_size=2, activations="save", optimizer="adamw_8bit"),
    )
    with pytest.raises(ConfigError, match="does not fit into") as caught:
        plan_run(run, llama(), LENGTHS, GPU)
    text = str(caught.value)
    assert "too much by" in text
    assert "--train.activations" in text
    assert "plan=off" in text
    assert max(len(line) for line in text.splitlines()[1:]) <= 80


def test_a_run_that_may_just_fit_runs_with_a_warning(caplog):
    """Between the prediction and the margin nobody knows: the run is not refused."""
    made = Planner(llama(), GPU, Budget.of("20GiB")).predict(
        replace(setup_of(make(), batch=2, seq=4000), activations="save")
    )
    between = made.peak_bytes + made.outside + 1
    train = TrainConfig(batch_size=2, activations="save", optimizer="adamw_8bit")
    run = make(budget=str(between), train=train)
    with caplog.at_level("WARNING", logger="qlora_kit"):
        assert plan_run(run, llama(), LENGTHS, GPU) is not None
    assert "memory will be tight" in caplog.text


def test_what_cannot_be_planned_trains_without_a_plan():
    assert plan_run(make(train=TrainConfig(optimizer="sgd")), llama(), LENGTHS, GPU) is None


@pytest.mark.parametrize("method", ["dora", "adalora", "bitfit", "prefix_tuning", "glora"])
def test_every_method_has_a_plan(method):
    made = plan_run(make(method=method), llama(), LENGTHS, GPU)
    assert made is not None
    assert made.predicted.setup.method == method


def test_runs_that_are_not_planned(monkeypatch):
    monkeypatch.setattr(planning, "this_machine", lambda: GPU)
    assert gpu_of(make()) is GPU
    assert gpu_of(make(plan="off")) is None
    assert gpu_of(make(model=ModelConfig(path="m", device="cpu"))) is None
    assert gpu_of(make(model=ModelConfig(path="m", task="sequence_classification"))) is None


def test_a_prediction_is_held_to_the_batch_that_came():
    plan = plan_run(make(), llama(), LENGTHS, GPU)
    assert plan is not None
    peak = plan.predicted.peak_bytes
    same = plan.judge(peak, (2, 4000))
    assert same["difference"] == 0
    assert same["predicted_gib"] == same["measured_gib"] == round(peak / 2**30, 3)
    smaller = plan.judge(peak, (2, 2000))
    assert smaller["predicted_gib"] < same["predicted_gib"]
    assert "warning" not in str(plan_text(same))
    assert "warning: more than 5% apart" in str(plan_text(plan.judge(int(1.06 * peak))))
    assert "warning" not in str(plan_text(plan.judge(int(1.04 * peak))))
    assert plan_text(None) is None


def test_advice_needs_less_than_what_failed():
    run = make(train=TrainConfig(batch_size=4, activations="save", optimizer="adamw_8bit"))
    text = advice(run, llama(), LENGTHS * 2)
    assert text is not None
    assert "nearest settings that fit" in text
    assert "--train.batch_size" in text
    assert "--train.activations" in text
    assert "nearest settings that fit" in str(advice(make(method="bitfit"), llama(), LENGTHS))


def test_logs_on_a_cpu_say_nothing_of_a_plan():
    model = tiny_models.build("llama")
    rows = SimpleNamespace(task="causal_lm", report=SimpleNamespace(tokens=10, examples=1))
    assert expected_of(model, rows, None) is None
    logs = Expected(flops_per_token=1e9, gpu_flops=1e12, peak_bytes=3 << 29).logs(500.0)
    assert logs == {"mfu": 0.5, "memory_predicted_gib": 1.5}
    note = training_note({"loss": 1.0, "memory_gib": 1.4, **logs})
    assert "MFU 50%" in note
    assert "1.4 of 1.5 GiB" in note


def test_evaluation_batches_are_no_larger_than_training_batches():
    lengths = [50, 40, 40, 9, 9, 9, 9, 9, 9]
    batches = divide(lengths, lambda item: item, 4, 80)
    assert [item for batch in batches for item in batch] == lengths
    assert all(len(batch) == 1 or len(batch) * batch[0] <= 80 for batch in batches)
    assert max(len(batch) for batch in batches) == 4
    assert divide(lengths, lambda item: item, 4, None)[0] == lengths[:4]
    held_out = [SimpleNamespace(lengths=[10, 100]), SimpleNamespace(lengths=[1])]
    assert bounded_evaluation(make(), held_out, 350).eval.batch_size == 3
    assert bounded_evaluation(make(), held_out, 20).eval.batch_size == 1
    assert bounded_evaluation(make(), [], 20).eval.batch_size == EvalConfig().batch_size


# A whole run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("base"))
    tiny_models.tokenizer(folder)
    return folder


def whole(base: Path, folder: Path, **changes: Any) -> RunConfig:
    rows = [{"prompt": "good " * (i % 4 + 1), "completion": "yes"} for i in range(16)]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    settings: dict[str, Any] = {
        "model": ModelConfig(path=str(base)),
        "data": DataConfig(train=str(file), eval=str(file), max_length=64),
        "adapter": LoRA(rank=4),
        "train": TrainConfig(batch_size=4, log_every=1, loggers=()),
        "eval": EvalConfig(before=False, samples=0, max_new_tokens=2),
        "output": str(folder / "out"),
    }
    return RunConfig(**settings | changes)


@pytest.mark.parametrize("plan", ["auto", "off"])
def test_on_a_cpu_nothing_is_planned(base, tmp_path, plan):
    console = Console(record=True, width=120, quiet=False, file=(tmp_path / "log").open("w"))
    result = run_training(whole(base, tmp_path, plan=plan), console=console)
    text = console.export_text()
    assert result.record["plan"] is None
    assert result.record["config"]["train"]["activations"] == "auto"
    assert not any(
        {"mfu", "memory_predicted_gib"} & set(e) for e in result.record["training"]["history"]
    )
    assert "predicted" not in text


def test_a_planned_run_prints_predicted_beside_measured(base, tmp_path, monkeypatch):
    """With a made-up GPU and a made-up measurement, on the CPU."""
    monkeypatch.setattr(run_module, "gpu_of", lambda config: GPU)
    real = run_module.Stages.stage
    seen: list[tuple[int, int]] = []

    def judge(self: RunPlan, measured: int, widest: tuple[int, int]) -> dict[str, Any]:
        seen.append(widest)
        return {
            "predicted_gib": 2.0,
            "measured_gib": round(measured / 2**30, 3),
            "difference": -0.2,
            "budget_gib": 22.0,
            "predicted": {},
        }

    @contextmanager
    def stage(self: Any, name: str) -> Any:
        with real(self, name):
            yield
        self.entries[-1]["gpu_peak_bytes"] = 5 << 29

    monkeypatch.setattr(run_module.Stages, "stage", stage)
    monkeypatch.setattr(RunPlan, "judge", judge)
    console = Console(record=True, width=120, file=(tmp_path / "log").open("w"))
    result = run_training(whole(base, tmp_path), console=console)
    text = console.export_text()
    assert "training peak: 2.00 GiB predicted, 2.50 GiB measured (-20.0%)" in text
    assert "warning: more than 5% apart" in text
    assert len(seen) == 1
    assert seen[0][0] == 4
    assert result.record["plan"]["predicted_gib"] == 2.0
    assert result.record["config"]["train"]["activations"] == "auto"  # as asked
    assert [entry["name"] for entry in result.record["stages"]][:2] == ["data", "plan"]
    assert "2.00 GiB predicted" in result.report.read_text()


@pytest.mark.gpu
def test_on_a_gpu_a_run_is_planned_and_measured(base, tmp_path):
    """A tiny model is mostly libraries' workspace, so the bound is absolute."""
    result = run_training(whole(base, tmp_path, budget="6GiB"), console=Console(quiet=True))
    plan = result.record["plan"]
    assert abs(plan["predicted_gib"] - plan["measured_gib"]) < 0.1
    assert plan["budget_gib"] == 6.0
    logged = result.record["training"]["history"][0]
    assert logged["mfu"] >= 0
    assert logged["memory_predicted_gib"] > 0


def test_running_out_of_memory_inside_the_model_is_explained(base, tmp_path, monkeypatch):
    """A layer that finds no memory: the table and what takes less, exit code 2."""

    def full(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    config = whole(base, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", full)
        with pytest.raises(UserError, match="nearest settings that fit"):
            run_training(config, console=Console(quiet=True))
        file = tmp_path / "run.yaml"
        file.write_text(to_yaml(replace(config, output=str(tmp_path / "two"))))
        assert main(["train", str(file)]) == 2


@pytest.mark.parametrize("plan", ["auto", "off"])
@pytest.mark.parametrize(
    ("budget", "limits"), [("12GiB", [12 << 30]), ("500MB", [500_000_000]), ("auto", [])]
)
def test_a_budget_that_is_named_is_enforced(monkeypatch, plan, budget, limits):
    """Whether or not a plan is made; without one nothing is."""
    found: list[int] = []
    monkeypatch.setattr(planning, "_limit", found.append)
    monkeypatch.setattr(planning, "is_on_gpu", lambda device: device != "cpu")
    enforce(make(plan=plan, budget=budget))
    assert found == limits
    enforce(make(plan=plan, budget=budget, model=ModelConfig(path="m", device="cpu")))
    assert found == limits


def test_a_budget_that_is_no_size_is_refused(monkeypatch):
    monkeypatch.setattr(planning, "is_on_gpu", lambda device: True)
    with pytest.raises(ConfigError, match="much"):
        enforce(make(budget="much"))


@pytest.mark.parametrize(
    "method", ["lora", "bitfit"]
)  # with a plan, if there is a GPU, and without
@pytest.mark.parametrize("plan", ["auto", "off"])
def test_a_run_under_a_budget_ends_at_it(base, tmp_path, monkeypatch, capsys, plan, method):
    """The limit is there before the model is; beyond it: what takes less, and exit code 2."""
    limits: list[int] = []
    monkeypatch.setattr(planning, "_limit", limits.append)
    monkeypatch.setattr(planning, "is_on_gpu", lambda device: True)
    real_load, real_mlp = run_module.load, LlamaMLP.forward
    seen: list[int] = []

    def load(*arguments: Any, **named: Any) -> Any:
        seen.append(len(limits))
        return real_load(*arguments, **named)

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        if limits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real_mlp(self, x)

    monkeypatch.setattr(run_module, "load", load)
    monkeypatch.setattr(LlamaMLP, "forward", mlp)
    free = whole(base, tmp_path, plan=plan, method=method, output=str(tmp_path / "free"))
    run_training(free, console=Console(quiet=True))
    assert seen == [0]
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(replace(free, budget="12GiB", output=str(tmp_path / "held"))))
    assert main(["train", str(file)]) == 2
    assert (seen, limits) == ([0, 1], [12 << 30])
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert ("nearest settings that fit" if method == "lora" else "Try, in this order") in said
    assert "Traceback" not in said


def test_losses_do_not_depend_on_how_rows_are_divided(base):
    """Bounded batches measure what others measure, up to rounding."""
    model = tiny_models.build("llama").eval()
    ids = torch.arange(3, 27).view(4, 6)
    whole_sum = language_model_losses(model, {"input_ids": ids, "labels": ids})[0].sum()
    parts = [
        language_model_losses(model, {"input_ids": p, "labels": p})[0].sum() for p in ids.split(1)
    ]
    eps = torch.finfo(torch.float32).eps
    assert abs(sum(parts) - whole_sum) < 64 * eps * whole_sum
    assert abs(sum(parts[:3]) - whole_sum) > 64 * eps * whole_sum
