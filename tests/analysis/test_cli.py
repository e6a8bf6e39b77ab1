"""`qlora-kit inspect` as a user meets it."""

import json

import pytest

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.selective.config import BitFit
from qlora_kit.cli.main import main
from tests import tiny_models
from tests.analysis.helpers import peft_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of PEFT's on a tiny Llama, one of them in the folder of a run."""
    base, root = tiny_models.saved("llama"), tmp_path_factory.mktemp("adapters")
    peft_adapter(base, root / "one", rank=4, seed=1)
    peft_adapter(base, root / "run" / "adapter", rank=8, seed=2)
    return [str(root / "one"), str(root / "run")]


def test_two_adapters(folders, tmp_path, capsys):
    assert main(["inspect", *folders, "--out", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for words in ("spectrum of ΔW", "‖UᵀWV‖ by directions", "φ, means over layers", "inspect.html"):
        assert words in text
    record = json.loads((tmp_path / "inspect.json").read_text())
    assert [len(adapter["amplification"]) for adapter in record["adapters"]] == [6, 6]
    figures = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert figures == [f"pair1-{n}.svg" for n in range(1, 5)]


def test_one_adapter_some_modules_no_weights(folders, tmp_path, capsys):
    words = ["--modules", "q_proj", "--no-base", "--out", str(tmp_path)]
    assert main(["inspect", folders[0], *words]) == 0
    text = capsys.readouterr().out
    assert "‖UᵀWV‖" not in text
    assert "self_attn.q_proj" in text
    assert "down_proj" not in text


def test_a_base_that_is_gone_costs_the_table_only(folders, tmp_path, capsys):
    adapter = tmp_path / "moved"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((tmp_path.__class__(folders[0]) / name).read_bytes())
    file = adapter / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": "./no/such/base"}
    file.write_text(json.dumps(fields))
    out = ["--out", str(tmp_path / "out")]
    assert main(["inspect", str(adapter), *out]) == 0
    assert "no amplification table: './no/such/base' does not exist" in capsys.readouterr().out
    assert main(["inspect", str(adapter), "--base", "./no/such/base", *out]) == 2
    assert main(["inspect", str(adapter), folders[0], *out]) == 2
    assert "different bases" in capsys.readouterr().err
    base = str(tiny_models.saved("llama"))
    assert main(["inspect", str(adapter), "--base", base, "--into", "original", *out]) == 0


def test_what_has_no_spectrum_says_what_it_is(tmp_path, capsys):
    attach(tiny_models.build("llama"), BitFit()).save(tmp_path / "biases")
    assert main(["inspect", str(tmp_path / "biases"), "--no-base"]) == 2
    assert "its method is bitfit, and `inspect` reads lora, " in capsys.readouterr().err
    run = tmp_path / "run"  # of full fine-tuning, which leaves a model where an adapter would be
    tiny_models.build("llama").save_pretrained(run / "adapter")
    settings = {"model": {"path": "base"}, "data": {"train": "rows.jsonl"}, "method": "full"}
    (run / "config.json").write_text(json.dumps(settings))
    for path in (run, run / "adapter"):
        assert main(["inspect", str(path), "--no-base"]) == 2
        assert "saves a whole model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/adapter"], "is not an adapter folder"),
        (["ONE", "--sides", "A,C"], "--sides takes A, B, input, output"),
        (["ONE", "--no-base", "--base", "x"], "contradict"),
        (["--sweep", "rank", "run.yaml"], "--sweep takes ranks or matrices"),
        (["--sweep", "ranks", "run.yaml", "--budget", "5"], "--budget is not for --sweep ranks"),
        (["--sweep", "ranks", "run.yaml", "--ranks", "a"], "cannot read run.yaml"),
        (["--sweep", "ranks"], "needs a run file"),
    ],
)
def test_messages(words, message, folders, capsys):
    words = [folders[0] if word == "ONE" else word for word in words]
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "more", "cells"),
    [
        ("ranks", ["--groups", "q_proj q_proj,v_proj", "--ranks", "1,2"], 4),
        ("matrices", ["--seeds", "0,1", "--groups", "v_proj"], 2),
        ("matrices", [], 7),
        ("ranks", [], 15),
    ],
)
def test_sweeps(kind, more, cells, tmp_path, monkeypatch, capsys):
    """The flags reach the sweep; what it trains is tested in test_sweep.py."""
    from qlora_kit.analysis import sweep

    seen = []

    def pretend(kind, config, cells, folder):
        seen.extend(cells)
        row = {"group": ["q"], "rank": 1, "parameters": 1, "loss": 1.0, "scores": {}}
        return {"rows": [row], "config": config}

    monkeypatch.setattr(sweep, "run_sweep", pretend)
    base = tiny_models.saved("llama")
    words = ["--model.path", str(base), "--data.train", "d.jsonl", "--out", str(tmp_path)]
    assert main(["inspect", "--sweep", kind, *words, *more]) == 0
    assert len(seen) == cells
    assert "Held-out loss" in capsys.readouterr().out
