"""`qlora-kit plan` on a folder that holds a configuration and nothing else."""

import json

import pytest

from qlora_kit.cli.main import main
from qlora_kit.cli.plan import NO_FIT
from tests.plan.shapes import llama

SMALL = ("--batch", "2", "--seq", "2048", "--adapter.rank", "8", "--gpu", "l4")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with config.json alone."""
    folder = tmp_path_factory.mktemp("model")
    llama(2).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def test_a_folder_is_planned(model, capsys):
    assert main(["plan", str(model), *SMALL, "--budget", "4GiB"]) == 0
    text = capsys.readouterr().out
    assert "needed on the GPU" in text
    assert "fits, " in text
    assert "lora r 8 on 4 bits, 2 x 2,048 tokens, adamw_torch" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_does_not_fit_has_an_exit_code(model, capsys):
    words = ["plan", str(model), *SMALL, "--budget", "900MiB", "--train.activations", "save"]
    assert main(words) == NO_FIT
    assert "nearest settings that fit" in capsys.readouterr().out


def test_a_run_file_is_planned_and_flags_win(model, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{path: {model}}}\ndata: {{train: rows.jsonl, max_length: 512}}\n"
        "train: {batch_size: 2, activations: recompute_all, optimizer: adamw_8bit}\n"
        "method: lora_fa\nbudget: 3GiB\n"
    )
    words = ["plan", str(file), "--gpu", "h100", "--train.batch_size", "4", "--json"]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    setup = data["run"]["setup"]
    assert (setup["batch"], setup["seq"], setup["method"]) == (4, 512, "lora_fa")
    assert setup["activations"] == "recompute_all"
    assert data["budget_bytes"] == 3 << 30
    assert data["gpu"]["name"] == "h100"
    assert data["run"]["peak_bytes"] == sum(data["run"]["components_bytes"].values())


def test_methods_are_compared(model, capsys):
    assert main(["plan", str(model), *SMALL, "--compare-methods"]) == 0
    text = capsys.readouterr().out
    for name in ("full", "LoRA-FA", "QLoRA", "QLoRA-FA", "below full", "tokens/s"):
        assert name in text
    assert main(["plan", str(model), *SMALL, "--compare-methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["full"]["peak_bytes"] > found["QLoRA-FA"]["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs a run file or a model"),
        (["nobody/no-such-model-here"], "no hub id that can be reached"),
        (["{model}", "--gpu", "h1000"], "unknown GPU"),
        (["{model}", "--budget", "plenty"], "is not a size"),
        (["{model}", "--train.optimizer", "sgd"], "the state of 'sgd' is not known"),
        (["{model}", "--seq", "many"], "data.max_length takes whole number"),
        (["{model}", "--budgte", "4GiB"], "Did you mean --budget"),
    ],
)
def test_mistakes_are_explained(words, message, model, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", *(word.replace("{model}", str(model)) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--compare-methods" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_plan_says_nothing_of_what_it_traces(model, capsys):
    """Choices of a traced step are not those of a run."""
    main(["plan", str(model), *SMALL, "--budget", "4GiB"])
    assert "outline" not in capsys.readouterr().err
