"""`python -m benchmarks.train.quality`: losses beside float32's, and that this can fail."""

import argparse
import json
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks.train import agreement, plot_quality, quality
from benchmarks.train.quality_child import read_batches, train
from qlora_kit.bench.random_checkpoint import write_checkpoint
from qlora_kit.bench.subject import Build, Stage

STEPS = 6


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A tiny dense model in bfloat16, rows, and the batches of two orders."""
    folder = tmp_path_factory.mktemp("quality")
    write_checkpoint("tiny", folder / "tiny", storage="bf16", device="cpu", dtype=torch.bfloat16)
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


def losses_of(space, impl, *, seed=0, order=0, starts_from=None, save=None, dtype="float32"):
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
        dtype=dtype,
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
    assert agreement.mean_difference(ours["losses"], theirs["losses"]) <= agreement.TOLERANCE / 5
    assert agreement.mean_difference(other["losses"], theirs["losses"]) > agreement.TOLERANCE
    assert ours["losses"][-1] < ours["losses"][0]  # something is learned


def test_4_bit_weights_are_the_same_in_every_library_and_dtype(space):
    """bfloat16 to float32 is exact, so casting before quantizing changes no code."""
    wanted = losses_of(space, "peft", dtype="float32")["codes"]
    assert len(wanted) == len(set(wanted.values())) >= 14
    for impl, dtype in (("peft", "bfloat16"), ("qlora_kit", "bfloat16"), ("qlora_kit", "float32")):
        codes = losses_of(space, impl, dtype=dtype)["codes"]
        assert agreement.count_other_weights(codes, wanted) == 0
    name = next(iter(wanted))
    assert agreement.count_other_weights(wanted | {name: "other"}, wanted) == 1


REFERENCE = [3.0 - 0.1 * i for i in range(50)]


def made(shifts=(), failing=()):
    """Rows of seven runs, each its shift away from the reference."""
    shifts = {"qlora_kit": 0.004, "another seed": 0.2, "peft": 0.03} | dict(shifts)
    planned = quality.runs(["qlora_kit", "peft", "unsloth"], 0, "bfloat16")
    results = []
    for run in planned:
        shift = shifts.get(run.name, 0.0)
        result = {"losses": [loss + shift for loss in REFERENCE], "codes": {"q": "a", "k": "b"}}
        if run.impl == "unsloth":
            result = {"skipped": "Unsloth needs a GPU"}
        if run.name in failing:
            result = {"error": "killed"}
        results.append(result)
    return quality.rows_of(planned, results)


@pytest.mark.parametrize(
    ("shifts", "wanted"),
    [
        ({}, True),
        ({"qlora_kit": 0.006}, False),
        ({"another seed": 0.001}, False),
        ({"another start": 0.1}, True),
        ({"peft": 0.0}, True),
    ],
)
def test_verdict(shifts, wanted):
    """Ours has to agree and another seed must not; peers and chance are reported."""
    good, lines = agreement.verdict(made(shifts))
    assert good is wanted
    assert ("MISSED" in "\n".join(lines)) is not wanted
    assert any("needs a GPU" in line for line in lines)


@pytest.mark.parametrize(
    ("failing", "wanted"),
    [("qlora_kit", False), ("float32", False), ("another seed", False), ("peft", True)],
)
def test_a_failed_run_of_ours_or_of_the_reference_is_no_agreement(failing, wanted):
    assert agreement.verdict(made(failing=[failing]))[0] is wanted


def test_rows_say_how_far_off_where():
    rows = {row["name"]: row for row in made()}
    assert "mean_abs_difference" not in rows["float32"]
    assert "codes" not in rows["peft"]
    assert rows["peft"]["other_nf4"] == 0
    assert rows["peft"]["nf4_linears"] == 2
    assert rows["peft"]["agrees"] is False
    losses = [loss + (0.2 if i < 20 else 0.0) for i, loss in enumerate(REFERENCE)]
    row = agreement.add_differences({"name": "peft", "losses": losses}, REFERENCE)
    assert row["first_20_abs_difference"] == pytest.approx(0.2)
    assert row["last_20_abs_difference"] == 0
    assert row["mean_abs_difference"] == pytest.approx(0.2 * 20 / 50)
    assert row["max_abs_difference"] == pytest.approx(0.2)


def test_what_is_run():
    """Ours first; the reference in float32, which in float32 is PEFT's run."""
    planned = {run.name: run for run in quality.runs(["qlora_kit", "peft"], 5, "bfloat16")}
    assert next(iter(planned)) == "qlora_kit"
    assert planned["peft"].starts_from == planned["float32"].starts_from == "qlora_kit"
    assert planned["peft"].dtype == "bfloat16"
    assert (planned["float32"].impl, planned["float32"].dtype) == ("peft", "float32")
    assert planned["another start"].order == planned["qlora_kit"].order == 5
    assert planned["another start"].seed == planned["another seed"].seed == 6
    assert planned["another seed"].order == 6
    assert "peft" not in {run.name for run in quality.runs(["peft"], 5, "float32")}


def test_trainings_at_once_wait_for_the_start_they_take(monkeypatch, tmp_path):
    ended, arguments = [], quality.parse(["--workers", "3"])

    def slow(run, _build, _scratch, _arguments):
        if run.starts_from is not None:
            assert run.starts_from in ended
        else:
            time.sleep(0.05)
        ended.append(run.name)
        return {"name": run.name}

    monkeypatch.setattr(quality, "train", slow)
    planned = quality.runs(["peft", "unsloth"], 0, "bfloat16")
    results = quality.train_all(planned, tmp_path, tmp_path, arguments)
    assert [result["name"] for result in results] == [run.name for run in planned]


def test_a_run_without_its_start_is_an_error(tmp_path):
    arguments = quality.parse([])
    run = quality.runs(["peft"], 0, "bfloat16")[-1]
    build = quality.build_of(run, tmp_path, tmp_path, arguments)
    assert "no start" in quality.train(run, build, tmp_path, arguments)["error"]


def test_figure_is_repeatable(tmp_path):
    pytest.importorskip("matplotlib")
    shared = {"model": "tiny", "data": "rows", "tolerance": 0.005}
    rows = [shared | row for row in made()]
    record = {"gpu": None, "commit": "abc", "rows": rows}
    for name in ("one.svg", "two.svg"):
        plot_quality.draw(record, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.slow
def test_the_whole_command(space, tmp_path):
    words = ["--model", "tiny", "--data", str(space / "rows.jsonl"), "--steps", "6"]
    words += ["--batch", "4", "--length", "64", "--rank", "4", "--learning-rate", "1e-2"]
    words += ["--dtype", "float32", "--workers", "2"]
    assert quality.main([*words, "--out", str(tmp_path)]) == 0
    (file,) = (tmp_path / "train_quality").glob("*.json")
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["qlora_kit"]["agrees"] is True
    assert rows["another start"]["agrees"] is False
    assert rows["another seed"]["agrees"] is False
    assert rows["qlora_kit"]["other_nf4"] == 0
    assert rows["float32"]["predicted_tokens"] > 0
