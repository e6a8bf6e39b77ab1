"""`python -m benchmarks.train.quality`: the comparison of losses, and that it can fail."""

import argparse
import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.train import plot_quality, quality
from benchmarks.train.quality_child import read_batches, train
from qlora_kit.bench.random_checkpoint import write_checkpoint
from qlora_kit.bench.subject import Build, Stage

STEPS = 6


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny dense model, rows, and the batches of two orders."""
    folder = tmp_path_factory.mktemp("quality")
    write_checkpoint("tiny", folder / "tiny", storage="bf16", device="cpu", dtype=torch.float32)
    rows = [{"prompt": f"{i} and {i}?", "completion": f"{2 * i}" * (1 + i % 3)} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = argparse.Namespace(steps=STEPS, batch=4, length=64)
    for seed in (0, 1):
        file = folder / f"batches-{seed}.safetensors"
        tokens = quality.write_batches(
            folder / "rows.jsonl", folder / "tiny", file, seed=seed, arguments=arguments
        )
        assert tokens > STEPS * 4
    return folder


def losses_of(space, impl, *, seed=0, order=0, starts_from=None, save=None):
    build = Build(
        impl=impl,
        model="tiny",
        checkpoint=str(space / "tiny"),
        rank=4,
        checkpointing=False,
        optimizer="adamw_torch",
        learning_rate=1e-2,
        adapter=None if starts_from is None else str(space / starts_from),
        masters="float32",
        seed=seed,
        device="cpu",
        dtype="float32",
    )
    work = {
        "build": asdict(build),
        "policy": "recompute_elementwise",
        "batches": str(space / f"batches-{order}.safetensors"),
        "save_start": None if save is None else str(space / save),
    }
    return train(work, Stage())


def test_batches_are_padded_real_rows(space):
    batches = read_batches(str(space / "batches-0.safetensors"), "cpu")
    assert len(batches) == STEPS
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape[0] == 4
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    other = read_batches(str(space / "batches-1.safetensors"), "cpu")
    assert any(
        a["input_ids"].shape != b["input_ids"].shape or (a["input_ids"] != b["input_ids"]).any()
        for a, b in zip(batches, other, strict=True)
    )


def test_ours_is_pefts_loss_and_another_start_is_not(space):
    ours = losses_of(space, "qlora_kit", save="start")
    assert ours["step"] == "fused"
    theirs = losses_of(space, "peft", starts_from="start")
    other = losses_of(space, "qlora_kit", seed=1)
    assert len(ours["losses"]) == STEPS
    assert quality.mean_difference(ours["losses"], theirs["losses"]) <= quality.TOLERANCE / 5
    assert quality.mean_difference(other["losses"], theirs["losses"]) > quality.TOLERANCE
    assert ours["losses"][-1] < ours["losses"][0]  # something is learned


def made(shift_ours=0.0, shift_other=0.1):
    reference = [3.0 - 0.1 * i for i in range(10)]
    shifts = {"qlora_kit": shift_ours, "peft": 0.0, "another start": shift_other}
    rows = []
    for run in quality.runs(["qlora_kit", "peft", "unsloth"], 0):
        result = {"skipped": "Unsloth needs a GPU"}
        if run.impl != "unsloth":
            shift = shifts.get(run.name, 0.2)
            result = {"losses": [loss + shift for loss in reference], "step": "fused"}
        rows.append(quality.row_of(run, result, reference))
    return rows


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, True), ({"shift_ours": 0.006}, False), ({"shift_other": 0.001}, False)],
)
def test_verdict(changes, wanted):
    """Ours has to agree, and the other seeds must not: a blind comparison fails as well."""
    good, lines = quality.verdict(made(**changes))
    assert good is wanted
    assert ("MISSED" in "\n".join(lines)) is not wanted
    assert any("needs a GPU" in line for line in lines)


def test_a_failed_run_is_no_agreement():
    rows = made()
    failed = rows[1]
    del failed["losses"]
    failed["error"] = "killed"
    assert quality.verdict(rows)[0] is False


def test_other_seeds_are_ours():
    planned = {run.name: run for run in quality.runs(["qlora_kit", "peft"], 5)}
    assert planned["peft"].starts_from == "qlora_kit"
    assert planned["another start"].order == planned["qlora_kit"].order == 5
    assert planned["another start"].seed == planned["another seed"].seed == 6
    assert planned["another seed"].order == 6


def test_figure_is_repeatable(tmp_path):
    pytest.importorskip("matplotlib")
    shared = {"model": "tiny", "data": "rows", "dtype": "float32", "tolerance": 0.005}
    rows = [shared | row for row in made()]
    record = {"gpu": None, "commit": "abc", "rows": rows}
    for name in ("one.svg", "two.svg"):
        plot_quality.draw(record, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.slow
def test_the_whole_command(space, tmp_path):
    words = ["--model", "tiny", "--data", str(space / "rows.jsonl"), "--steps", "6"]
    words += ["--batch", "4", "--length", "64", "--rank", "4", "--learning-rate", "1e-2"]
    assert quality.main([*words, "--out", str(tmp_path)]) == 0
    (file,) = (tmp_path / "train_quality").glob("*.json")
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["qlora_kit"]["agrees"] is True
    assert rows["another start"]["agrees"] is False
    assert rows["peft"]["predicted_tokens"] > 0
