"""A whole run on tiny models: everything that should be there is there and fits together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.inject import load_adapter
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.core.errors import ConfigError, DataError, UserError
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train import run as run_module
from qlora_kit.train.config import (
    DataConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from qlora_kit.train.run import run_training
from tests import tiny_models

WORDS = ["good", "bad", "fine", "dull", "long", "short", "warm", "cold", "odd"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("base"))
    tiny_models.tokenizer(folder)
    return folder


def write(path: Path, count: int, offset: int = 0) -> str:
    rows = []
    for i in range(count):
        words = [WORDS[(i * 5 + k * 3 + offset) % len(WORDS)] for k in range(i % 4 + 1)]
        label = "yes" if len(words[0]) > 3 else "no"
        rows.append({"prompt": " ".join(words), "completion": label})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def make_config(base: Path, folder: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(path=str(base), device="cpu"),
        "data": DataConfig(
            train=write(folder / "train.jsonl", 24),
            eval=write(folder / "eval.jsonl", 7, 1),
            max_length=64,
        ),
        "adapter": LoRA(rank=4, alpha=8),
        "train": TrainConfig(batch_size=4, learning_rate=1e-2, log_every=2, save_every=2),
        "eval": EvalConfig(batch_size=3, samples=2, max_new_tokens=4),
        "output": str(folder / "out"),
    }
    return RunConfig(**settings | changes)


def quiet() -> Console:
    return Console(quiet=True)


def test_whole_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapter, merged model, record, report; the report's path is the last line."""
    config = make_config(base, tmp_path, export=ExportConfig(merge=True, dtype="float32"))
    result = run_training(config)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].split() == ["report", str(result.report)]
    record = json.loads((result.output / "run.json").read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["training"]["updates"] == 6
    assert [entry["name"] for entry in record["stages"]] == [
        "data",
        "load",
        "before",
        "train",
        "after",
        "merge",
        "check",
    ]
    assert result.before[0].name == result.after[0].name == "eval"
    assert result.after[0].task == "choice"
    assert result.after[0].loss < result.before[0].loss
    assert record["merge"]["deviation"]["kl"] < 1e-6
    assert record["merge"]["deviation"]["top1_agreement"] == 1.0
    assert any(result.output.glob("logs/events.*"))
    page = result.report.read_text()
    assert "Held-out results" in page
    assert "Merged model" in page
    # The saved pieces answer as the run did.
    model, _ = load(base, quant=QuantConfig(), device="cpu")
    load_adapter(model, result.adapter)
    merged = AutoModelForCausalLM.from_pretrained(result.merged)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_killed_run_resumes_to_the_same_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same adapter as an uninterrupted run; the base is not measured twice."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    settings = {"adapter": LoRA(rank=4, dropout=0.2)}
    whole = run_training(make_config(base, folders[0], **settings), console=quiet())
    real = run_module.Trainer.training_step

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(run_module.Trainer, "training_step", dies)
    config = make_config(base, folders[1], **settings)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, console=quiet())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="interrupted run"):
        run_training(config, console=quiet())
    resumed = run_training(make_config(base, folders[1], **settings, resume=True), console=quiet())
    name = "adapter_model.safetensors"
    assert (whole.adapter / name).read_bytes() == (resumed.adapter / name).read_bytes()
    assert "before" not in [entry["name"] for entry in resumed.record["stages"]]
    assert resumed.before[0].loss == whole.before[0].loss
    steps = [e["step"] for e in resumed.record["training"]["history"] if "loss" in e]
    assert steps == [e["step"] for e in whole.record["training"]["history"] if "loss" in e]


def test_resume_after_the_last_update(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training was done when the run died: a resume finishes the rest from the checkpoint."""
    export = ExportConfig(merge=True, dtype="float32")

    def full_disk(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(run_module, "merge_and_check", full_disk)
    with pytest.raises(OSError, match="no space"):
        run_training(make_config(base, tmp_path, export=export), console=quiet())
    monkeypatch.undo()
    trained = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    result = run_training(make_config(base, tmp_path, export=export, resume=True), console=quiet())
    assert (result.adapter / "adapter_model.safetensors").read_bytes() == trained
    assert result.merged is not None
    assert result.record["training"]["updates"] == 6
    assert result.record["training"]["tokens_per_s"] > 0
    assert result.after[0].loss < result.before[0].loss


def test_output_is_protected(base: Path, tmp_path: Path) -> None:
    """A finished run is replaced only if asked to; other files in the folder survive that."""
    config = make_config(base, tmp_path, train=TrainConfig(max_steps=1, loggers=()))
    run_training(config, console=quiet())
    note = tmp_path / "out" / "notes.txt"
    note.write_text("mine")
    with pytest.raises(ConfigError, match="finished run"):
        run_training(config, console=quiet())
    with pytest.raises(ConfigError, match="finished run"):
        run_training(make_config(base, tmp_path, resume=True, train=config.train), console=quiet())
    run_training(make_config(base, tmp_path, overwrite=True, train=config.train), console=quiet())
    assert note.read_text() == "mine"
    missing = DataConfig(train=str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="gone"):
        run_training(make_config(base, tmp_path, overwrite=True, data=missing), console=quiet())
    assert (tmp_path / "out" / "run.json").exists()  # a mistake in the new run costs nothing
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_training(
            make_config(base, tmp_path, resume=True, output=str(tmp_path / "new")),
            console=quiet(),
        )


def test_embeddings_on_host_leave_the_dtype_of_the_base(tmp_path: Path) -> None:
    """A float32 adapter comes first then: layers are decoded, merged and checked in bfloat16."""
    folder = tiny_models.save("llama", tmp_path / "base", tie_word_embeddings=False)
    tiny_models.tokenizer(folder)
    model = ModelConfig(path=str(folder), device="cpu", dtype="bfloat16", embeddings_on_host=True)
    train = TrainConfig(batch_size=4, max_steps=2, step="fused", keep_decoded=1)
    changes = {"model": model, "train": train, "export": ExportConfig(merge=True)}
    result = run_training(make_config(folder, tmp_path, **changes), console=quiet())
    assert result.record["model"]["dtype"] == "bfloat16"
    assert result.record["merge"]["deviation"]["kl"] < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(result.merged)
    assert merged.dtype == torch.bfloat16


def test_16_bit_base_fa_and_packing(base: Path, tmp_path: Path) -> None:
    """The one-flag variants, several held-out sets, early stopping and the best checkpoint."""
    data = DataConfig(
        train=write(tmp_path / "t.jsonl", 40),
        eval_sets={
            "seen": write(tmp_path / "s.jsonl", 5),
            "unseen": write(tmp_path / "u.jsonl", 4, 2),
        },
        max_length=64,
        packing=True,
    )
    config = make_config(
        base,
        tmp_path,
        data=data,
        model=ModelConfig(path=str(base), bits=16, device="cpu"),
        method="lora_fa",
        train=TrainConfig(
            batch_size=2, epochs=6, eval_every=1, early_stopping=2, learning_rate=0.3, loggers=()
        ),
        export=ExportConfig(merge=True, into="original", dtype="float32"),
    )
    result = run_training(config, console=quiet())
    assert [one.name for one in result.after] == ["seen", "unseen"]
    training = result.record["training"]
    assert training["stopped_early"]
    assert training["best_update"] is not None
    assert any("eval_seen_loss" in entry for entry in training["history"])
    assert result.record["data"]["train"]["packed_rows"] < 40
    assert result.record["merge"]["deviation"]["kl"] < 1e-6


def test_classifier(tmp_path: Path) -> None:
    """An encoder with a new head: trained, saved with the adapter, merged, classes named."""
    base = tiny_models.save("bert", tmp_path / "base")
    tiny_models.tokenizer(base)
    rows = [{"text": word, "label": "long" if len(word) > 3 else "short"} for word in WORDS * 3]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    file = str(tmp_path / "rows.jsonl")
    config = make_config(
        base,
        tmp_path,
        model=ModelConfig(
            path=str(base),
            device="cpu",
            task="sequence_classification",
            labels=("short", "long"),
        ),
        data=DataConfig(train=file, eval=file, max_length=32),
        train=TrainConfig(epochs=4, batch_size=4, learning_rate=5e-3, loggers=()),
        export=ExportConfig(merge=True, dtype="float32"),
    )
    result = run_training(config, console=quiet())
    assert result.after[0].task == "classification"
    assert result.after[0].loss < result.before[0].loss
    assert set(result.after[0].scores) == {"accuracy", "macro_f1"}
    assert result.record["merge"]["deviation"]["kl"] < 1e-6
    saved = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert saved["label2id"] == {"short": 0, "long": 1}


def test_refusals_come_before_the_model(base: Path, tmp_path: Path) -> None:
    """Settings that cannot work and data that cannot be read fail before anything is loaded."""
    with pytest.raises(ConfigError, match="eval_every"):
        run_training(make_config(base, tmp_path, train=TrainConfig(early_stopping=2)))
    with pytest.raises(ConfigError, match="pip install"):
        run_training(make_config(base, tmp_path, train=TrainConfig(loggers=("wandb",))))
    with pytest.raises(ConfigError, match="adamw_torch"):
        run_training(make_config(base, tmp_path, train=TrainConfig(optimizer="adamw_torc")))
    with pytest.raises(ConfigError, match="no GPU"):
        run_training(make_config(base, tmp_path, train=TrainConfig(optimizer="paged_adamw_8bit")))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}')
    with pytest.raises(DataError):
        run_training(make_config(base, tmp_path, data=DataConfig(train=str(bad))))


def test_deterministic_runs_repeat(base: Path, tmp_path: Path) -> None:
    """Asked to be repeatable, two runs give the same bytes; another seed gives others."""
    found = []
    try:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            (tmp_path / name).mkdir()
            train = TrainConfig(deterministic=True, max_steps=2, seed=seed, loggers=())
            settings = {"adapter": LoRA(rank=2, dropout=0.1), "eval": EvalConfig(before=False)}
            config = make_config(base, tmp_path / name, train=train, **settings)
            result = run_training(config, console=quiet())
            found.append((result.adapter / "adapter_model.safetensors").read_bytes())
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[0] == found[1] != found[2]


def test_out_of_memory_is_advice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to lower, in the run's own terms, instead of a traceback."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(run_module.Trainer, "training_step", full)
    with pytest.raises(UserError, match=r"out of memory") as caught:
        run_training(make_config(base, tmp_path), console=quiet())
    text = str(caught.value)
    assert "needed on the GPU" in text
    assert "--train.batch_size 2 --train.gradient_accumulation 2" in text
