"""Runs of the methods that are not like LoRA: from the configuration to what they leave behind."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.bottleneck.config import Bottleneck
from qlora_kit.adapters.inject import attach, load_adapter
from qlora_kit.adapters.prompt.config import PrefixTuning, PromptTuning
from qlora_kit.adapters.selective.config import BitFit, Full, TopK
from qlora_kit.cli.target import resolve_target, run_settings
from qlora_kit.core.errors import ConfigError
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train.config import DataConfig, ExportConfig, ModelConfig, TrainConfig
from qlora_kit.train.data.collate import PadCollator
from qlora_kit.train.run import run_training
from qlora_kit.train.trainer import Trainer
from tests import tiny_models
from tests.train.helpers import arguments, rows, state
from tests.train.test_run import WORDS, make_config, quiet

CONFIGS = {
    "bitfit": BitFit(),
    "bottleneck": Bottleneck(width=4),
    "top_k": TopK(blocks=1),
    "full": Full(),
    "prefix_tuning": PrefixTuning(length=3, hidden=8),
    "prompt_tuning": PromptTuning(length=3, place="infix"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("base"))
    tiny_models.tokenizer(folder)
    return folder


@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "full"])
def test_a_run_on_a_4_bit_base(base: Path, tmp_path: Path, method: str) -> None:
    merges = method == "top_k"
    config = make_config(
        base,
        tmp_path,
        method=method,
        export=ExportConfig(merge=merges, dtype="float32"),
        **{method: CONFIGS[method]},
    )
    result = run_training(config, console=quiet())
    assert result.after[0].loss < result.before[0].loss
    if merges:
        assert result.record["merge"]["deviation"]["kl"] < 1e-6
    model, _ = load(base, quant=QuantConfig(), device="cpu")
    adapter = load_adapter(model, result.adapter)
    if method == "prefix_tuning":  # its MLP is dropped
        assert adapter.config == PrefixTuning(length=3, hidden=None)
    else:
        assert adapter.config == CONFIGS[method]
        assert adapter.num_trainable == result.record["model"]["trainable"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_run_leaves_a_model(base: Path, tmp_path: Path, dtype: str) -> None:
    """float32 masters under autocast on a base that computes in bfloat16, or all in bfloat16."""
    config = make_config(
        base,
        tmp_path,
        method="full",
        full=Full(dtype=dtype),  # type: ignore[arg-type]
        model=ModelConfig(path=str(base), bits=16, device="cpu", dtype="bfloat16"),
    )
    result = run_training(config, console=quiet())
    assert result.after[0].loss < result.before[0].loss - 1
    model = AutoModelForCausalLM.from_pretrained(result.adapter)
    assert model.dtype == torch.bfloat16
    assert (result.adapter / "tokenizer.json").is_file()
    assert not (result.adapter / "adapter_config.json").exists()
    options = Namespace(base_model=None, bits=None)
    for path in (result.output, result.adapter):  # what `chat`, `eval` and the like are given
        target = resolve_target(str(path), options)
        assert (target.base, target.adapter, target.quant) == (str(result.adapter), None, None)
        settings = run_settings(str(path))
        assert settings is not None
        assert settings.method == "full"


def test_settings_that_do_not_fit_the_method(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.bits=16"):
        run_training(make_config(base, tmp_path, method="full"), console=quiet())
    on_host = ModelConfig(path=str(base), bits=16, device="cpu", embeddings_on_host=True)
    with pytest.raises(ConfigError, match="embeddings_on_host=false"):
        run_training(make_config(base, tmp_path, method="full", model=on_host), console=quiet())
    for method, bits in (("bottleneck", 4), ("full", 16)):
        config = make_config(
            base,
            tmp_path,
            method=method,
            model=ModelConfig(path=str(base), bits=bits, device="cpu"),  # type: ignore[arg-type]
            export=ExportConfig(merge=True),
        )
        with pytest.raises(ConfigError, match=f"not for method {method}"):
            run_training(config, console=quiet())


def test_packed_rows_are_refused_where_they_would_not_see_a_prompt(
    base: Path, tmp_path: Path
) -> None:
    config = make_config(base, tmp_path, method="prompt_tuning")
    config = replace(config, data=replace(config.data, packing=True))
    with pytest.raises(ConfigError, match=r"data\.packing=false"):
        run_training(config, console=quiet())


@pytest.mark.parametrize("method", ["bitfit", "bottleneck", "top_k", "prefix_tuning"])
def test_an_encoder_learns_classes(tmp_path: Path, method: str) -> None:
    folder = tiny_models.save("roberta", tmp_path / "base")
    tiny_models.tokenizer(folder)
    labelled = [{"text": w, "label": "long" if len(w) > 3 else "short"} for w in WORDS * 3]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in labelled))
    file = str(tmp_path / "rows.jsonl")
    config = make_config(
        folder,
        tmp_path,
        method=method,
        model=ModelConfig(
            path=str(folder),
            device="cpu",
            task="sequence_classification",
            labels=("short", "long"),
        ),
        data=DataConfig(train=file, eval=file, max_length=32),
        train=TrainConfig(epochs=4, batch_size=4, learning_rate=5e-3, loggers=()),
        **{method: CONFIGS[method]},
    )
    result = run_training(config, console=quiet())
    assert result.after[0].loss < result.before[0].loss
    target = resolve_target(str(result.output), Namespace(base_model=None, bits=None))
    assert (target.task, target.num_labels) == ("sequence_classification", 2)
    model, _ = load(folder, quant=target.quant, device="cpu", task=target.task, num_labels=2)
    load_adapter(model, result.adapter)


def make_trainer(folder: Path, method: str, **changes: Any) -> Trainer:
    model = tiny_models.build("llama")
    adapter = attach(model, CONFIGS[method], seed=3)
    return Trainer(
        model,
        adapter,
        arguments(folder, **changes),
        train_dataset=rows(20),
        data_collator=PadCollator(0),
    )


@pytest.mark.parametrize("method", CONFIGS)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, method: str
) -> None:
    whole = make_trainer(tmp_path / "whole", method)
    whole.train()
    second = make_trainer(tmp_path / "parts", method)
    third = str(tmp_path / "whole" / "checkpoint-3")
    second.train(resume_from_checkpoint=third)
    wanted, found = state(whole), state(second)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    start = make_trainer(tmp_path / "start", method)
    assert any(not torch.equal(state(start)[name], wanted[name]) for name in wanted)
