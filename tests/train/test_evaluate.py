"""Held-out measurements: right by hand, and the same whatever the batch size."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qlora_kit.adapters.inject import attach
from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.block.install import FusedBlocks, FusedLayer, fuse_blocks
from qlora_kit.core.errors import ConfigError, DataError
from qlora_kit.train.callbacks import Phases
from qlora_kit.train.config import DataConfig, EvalConfig
from qlora_kit.train.data.dataset import build_dataset
from qlora_kit.train.data.tokenized import TokenizedSet
from qlora_kit.train.evaluate import Evaluator, SetResult, choose_task
from qlora_kit.train.generate import generate_answers, generate_stream
from qlora_kit.train.held_out import example_rows, loss_totals
from tests import tiny_models
from tests.train.helpers import adapted

WORDS = ["good", "bad", "fine", "dull", "long", "short", "warm", "cold", "odd"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_models.tokenizer()


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def questions(folder: Path, tokenizer: Any, labels: tuple[str, ...], **more: Any) -> TokenizedSet:
    """Nine questions of different length whose answers go through the labels in turn."""
    rows = [
        {"prompt": " ".join(WORDS[: i % 7 + 1]), "completion": labels[i % len(labels)]}
        for i in range(9)
    ]
    config = DataConfig(train="unused", eval=write(folder, rows), **more)
    return build_dataset(config, tokenizer, "eval")


def measure(model: Any, tokenizer: Any, data: TokenizedSet, **settings: Any) -> SetResult:
    evaluator = Evaluator(tokenizer, EvalConfig(**settings), phases=Phases(Console(quiet=True)))
    return evaluator.measure(model, data, "eval")


def same(results: list[SetResult]) -> None:
    """Equal scores and answers, equal losses up to float rounding."""
    first = results[0]
    for other in results[1:]:
        assert other.scores == first.scores
        assert other.answers == first.answers
        assert (other.rows, other.tokens) == (first.rows, first.tokens)
        assert other.loss == pytest.approx(first.loss, rel=1e-5)


def test_choice_by_hand_and_for_any_batch_size(tmp_path: Path, tokenizer: Any) -> None:
    """The likeliest first token wins; checked against whole rows run one by one."""
    model = tiny_models.build("llama")
    data = questions(tmp_path, tokenizer, ("yes", "no"))
    results = [measure(model, tokenizer, data, batch_size=size, samples=3) for size in (1, 4, 9)]
    same(results)
    assert results[0].task == "choice"
    first = [ids[0] for ids in data.choice_ids(("no", "yes"))]
    right = 0
    for example in data.examples:
        logits = model(input_ids=torch.tensor([example.prompt_ids])).logits[0, -1]
        right += ("no", "yes")[int(logits[first].argmax())] == example.reference
    assert results[0].scores == {"accuracy": right / 9}
    assert len(results[0].answers) == 3


def test_labels_that_begin_alike_are_compared_whole(tmp_path: Path, tokenizer: Any) -> None:
    """Same first token: the whole label's likelihood decides, checked one by one."""
    model = tiny_models.build("llama")
    labels = ("warm", "wet", "cold")
    data = questions(tmp_path, tokenizer, labels)
    results = [measure(model, tokenizer, data, choices=labels, batch_size=n) for n in (1, 5)]
    same(results)
    ids = data.choice_ids(labels)
    assert ids[0][0] == ids[1][0]
    right = 0
    for example in data.examples:
        scores = []
        for label in ids:
            whole = torch.tensor([[*example.prompt_ids, *label]])
            logs = model(input_ids=whole).logits[0].log_softmax(-1)
            start = len(example.prompt_ids)
            scores.append(sum(logs[start + i - 1, t].item() for i, t in enumerate(label)))
        right += labels[max(range(3), key=scores.__getitem__)] == example.reference
    assert results[0].scores["accuracy"] == pytest.approx(right / 9)


@contextmanager
def noted() -> Iterator[list[bool]]:
    """For every batch measured, whether its layers ran as one step."""
    ran: list[bool] = []
    own = FusedBlocks.run

    def run(self: FusedBlocks, runner: Any, *others: Any) -> torch.Tensor:
        if runner.index == 0:
            ran.append(not torch.is_grad_enabled())
        return own(self, runner, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedBlocks, "run", run)
        yield ran


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen2"])
@pytest.mark.parametrize("labels", [("yes", "no"), ("warm", "wet", "cold")])
def test_fused_layers_measure_the_same(
    tmp_path: Path, tokenizer: Any, family: str, labels: tuple[str, ...]
) -> None:
    """Losses and choices with adapters on and off, in tiles of 5 tokens; the model as it was."""
    model = tiny_models.build(family)
    adapter = attach(model, LoRA(rank=4, alpha=8), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 8)
    model.set_attn_implementation("eager")  # transformers 5.17's sdpa drops Gemma 2's softcap
    kind = type(model.model.layers[0])
    data = questions(tmp_path, tokenizer, labels)
    found: dict[tuple[str, bool], SetResult] = {}
    for step, on in product(("eager", "fused"), (True, False)):
        evaluator = Evaluator(
            tokenizer,
            EvalConfig(choices=labels, batch_size=4),
            phases=Phases(Console(quiet=True)),
            step=step,
            tile=5,
        )
        with nullcontext() if on else adapter.disabled(), noted() as ran:
            found[step, on] = evaluator.measure(model, data, "eval")
        # 9 rows of 4 a batch; where labels begin alike, 27 more are compared whole
        batches = 3 if len(labels) == 2 else 3 + 7
        assert ran == [True] * (batches if step == "fused" else 0)
    for on in (True, False):
        same([found["eager", on], found["fused", on]])
    assert abs(found["fused", True].loss - found["fused", False].loss) > 1e-3
    assert type(model.model.layers[0]) is kind
    assert model.config._attn_implementation == "eager"


def test_layers_that_are_fused_already_stay_so(tmp_path: Path, tokenizer: Any) -> None:
    """As when something measures in the middle of a training."""
    model = tiny_models.build("llama").requires_grad_(False)
    data = questions(tmp_path, tokenizer, ("yes", "no"))
    plain = measure(model, tokenizer, data)
    fused = fuse_blocks(model)
    with noted() as ran:
        same([plain, measure(model, tokenizer, data)])
    assert ran
    assert isinstance(model.model.layers[0], FusedLayer)
    fused.remove()


def test_samples_leave_out_the_longest_prompts(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for people; all rows are measured."""
    model = tiny_models.build("llama")
    data = questions(tmp_path, tokenizer, ("yes", "no"))
    before = measure(model, tokenizer, data, samples=9)
    lengths = sorted(len(example.prompt_ids) for example in data.examples)
    monkeypatch.setattr("qlora_kit.train.evaluate.LONGEST_SHOWN", lengths[4])
    shown = measure(model, tokenizer, data, samples=9)
    fitting = [e.prompt for e in data.examples if len(e.prompt_ids) <= lengths[4]]
    assert [answer.prompt for answer in shown.answers] == fitting
    assert 5 <= len(fitting) < 9 == len(before.answers) == before.rows == shown.rows
    assert shown.scores == before.scores
    assert set(shown.answers) < set(before.answers)


def test_exact_match_compares_json_as_values(tmp_path: Path, tokenizer: Any) -> None:
    """What the model really answers counts as right, however it is spaced; anything else not."""
    model = tiny_models.build("llama")
    data = questions(tmp_path, tokenizer, ('{"a": 1}', '{"b": 2}'))
    settings = {"task": "exact_match", "max_new_tokens": 6, "samples": 9}
    results = [measure(model, tokenizer, data, batch_size=n, **settings) for n in (1, 4, 9)]
    same(results)
    assert results[0].scores == {"exact_match": 0.0}
    answers = [answer.answer for answer in results[0].answers]
    for example, answer in zip(data.examples[:4], answers, strict=False):
        object.__setattr__(example, "reference", f"  {answer} ")
    again = measure(model, tokenizer, data, batch_size=4, **settings)
    assert again.scores["exact_match"] == pytest.approx(4 / 9)


def test_generation_stops_at_the_end_token(tokenizer: Any) -> None:
    """The text ends where the end token is, also when another row goes on longer."""
    model = tiny_models.build("llama")
    prompts = [list(range(3, 9)), list(range(20, 40)), [50]]
    free = generate_answers(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    ids = torch.tensor([prompts[0]])
    config = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **config)[0, 6:].tolist()
    model.generation_config.eos_token_id = [2, written[2]]
    cut = generate_answers(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    expected = written[: written.index(written[2])]
    assert cut[0] == tokenizer.decode(expected, skip_special_tokens=True).strip() != free[0]
    with pytest.raises(DataError, match="no tokens"):
        generate_answers(model, tokenizer, [[]], max_new_tokens=1, batch_size=1)


def test_stream_equals_batch_and_shows_the_base(tokenizer: Any) -> None:
    """Streamed pieces are the answer; with base=True the adapter is off, and on again after."""
    model, adapter = adapted()
    prompt = list(range(5, 15))
    before = "".join(generate_stream(model, tokenizer, prompt, max_new_tokens=6))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    tuned = "".join(generate_stream(model, tokenizer, prompt, max_new_tokens=6))
    options = {"max_new_tokens": 6, "adapter": adapter}
    base = "".join(generate_stream(model, tokenizer, prompt, base=True, **options))
    assert base == before != tuned
    assert tuned == "".join(generate_stream(model, tokenizer, prompt, **options))
    batch = generate_answers(model, tokenizer, [prompt], max_new_tokens=6, batch_size=1)
    assert tuned.strip() == batch[0]
    stream = generate_stream(model, tokenizer, prompt, max_new_tokens=400)
    next(stream)
    stream.close()  # a reader that goes away does not have to wait for 400 tokens
    with pytest.raises(IndexError):
        list(generate_stream(model, tokenizer, [10**6], max_new_tokens=1))


def test_perplexity_of_raw_text(tmp_path: Path, tokenizer: Any) -> None:
    """Token-weighted over rows of different length; no prompts, no samples."""
    model = tiny_models.build("llama")
    texts = [{"text": " ".join(WORDS[:n])} for n in (1, 4, 9)]
    config = DataConfig(train="unused", eval=write(tmp_path, texts), loss_on="all")
    data = build_dataset(config, tokenizer, "eval")
    results = [measure(model, tokenizer, data, batch_size=n) for n in (1, 3)]
    same(results)
    result = results[0]
    assert (result.task, result.scores, result.answers) == ("perplexity", {}, ())
    assert result.perplexity == pytest.approx(torch.tensor(result.loss).exp().item(), rel=1e-5)
    rows = [{k: torch.tensor([v]) for k, v in row.items()} for row in data]
    losses = [model(input_ids=r["input_ids"], labels=r["labels"]).loss.item() for r in rows]
    counts = [int((r["labels"][:, 1:] != -100).sum()) for r in rows]
    wanted = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    assert result.loss == pytest.approx(wanted, rel=1e-5)
    assert result.tokens == sum(counts)
    assert abs(result.loss - sum(losses) / 3) > 1e-4  # the bound bites


def test_classification(tmp_path: Path, tokenizer: Any) -> None:
    """Accuracy and macro F1 of a classifier, for any batch size."""
    model = tiny_models.build("bert", num_labels=2)
    rows = [{"text": " ".join(WORDS[: i % 5 + 1]), "label": i % 3 % 2} for i in range(9)]
    config = DataConfig(train="unused", eval=write(tmp_path, rows))
    data = build_dataset(config, tokenizer, "eval", task="sequence_classification")
    results = [measure(model, tokenizer, data, batch_size=n) for n in (1, 4)]
    same(results)
    found = [int(model(input_ids=torch.tensor([r["input_ids"]])).logits.argmax()) for r in data]
    right = sum(f == row["labels"] for f, row in zip(found, data, strict=True))
    assert results[0].scores["accuracy"] == pytest.approx(right / 9)
    assert results[0].perplexity is None
    assert {a.reference for a in results[0].answers} <= set(data.label_names)


def test_auto_and_refusals(tmp_path: Path, tokenizer: Any) -> None:
    """What `auto` takes a data set for, and tasks that do not fit."""
    (tmp_path / "a").mkdir()
    choice = questions(tmp_path / "a", tokenizer, ("yes", "no"))
    free = questions(tmp_path / "a", tokenizer, tuple(f"a long answer {w}" for w in WORDS))
    structured = questions(tmp_path / "a", tokenizer, tuple(f'{{"n": {i}}}' for i in range(9)))
    assert choose_task(EvalConfig(), choice) == "choice"
    assert choose_task(EvalConfig(), free) == "perplexity"
    assert choose_task(EvalConfig(), structured) == "exact_match"
    with pytest.raises(ConfigError, match="classification"):
        choose_task(EvalConfig(task="classification"), choice)
    texts = write(tmp_path, [{"text": "abc def"}])
    raw = build_dataset(DataConfig(train="unused", eval=texts), tokenizer, "eval")
    with pytest.raises(ConfigError, match="raw text has none"):
        choose_task(EvalConfig(task="choice"), raw)


def test_rows_without_an_answer_do_not_shift_the_others(tmp_path: Path, tokenizer: Any) -> None:
    """Conversations that end with the user have no example; the rest keep their rows."""
    user, assistant = {"role": "user"}, {"role": "assistant"}
    rows = [
        {
            "messages": [
                user | {"content": "a"},
                assistant | {"content": "b"},
                user | {"content": "c"},
            ]
        },
        {"messages": [user | {"content": "d"}, assistant | {"content": "yes"}]},
        {"messages": [user | {"content": "e"}, assistant | {"content": "no"}]},
        {"messages": [user | {"content": "f"}, assistant | {"content": "no"}]},
    ]
    config = DataConfig(train="unused", eval=write(tmp_path, rows), loss_on="assistant")
    data = build_dataset(config, tokenizer, "eval")
    assert example_rows(data) == [1, 2, 3]
    model = tiny_models.build("llama")
    same([measure(model, tokenizer, data, choices=("yes", "no"), batch_size=n) for n in (1, 4)])


def test_loss_totals_restores_the_mode(tokenizer: Any) -> None:
    """Evaluation in the middle of training leaves the model in training mode."""
    model = tiny_models.build("llama").train()
    ids = torch.tensor([[5, 6, 7]])
    loss_totals(model, [{"input_ids": ids, "labels": ids}])
    assert model.training
