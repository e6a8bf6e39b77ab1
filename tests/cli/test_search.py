"""`qlora-kit search`, whole: a super-net trained, searched, and the adapter merged."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.formats.peft import read_adapter
from qlora_kit.adapters.glora.config import GLoRA
from qlora_kit.adapters.glora.layer import GLoRALinear
from qlora_kit.adapters.inject import load_adapter
from qlora_kit.cli.main import main
from qlora_kit.cli.search_work import split_rows
from qlora_kit.load.model import load
from qlora_kit.quant.config import QuantConfig
from qlora_kit.train.config import TrainConfig
from qlora_kit.train.run import run_training
from tests import tiny_models
from tests.train.data.tokenizers_in_memory import chatml
from tests.train.test_run import make_config, quiet, write

LIMIT = 3000
SMALL = ["--generations", "3", "--population", "6", "--top", "2", "--controls", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("base"))
    tiny_models.tokenizer(folder)
    return folder


def train(base: Path, folder: Path, **changes) -> Path:
    settings = {"method": "glora", "glora": GLoRA(rank=2, super_net=True)}
    fast = TrainConfig(batch_size=4, learning_rate=3e-2, max_steps=8, loggers=())
    config = make_config(base, folder, **{**settings, "train": fast, **changes})
    return run_training(config, console=quiet()).output


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "found"
    assert main(["search", str(run), str(out), "--params", "3K", *SMALL]) == 0
    return out


def record_of(out: Path) -> dict:
    record: dict = json.loads((out / "search.json").read_text())
    assert record.pop("seconds") > 0
    return record


def with_adapter(base: Path, folder: Path) -> tuple:
    model, _ = load(base, quant=QuantConfig(), device="cpu")
    adapter = load_adapter(model, folder / "adapter")
    return model.eval(), adapter


def test_what_is_written(found: Path, base: Path) -> None:
    """The limit holds for every candidate; the adapter is the best of them."""
    record = record_of(found)
    assert len(record["candidates"]) == 18
    assert [one["generation"] for one in record["candidates"]] == [0] * 6 + [1] * 6 + [2] * 6
    sizes = [one["parameters"] for one in record["candidates"]]
    assert max(sizes) <= LIMIT == record["limit"] < record["super_net"]["parameters"]
    best = record["best"][0]
    losses = [one["loss"] for one in record["candidates"]]
    assert best["loss"]["searched"] == pytest.approx(min(losses), rel=1e-6)
    assert record["best_by_generation"][-1] == min(losses)
    assert record["rows"] == {"set": "eval", "searched": 3, "others": 4}
    assert len(record["random"]) == 2
    for one in record["random"]:
        assert 0.8 * best["parameters"] < one["parameters"] <= best["parameters"]
        assert one["structures"] != best["structures"]
    _, adapter = with_adapter(base, found)
    assert adapter.num_trainable == best["parameters"]
    assert adapter.config.super_net is False
    assert adapter.config.structures == best["structures"]


def test_the_adapter_has_the_super_nets_values(found: Path, run: Path, base: Path) -> None:
    """Same answers as the super-net with these structures; with its largest it has others."""
    ids = tiny_models.tokens()
    small, _ = with_adapter(base, found)
    whole, adapter = with_adapter(base, run)
    chosen = record_of(found)["best"][0]["structures"]
    with torch.no_grad():
        wanted = small(ids).logits
        assert not torch.equal(whole(ids).logits, wanted)
        for piece in adapter.pieces:
            assert isinstance(piece, GLoRALinear)
            piece.choice = type(piece.choice).parse(chosen[piece.place])
        assert torch.equal(whole(ids).logits, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_merges(found: Path, base: Path, tmp_path: Path, dtype: str) -> None:
    """Every merged tensor is what the adapter says, rounded once; the base's is not."""
    out = tmp_path / "merged"
    assert main(["merge", str(found), str(out), "--dtype", dtype]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    model, adapter = with_adapter(base, found)
    eps = torch.finfo(getattr(torch, dtype)).eps
    changed = 0
    for piece in adapter.pieces:
        old = piece.base.dequantize().float()
        wanted = old + piece.merge_delta()
        weight = merged.get_submodule(piece.place).weight.float()
        # half a step of the result, and float32's own sums of W, W⊙A and B
        room = eps / 2 * wanted.abs() + 4 * torch.finfo(torch.float32).eps * (old.abs() + 1)
        assert bool(((weight - wanted).abs() <= room).all()), piece.place
        changed += not bool(((weight - old).abs() <= room).all())
        shift = piece.merged_bias()
        bias = merged.get_submodule(piece.place).bias
        if shift is not None:
            room = eps / 2 * shift.abs() + 1e-6
            assert bool(((bias.float() - shift).abs() <= room).all()), piece.place
    assert changed > len(adapter.pieces) // 2
    if dtype == "float32":
        ids = tiny_models.tokens()
        with torch.no_grad():
            wanted = model(ids).logits
            torch.testing.assert_close(merged(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_answer(run: Path, found: Path, tmp_path: Path) -> None:
    words = ["search", str(run), str(tmp_path / "again"), "--params", "3_000", *SMALL]
    assert main(words) == 0
    assert record_of(tmp_path / "again") == record_of(found)
    tensors = [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (found, tmp_path / "again")
    ]
    assert tensors[0] == tensors[1]
    assert main([*words, "--overwrite", "--seed", "1"]) == 0
    assert record_of(tmp_path / "again")["candidates"] != record_of(found)["candidates"]


def test_rows_trained_on_are_not_looked_at(base: Path, tmp_path: Path) -> None:
    """Other training rows in the file change nothing; other held-out rows do."""
    run = train(base, tmp_path)
    words = ["search", str(run), "--params", "3K", "--overwrite", *SMALL, "--generations", "1"]
    write(tmp_path / "train.jsonl", 24, 2)
    records = []
    for offset in (1, 1, 2):
        write(tmp_path / "eval.jsonl", 7, offset)
        out = tmp_path / "found"
        assert main([*words[:2], str(out), *words[2:]]) == 0
        records.append(record_of(out)["candidates"])
        write(tmp_path / "train.jsonl", 24, 3 + len(records))
    assert records[0] == records[1] != records[2]


def test_eval_chat_and_training_again(
    found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is like a run's: measured on its rows, answering, trained from zero."""
    file = tmp_path / "eval.json"
    assert main(["eval", str(found), "--samples", "0", "--json", str(file)]) == 0
    record = record_of(found)
    rows, best = record["rows"], record["best"][0]["loss"]
    result = json.loads(file.read_text())["results"]["adapter"]
    assert result["rows"] == rows["searched"] + rows["others"]
    low, high = sorted(best.values())
    assert low <= result["loss"] <= high  # the mean over both parts
    assert main(["eval", str(found / "adapter"), "--samples", "0"]) == 0
    out = tmp_path / "trained"
    words = ["train", str(found / "config.json"), "--output", str(out), "--train.max_steps", "1"]
    assert main(words) == 0
    again = json.loads((out / "run.json").read_text())
    assert again["model"]["trainable"] == record["best"][0]["parameters"]
    capsys.readouterr()
    content = json.loads((found / "config.json").read_text())
    assert content["output"] == f"{found}-trained"  # a run would clear the folder it is in


def test_what_is_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    assert main(["search", str(run), str(out), "--params", "3K", *SMALL, "--rows", "2"]) == 0
    captured = capsys.readouterr()
    for text in ("base", "super-net, largest", "found", "random, mean of 2", "2 searched"):
        assert text in captured.out
    assert captured.out.rstrip().endswith("search.json")
    assert "forms found, in 14 linears" in captured.out
    assert "generation 3: 18 candidates" in captured.err
    assert record_of(out)["rows"] == {"set": "eval", "searched": 2, "others": 5}


def test_what_is_refused(
    run: Path, base: Path, found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message each, exit code 2, nothing written."""
    out = str(tmp_path / "x")
    lora = train(base, _made(tmp_path / "lora"), method="lora")
    plain = train(base, _made(tmp_path / "plain"), glora=GLoRA(rank=2))
    cases = [
        ([str(lora), out], "method: lora"),
        ([str(plain), out], "one structure for every linear"),
        ([str(found), out], "one structure for every linear"),
        ([str(base), out], "not the folder of a finished run"),
        ([str(run), out, "--params", "13"], "--params 13 is too small"),
        ([str(run), out, "--params", "many"], "200K or 2M"),
        ([str(run), out, "--rows", "7"], "between 1 and 6"),
        ([str(run), out, "--controls", "0"], "--controls must be at least 1"),
        ([str(run), out, "--population", "0"], "population"),
        ([str(run), out, "--set", "other"], "held-out sets are eval"),
        ([str(run), str(found)], "--overwrite"),
        ([str(run), str(run), "--overwrite"], "the super-net itself"),
        ([str(run / "adapter"), str(run), "--overwrite"], "the super-net itself"),
    ]
    for words, text in cases:
        limit = [] if "--params" in words else ["--params", "3K"]
        assert main(["search", *words, *limit]) == 2, words
        assert text in capsys.readouterr().err
    assert main(["search", str(run), out]) == 2
    assert "--params" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["merge", str(run), out]) == 2
    assert "`qlora-kit search`" in capsys.readouterr().err


def test_a_run_that_held_out_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((run / "config.json").read_text())
    content["data"]["eval"] = None
    other = _made(tmp_path / "other")
    (other / "config.json").write_text(json.dumps(content))
    (other / "adapter").symlink_to(run / "adapter")
    assert main(["search", str(other), str(tmp_path / "x"), "--params", "3K"]) == 2
    assert "held out no rows" in capsys.readouterr().err


def test_a_base_that_is_best_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing found is said, and nothing is written."""
    from qlora_kit.train import glora

    def size(model, batches) -> float:
        pieces = [m for m in model.modules() if isinstance(m, GLoRALinear)]
        return float(sum(str(p.choice) != "none none none none none" for p in pieces))

    monkeypatch.setattr(glora, "_loss", size)
    words = ["--params", "14", "--population", "40", "--generations", "3"]
    assert main(["search", str(run), str(tmp_path / "x"), *words]) == 2
    assert "better than the base alone" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_rows_are_divided_once() -> None:
    searched, others = split_rows(101, None, 3)
    assert sorted(searched + others) == list(range(101))
    assert len(searched) == 50
    assert split_rows(101, None, 3) == (searched, others) != split_rows(101, None, 4)
    odd = sum(row % 2 for row in searched)
    assert 10 < odd < 40  # at random: labels often take turns


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_classifier(tmp_path: Path) -> None:
    """Its head comes along, and is not counted."""
    tokenizer = chatml()
    base = tiny_models.save("bert", tmp_path / "bert", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"{i} {'good' if i % 2 else 'bad'}", "label": "np"[i % 2]} for i in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    words = f"--model.path {base} --model.task sequence_classification --data.train {rows}"
    words += (
        f" --data.eval_fraction 0.5 --method glora --glora.super_net true --output {tmp_path}/o"
    )
    words += " --train.learning_rate 0.01 --glora.rank 2 --train.epochs 4"
    assert main(["train", *words.split(), "--train.loggers", ""]) == 0
    out = tmp_path / "found"
    assert main(["search", str(tmp_path / "o"), str(out), "--params", "3K", *SMALL]) == 0
    record = record_of(out)
    assert record["rows"] == {"set": "eval", "searched": 3, "others": 3}
    super_net, small = read_adapter(tmp_path / "o" / "adapter"), read_adapter(out / "adapter")
    assert small.module_names == super_net.module_names != ()
    heads = [n for n in small.modules if n.startswith(small.module_names)]
    assert heads
    for name in heads:
        assert torch.equal(small.modules[name], super_net.modules[name])
    values = sum(tensor.numel() for name, tensor in small.modules.items() if name not in heads)
    assert values == record["best"][0]["parameters"] <= LIMIT
    file = tmp_path / "eval.json"
    assert main(["eval", str(out), "--json", str(file)]) == 0
    found = json.loads(file.read_text())["results"]["adapter"]["loss"]
    wanted = sum(record["best"][0]["loss"].values()) / 2  # parts of 3 rows each
    assert found == pytest.approx(wanted, rel=1e-5)
