"""Sweeps: counts from shapes, one number of parameters, ordinary runs that are not repeated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.analysis import sweep
from qlora_kit.analysis.sweep import (
    Cell,
    budget_cells,
    cell_config,
    linear_shapes,
    per_rank,
    rank_cells,
    run_sweep,
    sweep_table,
)
from qlora_kit.core.errors import AdapterError, ConfigError
from qlora_kit.load.model import load
from qlora_kit.train.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from tests import tiny_models

GROUPS = [("q_proj",), ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the tiny Llama on rows that it can learn."""
    root = tmp_path_factory.mktemp("sweep")
    base = tiny_models.save("llama", root / "base")
    tiny_models.tokenizer(base)
    rows = [{"prompt": f"{i}?", "completion": ["yes", "no"][i % 2]} for i in range(16)]
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        model=ModelConfig(path=str(base)),
        data=DataConfig(train=str(file), eval_fraction=0.25, max_length=64),
        adapter=LoRA(rank=4, alpha=8),
        train=TrainConfig(batch_size=4, max_steps=2, loggers=()),
        eval=EvalConfig(task="perplexity"),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_counts_are_those_of_an_attached_adapter(family):
    """Grouped-query attention and Conv1D included."""
    base = tiny_models.saved(family)
    groups = {"gpt2": [("c_attn",), ("c_attn", "mlp.c_proj")], "bert": [("query", "value")]}
    groups = groups.get(family, GROUPS)
    task = "sequence_classification" if family == "bert" else "causal_lm"
    config = RunConfig(model=ModelConfig(path=str(base), task=task), data=DataConfig(train="d"))
    options = {"num_labels": 2} if family == "bert" else {}
    for group, shapes in zip(groups, linear_shapes(config, groups), strict=True):
        model, _ = load(base, quant=None, dtype="float32", task=task, **options)
        attached = attach(model, LoRA(rank=3, targets=group))
        counted = sum(p.numel() for n, p in attached.named_parameters() if "lora_" in n)
        (cell,) = rank_cells([group], [shapes], (3,), (0,))
        assert cell.parameters == counted
        assert cell.parameters != 4 * per_rank(shapes)


def test_ranks_for_one_budget(run):
    """Table 5's rule: rank 2 of all four, and for fewer matrices as many parameters."""
    shapes = linear_shapes(run, GROUPS)
    cells = budget_cells(GROUPS, shapes, (0, 1))
    assert len(cells) == 6
    assert cells[-1].rank == 2
    counts = [cell.parameters for cell in cells]
    for cell, sizes in zip(cells[::2], shapes, strict=True):
        assert abs(cell.parameters - counts[-1]) <= per_rank(sizes) / 2
    assert cells[0].rank > cells[2].rank > 2
    assert budget_cells(GROUPS[:1], shapes[:1], (0,), budget=1024)[0].parameters == 1024
    with pytest.raises(ConfigError, match="does not pay for rank 1 of q_proj"):
        budget_cells(GROUPS[:1], shapes[:1], (0,), budget=10)


@pytest.mark.parametrize(("method", "scale"), [("lora", 2.0), ("rslora", 4.0)])
def test_the_scale_is_the_runs(run, method, scale):
    run = replace(run, method=method)
    for rank in (1, 16):
        cell = Cell(group=("q_proj",), rank=rank, parameters=0, seed=3)
        made = cell_config(run, cell, Path("x"))
        found = replace(made.adapter, rslora=method == "rslora")
        assert found.scale_of("q_proj") == pytest.approx(scale)
        assert (made.train.seed, made.output) == (3, f"x/q_proj-r{rank}-s3")


def test_a_sweep_trains_every_cell_once(run, tmp_path, monkeypatch, capsys):
    shapes = linear_shapes(run, GROUPS[:1])
    cells = rank_cells(GROUPS[:1], shapes, (1, 2), (0,))
    record = run_sweep("ranks", run, cells, tmp_path)
    assert [row["rank"] for row in record["rows"]] == [1, 2]
    assert all(row["loss"] > 0 for row in record["rows"])
    for cell in cells:
        done = json.loads((tmp_path / cell.name / "run.json").read_text())
        assert done["model"]["trainable"] == cell.parameters
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == record["rows"]
    assert "| q_proj | " in (tmp_path / "sweep.md").read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(sweep, "run_training", refuse)
    capsys.readouterr()
    assert run_sweep("ranks", run, cells, tmp_path)["rows"] == record["rows"]
    assert capsys.readouterr().out.count("finished before") == 2
    changed = replace(run, train=replace(run.train, learning_rate=1e-5))
    with pytest.raises(AssertionError, match="trained again"):  # other settings are another run
        run_sweep("ranks", changed, cells, tmp_path)


def test_tables():
    rows = [
        {
            "group": [g],
            "rank": r,
            "parameters": 10 * r,
            "seed": s,
            "loss": r + s,
            "scores": {"a": 0.5},
        }
        for g, r in (("q", 1), ("q", 2), ("v", 1))
        for s in (0, 2)
    ]
    table = sweep_table("ranks", rows)
    assert table.header == ("adapted", "r = 1", "r = 2")
    assert table.rows == [
        ("q", "2.0000 ± 1.4142", "3.0000 ± 1.4142"),
        ("v", "2.0000 ± 1.4142", "-"),
    ]
    table = sweep_table("matrices", rows[2:])
    assert table.rows[0] == ("q", "2", "20", "3.0000 ± 1.4142", "50.0%")


def test_refusals(run, tmp_path):
    with pytest.raises(ConfigError, match="held-out"):
        run_sweep("ranks", replace(run, data=DataConfig(train="d")), [], tmp_path)
    with pytest.raises(AdapterError, match="matches no linear"):
        linear_shapes(run, [("query",)])
