"""preview, --dry-run, eval, chat, merge and doctor on a tiny model with a real tokenizer."""

import io
import json
import sys

import pytest
import torch

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.cli import selftest
from qlora_kit.cli.main import main
from qlora_kit.load import model as load_model
from qlora_kit.ops.backend import known_ops
from tests import tiny_models
from tests.train.data.tokenizers_in_memory import chatml


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama with a chat tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chatml()
    tiny_models.save("llama", folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A run's folder with an adapter whose effect is visible."""
    run = tmp_path_factory.mktemp("run")
    model, _ = load_model.load(base, device="cpu")
    attached = attach(model, LoRA(rank=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in attached.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    attached.save(run / "adapter", base_model=str(base))
    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twelve questions with one of two answers."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    pairs = [{"prompt": f"{i} even?", "completion": ["yes", "no"][i % 2]} for i in range(12)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


@pytest.fixture
def run_file(base, rows, tmp_path):
    """A run of the tiny model on the rows."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {base}}}\n"
        f"data: {{train: {rows}, eval_fraction: 0.25, max_length: 128}}\n"
        f"train: {{batch_size: 2, epochs: 2}}\n"
        f"adapter: {{rank: 2}}\noutput: {tmp_path}/out\n"
    )
    return file


def test_preview(run_file, capsys):
    assert main(["preview", str(run_file), "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "Row 1 of 9" in text
    assert "LOSS " in text
    assert main(["preview", str(run_file), "--rows", "x"]) == 2
    assert main(["preview", str(run_file), "--set", "nope"]) == 2


def test_dry_run_counts_what_a_run_has(run_file, base, tmp_path, capsys):
    """The sizes printed are those of the loaded and adapted model."""
    assert main(["train", str(run_file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    model, _ = load_model.load(base)
    stored = sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    trained = attach(model, LoRA(rank=2)).num_trainable
    assert f"{stored / 1024:.2f} KiB in 14 modules" in text
    assert f"lora, {trained:,} trained parameters" in text
    assert "# data: eval" in text
    assert "updates                 10" in text  # 9 rows in batches of 2, twice
    assert not (tmp_path / "out").exists()


def test_dry_run_finds_mistakes(run_file, capsys):
    assert main(["train", str(run_file), "--dry-run", "--adapter.targets", "nope"]) == 2
    assert "nope" in capsys.readouterr().err
    assert main(["train", str(run_file), "--dry-run", "--data.train", "none.jsonl"]) == 2
    assert main(["train", str(run_file), "--dry-run", "--train.schedule", "zigzag"]) == 2


def test_print_config(run_file, capsys):
    assert main(["train", str(run_file), "--print-config", "--train.seed=7"]) == 0
    assert "  seed: 7\n" in capsys.readouterr().out


def test_eval_adapter_and_base(adapter, rows, tmp_path, capsys):
    file = tmp_path / "results.json"
    words = ["eval", str(adapter), str(rows), "--base", "--json", str(file)]
    assert main([*words, "--samples", "1", "--max-new-tokens", "4"]) == 0
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"base", "adapter"}
    assert results["base"]["task"] == "choice"
    assert results["base"]["rows"] == 12
    assert results["base"]["loss"] != results["adapter"]["loss"]
    assert "accuracy" in capsys.readouterr().out


def test_eval_follows_the_run(adapter, rows, tmp_path, capsys):
    """A system prompt or a length limit of the run also holds when it is measured."""
    config = {
        "model": {"path": "elsewhere"},
        "data": {"train": "t.jsonl", "system_prompt": "Answer briefly."},
        "eval": {"task": "perplexity"},
    }
    losses = []
    for content in (None, config):
        if content:
            (adapter / "config.json").write_text(json.dumps(content))
        file = tmp_path / "results.json"
        words = ["eval", str(adapter), "--data", str(rows), "--samples", "0", "--json", str(file)]
        assert main([*words, "--task", "perplexity"]) == 0
        losses.append(json.loads(file.read_text())["results"]["adapter"]["loss"])
    (adapter / "config.json").unlink()
    assert losses[0] != losses[1]


def test_eval_model(base, rows, capsys):
    words = ["eval", str(base), "--data", str(rows), "--task", "perplexity", "--samples", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("model: loss")
    assert main([*words, "--base"]) == 2
    assert main([*words, "--base-model", "x"]) == 2


def test_bits_choose_how_the_base_is_stored(base, adapter, rows, tmp_path, capsys):
    losses = {}
    for bits in ("4", "16"):
        file = tmp_path / f"{bits}.json"
        words = ["eval", str(base), "--data", str(rows), "--task", "perplexity", "--samples", "0"]
        assert main([*words, "--bits", bits, "--json", str(file)]) == 0
        losses[bits] = json.loads(file.read_text())["results"]["model"]["loss"]
    assert losses["4"] != losses["16"]


def test_eval_repeats_what_the_run_measured(run_file, tmp_path, capsys):
    """Trained, saved, loaded again: the same held-out rows give the same figures."""
    out = tmp_path / "out"
    flags = ["--train.learning_rate", "0.01", "--train.loggers", "", "--eval.samples", "1"]
    assert main(["train", str(run_file), *flags, "--eval.max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("report.html")
    (trained,) = json.loads((out / "run.json").read_text())["after"]
    (before,) = json.loads((out / "run.json").read_text())["before"]
    file = tmp_path / "again.json"
    assert main(["eval", str(out), "--base", "--json", str(file)]) == 0
    results = json.loads(file.read_text())["results"]
    assert results["adapter"]["rows"] == trained["rows"] == 3
    assert results["adapter"]["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    assert results["base"]["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert trained["loss"] < before["loss"]


def test_eval_of_a_classifier(tmp_path, capsys):
    """Class names and the trained head come back with the adapter."""
    tokenizer = chatml()
    base = tiny_models.save("bert", tmp_path / "bert", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"{i} {'good' if i % 2 else 'bad'}", "label": "np"[i % 2]} for i in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    words = ["--model.path", str(base), "--model.task", "sequence_classification"]
    words += ["--data.train", str(rows), "--data.eval", str(rows), "--train.epochs", "4"]
    words += [
        "--train.learning_rate",
        "0.01",
        "--train.loggers",
        "",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["train", *words]) == 0
    (trained,) = json.loads((tmp_path / "o" / "run.json").read_text())["after"]
    file = tmp_path / "again.json"
    assert main(["eval", str(tmp_path / "o"), str(rows), "--json", str(file)]) == 0
    again = json.loads(file.read_text())["results"]["adapter"]
    assert again["scores"] == trained["scores"]
    assert again["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    assert main(["chat", str(tmp_path / "o"), "--prompt", "x"]) == 2
    assert "classifier" in capsys.readouterr().err


def test_eval_needs_data(base, capsys):
    assert main(["eval", str(base)]) == 2
    assert "name the data" in capsys.readouterr().err


def test_chat_once(adapter, capsys):
    words = ["chat", str(adapter), "--prompt", "Hello", "--max-new-tokens", "3", "--base"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("base: ")
    assert any(line.startswith("adapter: ") for line in lines)


def test_conversation(adapter, capsys, monkeypatch):
    """History, commands, and an end of input that is not an error."""
    asked = []
    from qlora_kit.cli import chat
    from qlora_kit.train import generate

    def answer(model, tokenizer, prompt, *, base, **options):
        asked.append((tokenizer.decode(prompt), base))
        yield from ("an ", "answer")

    monkeypatch.setattr(generate, "generate_stream", answer)
    text = "one\ntwo\n/base\nthree\n/reset\nfour\n/what\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert chat.run([str(adapter), "--system", "Be kind"]) == 0
    prompts = [prompt for prompt, _ in asked]
    assert [base for _, base in asked] == [False, False, True, False, True, False]
    assert "one" in prompts[1]
    assert "an answer" in prompts[1]
    assert prompts[2] == prompts[3]  # the base starts from the history so far
    assert "three" not in prompts[4]
    assert all("Be kind" in prompt for prompt in prompts)
    captured = capsys.readouterr()
    assert captured.out.count("an answer\n") == 6
    assert "/what: known are" in captured.err


def test_chat_without_adapter_has_no_base(base, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/base\n/quit\n"))
    assert main(["chat", str(base)]) == 0
    assert "no adapter" in capsys.readouterr().err
    assert main(["chat", str(base), "--base", "--prompt", "x"]) == 2


def test_several_adapters_in_a_conversation(adapter, base, capsys, monkeypatch):
    """Switched, combined, and what is refused; the target's own adapter answers first."""
    words = ["--adapter", f"second={adapter}", "--max-new-tokens", "2"]
    lines = ["/adapter", "one", "/adapter second", "/base", "two", "/base"]
    lines += ["/adapter second=0.5 adapter=0.5", "/adapter none", "/adapter third", "/adapter a=b"]
    name = adapter.resolve().parent.name if adapter.name == "adapter" else adapter.name
    text = "\n".join(lines).replace("adapter=0.5", f"{name}=0.5")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["chat", str(adapter), *words]) == 0
    captured = capsys.readouterr()
    assert f"{name} answers; there are also: second, none\n" in captured.out
    assert f"second answers; there are also: {name}, none\n" in captured.out
    assert "\nsecond: " in captured.out
    assert f"second=0.5 {name}=0.5 answers; there are also: {name}, second, none" in captured.out
    assert "the base answers; there are also" in captured.out
    assert "no adapter 'third'" in captured.err
    assert "NAME=WEIGHT ..., got 'a=b'" in captured.err

    monkeypatch.setattr(sys, "stdin", io.StringIO("/adapter\n"))
    assert main(["chat", str(base), "--adapter", f"first={adapter}", *words]) == 0
    assert "first answers; there are also: second, none" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("/adapter\n"))
    assert main(["chat", str(adapter)]) == 0
    assert "load more with --adapter" in capsys.readouterr().err
    for wrong in ("second", "=x", "none=x", f"second={base}", f"{name}={adapter}"):
        assert main(["chat", str(adapter), "--adapter", wrong]) == 2
        assert "--adapter" in capsys.readouterr().err


def test_merge_with_report(adapter, rows, tmp_path, capsys):
    out = tmp_path / "merged"
    words = ["merge", str(adapter), str(out), "--dtype", "float32", "--report", str(rows)]
    assert main(words) == 0
    report = json.loads((out / "merge_report.json").read_text())
    deviation = report["deviation"]
    assert set(deviation) == {"quantized", "original"}
    assert deviation["quantized"]["kl"] < 1e-5  # float32, the base it was trained on
    assert deviation["original"]["kl"] > 10 * deviation["quantized"]["kl"]
    text = capsys.readouterr().out
    assert "<- written" in text
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]  # the other merge is gone
    assert main(words) == 2  # exists
    assert main([*words, "--overwrite", "--into", "original"]) == 0


def test_merge_kinds(adapter, base, rows, tmp_path, capsys):
    assert main(["merge", str(adapter), str(tmp_path / "nf4"), "--nf4"]) == 0
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert main(["merge", str(adapter), str(tmp_path / "alone"), "--adapter-only"]) == 0
    assert (tmp_path / "alone" / "adapter_model.safetensors").is_file()
    assert main(["merge", str(base), str(tmp_path / "x")]) == 2
    assert "no adapter" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(tmp_path / "x"), "--nf4", "--report", str(rows)]) == 2


def test_adapter_without_base(adapter, base, tmp_path, capsys):
    """An adapter that names no base, as one from elsewhere may, needs --base-model."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (adapter / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "qlora_kit.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    assert main(["chat", str(folder), "--prompt", "x"]) == 2
    assert "--base-model" in capsys.readouterr().err
    words = ["--base-model", str(base), "--max-new-tokens", "2"]
    assert main(["chat", str(folder), "--prompt", "x", *words]) == 0


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "nf4 codec" in text
    assert "nf4_linear" in text
    assert "FAIL" not in text


def test_every_op_has_a_self_test():
    assert sorted(selftest.OP_TESTS) == known_ops()


def test_doctor_fails_on_a_wrong_codec(capsys, monkeypatch):
    """The self-test can fail: nibbles swapped in decoding are found."""

    def swapped(packed, *arguments, **options):
        return dequantize(packed >> 4 | packed << 4, *arguments, **options)

    dequantize = selftest.dequantize_nf4
    monkeypatch.setattr(selftest, "dequantize_nf4", swapped)
    assert main(["doctor"]) == 2
    assert "FAIL  nf4 codec" in capsys.readouterr().out


def test_doctor_fails_on_a_wrong_op(capsys, monkeypatch):
    nf4_linear = selftest.nf4_linear

    def wrong(x, weight, *, scale, **options):
        return nf4_linear(x, weight, scale=1.01 * scale, **options)

    monkeypatch.setattr(selftest, "nf4_linear", wrong)
    assert main(["doctor"]) == 2
    assert "FAIL    reference        forward, 1 rows" in capsys.readouterr().out


def test_doctor_names_a_forced_backend_that_is_missing(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA backend here")
    monkeypatch.setenv("QLORA_KIT_BACKEND", "cuda")
    assert main(["doctor"]) == 2
    assert "unset QLORA_KIT_BACKEND" in capsys.readouterr().out
