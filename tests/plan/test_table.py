"""The plan as people and programs read it: it adds up, it fits 80 columns, it names what to do."""

import json
import re
from dataclasses import replace

import pytest

import qlora_kit as qk
from qlora_kit.core.errors import ConfigError, SourceError
from qlora_kit.core.units import parse_bytes
from qlora_kit.plan.budget import Budget, needed_bytes
from qlora_kit.plan.changes import PAGED, changes, leaner
from qlora_kit.plan.gpus import find_gpu
from qlora_kit.plan.nearest import nearest
from qlora_kit.plan.plan import compare_methods, make_plan
from qlora_kit.plan.read import read_config
from qlora_kit.plan.search import Planner
from qlora_kit.plan.setup import Setup
from qlora_kit.plan.table import (
    NAMES,
    WIDTH,
    fields_text,
    memory_table,
    methods_table,
    nearest_table,
    render,
    run_text,
)
from tests import tiny_models
from tests.plan.shapes import llama, planner

LONG = Setup(rank=8, batch=2, seq=8192)


@pytest.fixture(scope="module")
def small():
    """A plan of a run that does not fit."""
    made = planner("2GiB")
    return make_plan(made, replace(LONG, activations="save", accumulation=2), "tiny", optimizers=())


def rows(text: str) -> dict[str, int]:
    """Label to bytes, of the lines that end in a size."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"(.+?)\s{2,}([\d.]+ (?:[KMG]iB|B))", line)
        if match:
            found[match[1].strip()] = parse_bytes(match[2])
    return found


def test_the_table_adds_up():
    """To what is compared with the budget, as far as two decimals say."""
    made = planner("40GiB").predict(Setup(rank=8, seq=1024, varied=True))
    sizes = rows(memory_table(made))
    total, peak = sizes.pop("needed on the GPU"), sizes.pop("peak allocated")
    slack = len(sizes) * 0.005 * 2**30
    words = {"working set, recomputation included", "loss chunk", "libraries: cuBLAS, cuDNN"}
    assert set(sizes) > words | {"weights", "scales", "embeddings", "adapters", "optimizer"}
    assert sum(sizes.values()) == pytest.approx(total, abs=slack)
    assert total == pytest.approx(needed_bytes(made), abs=slack)
    assert peak == pytest.approx(made.peak_bytes, abs=slack)
    assert {"fragmentation", "CUDA context", "margin", "CUDA graphs' own memory"} <= set(sizes)
    assert set(made.components) <= set(NAMES)
    sizes.pop("saved activations")
    assert abs(sum(sizes.values()) - total) > slack / 10


def test_host_memory_is_shown():
    made = planner("40GiB").predict(replace(LONG, activations="offload"))
    assert "host memory: checkpoints" in memory_table(made)


def test_a_plan_that_does_not_fit_says_what_does(small):
    """Every setting it names was predicted to fit, and is written as flags."""
    assert not small.fits
    assert len(small.nearest) >= 2
    assert all(small.budget.fits(one) for one in small.nearest)
    text = str(small)
    assert "too much by" in text
    assert "nearest settings that fit 2.00 GiB" in text
    assert "--train.activations" in text
    rows_each = {one.setup.batch * one.setup.accumulation for one in small.nearest}
    assert rows_each == {4}


def test_everything_fits_80_columns(small):
    for text in (
        render(small),
        methods_table(compare_methods(planner("4GiB"), LONG), "m", small.budget),
    ):
        assert max(len(line) for line in text.splitlines()) <= WIDTH


def test_a_long_name_does_not_break_the_table(small):
    text = render(replace(small, model="/" + "folder/" * 30))
    assert max(len(line) for line in text.splitlines()) <= WIDTH


def test_json_holds_what_the_table_holds(small):
    data = json.loads(json.dumps(small.to_dict()))
    assert data["fits"] is False
    run = data["run"]
    assert sum(run["components_bytes"].values()) == run["peak_bytes"]
    parts = ("reserved_bytes", "graphs_bytes", "cuda_context_bytes", "margin_bytes")
    assert run["needed_bytes"] == sum(run[part] for part in parts)
    assert data["budget_bytes"] < run["needed_bytes"]
    assert data["fastest_changes"]["train.activations"] == data["fastest"]["setup"]["activations"]
    assert data["sizes"][0]["policy"] == "save"
    assert len(data["nearest"]) == len(small.nearest)


def test_nothing_near_is_said():
    made = planner("560MiB", layers=8)
    assert nearest(made, LONG) == ()
    assert "nothing near fits" in nearest_table(made.predict(LONG), (), made.budget)


def test_a_shorter_row_is_the_last_resort():
    """No policy, no batch, no optimizer is enough: rows have to be shorter."""
    setup = replace(LONG, batch=1, seq=1 << 17)
    found = nearest(planner("1200MiB"), setup)
    assert found
    assert all(one.setup.seq < setup.seq for one in found)


def test_changes_are_those_of_the_run_file():
    after = Setup(batch=2, accumulation=2, keep_decoded=3, optimizer="adamw_torch")
    found = changes(Setup(batch=4), after)
    assert found == {
        "train.keep_decoded": "3",
        "train.batch_size": "2",
        "train.gradient_accumulation": "2",
        "train.optimizer": "adamw_torch",
    }
    assert max(map(len, fields_text(found | {"train.activations": "x" * 50}))) <= WIDTH


def test_a_run_in_a_line():
    assert "full on 16 bits" in run_text(Setup(method="full", bits=16))
    assert run_text(Setup(keep_decoded=4, accumulation=2)).endswith("4 layers decoded")


def test_methods_are_ordered_by_what_they_save():
    """Full fine-tuning takes the most, QLoRA with LoRA-FA the least."""
    found = compare_methods(planner("40GiB"), LONG)
    peaks = [one.peak_bytes for one in found.values()]
    assert list(found) == ["full", "LoRA", "LoRA-FA", "QLoRA", "QLoRA-FA"]
    assert peaks[0] == max(peaks)
    assert peaks[-1] == min(peaks)
    with_shape = compare_methods(planner("40GiB"), replace(LONG, shape=qk.LoRAFA(rank=8)))
    assert with_shape["QLoRA"].trained == found["QLoRA"].trained


def test_public_plan_takes_models_configurations_and_folders(tmp_path):
    """Four doors, one answer."""
    settings = {"adapter": qk.LoRA(rank=4), "seq": 128, "gpu": "l4", "budget": "2GiB"}
    model = tiny_models.build("llama")
    model.config.save_pretrained(tmp_path)
    peaks = {
        qk.plan(door, **settings).run.peak_bytes
        for door in (model, model.config, tmp_path, str(tmp_path))
    }
    assert len(peaks) == 1
    fa = qk.plan(model.config, **settings | {"adapter": qk.LoRAFA(rank=4)})
    assert fa.run.setup.method == "lora_fa"
    assert qk.plan(model.config, seq=64).gpu.name == "l40s"  # no GPU here


def test_auto_activations_are_the_fastest_that_fit():
    made = planner("3GiB")
    plan = make_plan(made, replace(LONG, activations="auto"), "tiny")
    assert plan.fits
    assert plan.fastest is not None
    assert plan.run.step_s == made.fastest(LONG).step_s
    tight = planner("560MiB", layers=8)
    least = make_plan(tight, replace(LONG, activations="auto"), "tiny")
    assert not least.fits
    assert least.run.setup == tight.thriftiest(LONG)


def test_quantized_checkpoints_are_planned_by_the_run(tmp_path):
    config = llama(2)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    assert not hasattr(read_config(tmp_path), "quantization_config")


def test_missing_configurations_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"config\.json.*nothing else"):
        read_config(tmp_path)
    with pytest.raises(SourceError, match="no hub id that can be reached"):
        read_config("nobody/no-such-model-here")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="has no configuration"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="BertConfig cannot be"):
        qk.plan(tiny_models.FAMILIES["bert"](), seq=64)


def test_a_run_that_nothing_fits_is_shown_what_makes_it_smaller():
    config = llama(layers=4)
    config.vocab_size, config.tie_word_embeddings = 65536, False
    setup = Setup(rank=64, seq=512, optimizer="adamw_torch")
    lean = leaner(setup, config)
    whole = Planner(config, find_gpu("l4"), Budget.of("64GiB"))
    small = whole.predict(whole.thriftiest(lean))
    usual = whole.predict(replace(whole.thriftiest(setup), optimizer=PAGED))
    assert needed_bytes(small) < needed_bytes(usual)
    between = (needed_bytes(small) + needed_bytes(usual)) // 2
    tight = Planner(config, find_gpu("l4"), Budget.of(between))
    found = nearest(tight, setup)
    assert found
    assert all(tight.budget.fits(one) for one in found)
    told = changes(setup, found[0].setup)
    assert (told["model.quantize_head"], told["model.embeddings_on_host"]) == ("true", "true")
    config.tie_word_embeddings = True
    assert not leaner(setup, config).embeddings_on_host
