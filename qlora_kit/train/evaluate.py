"""What a model knows about held-out rows: loss, perplexity, and a score that fits the task.

One forward pass per row gives the loss of the expected answer and, for `choice`,
the likeliest label: both are read at the answer's positions only. Rows are batched
by length; results do not depend on the batch size beyond float rounding.

- `perplexity`: the loss alone.
- `choice`: the label whose first token is likeliest where the answer starts. Labels
  that begin with the same token are compared by the likelihood of the whole label.
- `exact_match`: the model answers greedily; right if it says the same as the
  reference, as JSON values where both are JSON, up to white space otherwise.
- `classification`: accuracy and macro F1 of a sequence classifier.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel

from qlora_kit.block.tiles import Tile
from qlora_kit.core.errors import ConfigError
from qlora_kit.nn.loss_head import IGNORE
from qlora_kit.step.head_input import HeadInput
from qlora_kit.step.prepare import fused_evaluation
from qlora_kit.train.callbacks import Phases
from qlora_kit.train.config import EvalConfig
from qlora_kit.train.data.collate import make_collator
from qlora_kit.train.data.tokenized import PromptAnswer, TokenizedSet
from qlora_kit.train.generate import generate_answers
from qlora_kit.train.held_out import (
    LossTotals,
    classify_batch,
    example_rows,
    language_model_losses,
    sample_rows,
    to_device,
)
from qlora_kit.train.metrics import accuracy, is_json_object, macro_f1, same_answer
from qlora_kit.train.sampling import SortedSampler, divide

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

MAX_CHOICES = 20
"""Most distinct answers for which `auto` takes a task for a choice."""
LONGEST_SHOWN = 8192
"""Longest prompt of a sample answer: beyond, its keys and values alone would fill a card."""
SHOWN_TOKENS = 24
"""Longest sample answer of tasks that are not measured by generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question and how it was answered."""

    prompt: str
    """What was asked."""
    reference: str
    """The expected answer."""
    answer: str
    """The model's answer."""
    right: bool | None = None
    """Whether they agree; None where that was not judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """What was measured on one held-out set."""

    name: str
    """`eval`, or the set's name in `data.eval_sets`."""
    task: str
    """`perplexity`, `choice`, `exact_match` or `classification`."""
    rows: int
    """Rows measured."""
    tokens: int
    """Tokens that count in the loss (rows, for a classifier)."""
    loss: float
    """Mean cross-entropy in nats per token (per row, for a classifier)."""
    perplexity: float | None
    """exp(loss); None for a classifier."""
    scores: dict[str, float]
    """`accuracy`, `exact_match`, `macro_f1`: between 0 and 1."""
    answers: tuple[Answer, ...] = field(default=())
    """A few answers, for people."""
    seconds: float = 0.0
    """Time taken."""


def choose_task(config: EvalConfig, data: TokenizedSet) -> str:
    """Decide what `auto` measures.

    A classifier is measured by classification. Few distinct answers that repeat are a
    choice, JSON answers an exact match, everything else perplexity.

    Args:
        config: `task` is returned unless it is `auto`.
        data: the held-out rows.

    Returns:
        `perplexity`, `choice`, `exact_match` or `classification`.

    Raises:
        ConfigError: the task needs answers, or a classifier, and there is none.

    Example:
        >>> from types import SimpleNamespace as Namespace
        >>> rows = [Namespace(reference=r) for r in ["yes", "no", "no", "yes", "yes"]]
        >>> choose_task(EvalConfig(), Namespace(task="causal_lm", examples=rows))
        'choice'
    """
    classifier = data.task == "sequence_classification"
    if config.task == "auto":
        if classifier:
            return "classification"
        references = Counter(example.reference for example in data.examples)
        if not references:
            return "perplexity"
        few = len(references) <= MAX_CHOICES and 2 * len(references) <= references.total()
        if config.choices or (few and len(references) > 1):
            return "choice"
        return "exact_match" if all(map(is_json_object, references)) else "perplexity"
    if classifier != (config.task == "classification"):
        raise ConfigError(
            f"eval.task={config.task} does not fit model.task={data.task}: use classification for "
            "sequence_classification, and perplexity, choice or exact_match for causal_lm."
        )
    if config.task in ("choice", "exact_match") and not data.examples:
        raise ConfigError(
            f"eval.task={config.task} needs prompts with answers; raw text has none. "
            "Use eval.task=perplexity."
        )
    return config.task


class Evaluator:
    """Measures a model on held-out sets, in the same way before and after training."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        config: EvalConfig,
        *,
        phases: Phases,
        pad_to_multiple_of: int = 1,
        most_tokens: int | None = None,
        step: str = "auto",
        tile: Tile = "auto",
    ) -> None:
        """Remember how to measure.

        Args:
            tokenizer: of the model.
            config: task, labels, batch size.
            phases: shows progress.
            pad_to_multiple_of: widths of batches are rounded up to this.
            most_tokens: of a batch, prompt and answer together; None for any number. A row that
                is longer is a batch of its own.
            step: `auto` and `fused` measure losses through fused layers, as training does; see
                `step/prepare.py`. What is written by the model is written by its own layers.
            tile: tokens that fused layers treat at a time.
        """
        self.tokenizer = tokenizer
        self.config = config
        self.phases = phases
        self.pad_to_multiple_of = pad_to_multiple_of
        self.most_tokens = most_tokens
        self.step = step
        self.tile = tile

    def measure(
        self, model: PreTrainedModel, data: TokenizedSet, name: str, *, label: str | None = None
    ) -> SetResult:
        """Measure one set.

        Args:
            model: with its adapter on or off, as it shall be measured.
            data: held-out rows.
            name: of the set, for the result.
            label: for the progress bar, if not the name.

        Returns:
            Loss, scores and a few answers.

        Raises:
            ConfigError: the configured task does not fit the data.
        """
        start = time.perf_counter()
        task = choose_task(self.config, data)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if task == "classification":
                    result = self._classification(model, data, label or name)
                else:
                    result = self._language(model, data, label or name, task)
        finally:
            model.train(was_training)
        totals, scores, answers = result
        means = totals.metrics()
        return SetResult(
            name=name,
            task=task,
            rows=totals.rows,
            tokens=totals.count,
            loss=means["loss"],
            perplexity=means.get("perplexity"),
            scores=scores,
            answers=tuple(answers),
            seconds=time.perf_counter() - start,
        )

    def _divide(self, items: list[T], length: Callable[[T], int]) -> list[list[T]]:
        """Batches of items that come longest first."""
        return divide(items, length, self.config.batch_size, self.most_tokens)

    def _batches(self, data: TokenizedSet, name: str) -> Iterable[tuple[list[int], dict[str, Any]]]:
        """Length-sorted batches, each with the row numbers it holds."""
        collate = make_collator(data, pad_to_multiple_of=self.pad_to_multiple_of)
        order = SortedSampler(data.lengths).order
        chunks = self._divide(order, lambda row: data.lengths[row])
        for rows in self.phases.track(chunks, name):
            yield rows, collate([data[row] for row in rows])

    def _classification(
        self, model: PreTrainedModel, data: TokenizedSet, name: str
    ) -> tuple[LossTotals, dict[str, float], list[Answer]]:
        totals = LossTotals(correct=0)
        predicted, wanted = [0] * len(data), [0] * len(data)
        for rows, cpu_batch in self._batches(data, name):
            batch = to_device(cpu_batch, model.device)
            losses, classes = classify_batch(model, batch)
            totals.loss_sum += float(losses.double().sum())
            for row, p, w in zip(rows, classes.tolist(), batch["labels"].tolist(), strict=True):
                predicted[row], wanted[row] = p, w
        totals.rows = totals.count = len(data)
        totals.correct = sum(p == w for p, w in zip(predicted, wanted, strict=True))
        scores = {"accuracy": accuracy(predicted, wanted), "macro_f1": macro_f1(predicted, wanted)}
        names = data.label_names
        answers = [
            Answer(
                prompt=self.tokenizer.decode(data[row]["input_ids"], skip_special_tokens=True),
                reference=names[wanted[row]],
                answer=names[predicted[row]],
                right=predicted[row] == wanted[row],
            )
            for row in sample_rows(len(data), self.config.samples)
        ]
        return totals, scores, answers

    def _language(
        self, model: PreTrainedModel, data: TokenizedSet, name: str, task: str
    ) -> tuple[LossTotals, dict[str, float], list[Answer]]:
        totals = LossTotals()
        rows_of = example_rows(data)
        starts = {row: len(e.prompt_ids) for row, e in zip(rows_of, data.examples, strict=True)}
        choices = self._choices(data) if task == "choice" else ()
        labels = data.choice_ids(choices) if choices else []
        first = [label[0] for label in labels]
        picked: dict[int, int] = {}
        with fused_evaluation(model, self.step, self.tile) as told:
            for rows, batch in self._batches(data, name):
                inputs = to_device(told(batch), model.device)
                losses, selected = language_model_losses(model, inputs)
                totals.loss_sum += float(losses.double().sum())
                totals.count += losses.numel()
                totals.rows += len(rows)
                if first:
                    picked.update(_pick_first_token(selected, rows, starts, first))
        if task == "exact_match":
            return totals, *self._exact_match(model, data, name)
        if task != "choice":
            return totals, {}, self._samples(model, data, 2 * SHOWN_TOKENS, None)
        if len(set(first)) < len(first):
            picked = self._pick_whole_label(model, data, labels, name)
            rows_of = list(range(len(data.examples)))
        right = [
            row in picked and choices[picked[row]].strip() == example.reference.strip()
            for row, example in zip(rows_of, data.examples, strict=True)
        ]
        scores = {"accuracy": sum(right) / max(1, len(right))}
        return totals, scores, self._samples(model, data, SHOWN_TOKENS, right)

    def _choices(self, data: TokenizedSet) -> tuple[str, ...]:
        if self.config.choices:
            return self.config.choices
        return tuple(sorted({example.reference for example in data.examples}))

    def _pick_whole_label(
        self,
        model: PreTrainedModel,
        data: TokenizedSet,
        labels: Sequence[Sequence[int]],
        name: str,
    ) -> dict[int, int]:
        """Example number to the label whose tokens together are likeliest."""
        jobs = [
            (row, c, [*example.prompt_ids, *labels[c]], len(labels[c]))
            for row, example in enumerate(data.examples)
            for c in range(len(labels))
        ]
        jobs.sort(key=lambda job: -len(job[2]))
        scores: dict[int, list[float]] = {
            row: [0.0] * len(labels) for row in range(len(data.examples))
        }
        chunks = self._divide(jobs, lambda job: len(job[2]))
        with fused_evaluation(model, self.step, self.tile) as told:
            for chunk in self.phases.track(chunks, f"{name} labels"):
                inputs = to_device(told(_answered([job[2:] for job in chunk])), model.device)
                losses, selected = language_model_losses(model, inputs)
                sums = losses.new_zeros(len(chunk)).index_add(0, selected.rows, losses)
                for (row, c, _, _), loss in zip(chunk, sums.tolist(), strict=True):
                    scores[row][c] = -loss
        return {row: max(range(len(s)), key=s.__getitem__) for row, s in scores.items()}

    def _exact_match(
        self, model: PreTrainedModel, data: TokenizedSet, name: str
    ) -> tuple[dict[str, float], list[Answer]]:
        answers = generate_answers(
            model,
            self.tokenizer,
            [example.prompt_ids for example in data.examples],
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size,
            most_tokens=self.most_tokens,
            track=lambda batches: self.phases.track(batches, f"{name} write"),
        )
        pairs = zip(answers, data.examples, strict=True)
        right = [same_answer(answer, example.reference) for answer, example in pairs]
        shown = [
            _answer(data.examples[row], answers[row], right[row])
            for row in sample_rows(len(answers), self.config.samples)
        ]
        return {"exact_match": sum(right) / max(1, len(right))}, shown

    def _samples(
        self,
        model: PreTrainedModel,
        data: TokenizedSet,
        max_new_tokens: int,
        right: list[bool] | None,
    ) -> list[Answer]:
        short = [i for i, e in enumerate(data.examples) if len(e.prompt_ids) <= LONGEST_SHOWN]
        rows = [short[i] for i in sample_rows(len(short), self.config.samples)]
        answers = generate_answers(
            model,
            self.tokenizer,
            [data.examples[row].prompt_ids for row in rows],
            max_new_tokens=min(max_new_tokens, self.config.max_new_tokens),
            batch_size=self.config.batch_size,
            most_tokens=self.most_tokens,
        )
        return [
            _answer(data.examples[row], answer, None if right is None else right[row])
            for row, answer in zip(rows, answers, strict=True)
        ]


def _answer(example: PromptAnswer, answer: str, right: bool | None) -> Answer:
    return Answer(prompt=example.prompt, reference=example.reference, answer=answer, right=right)


def _answered(rows: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    """A batch of tokens, the longest first, of which the last so many are an answer."""
    width = len(rows[0][0])
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, wanted = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for i, (tokens, answer) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        wanted[i, len(tokens) - answer : len(tokens)] = torch.tensor(tokens[-answer:])
    return {"input_ids": ids, "attention_mask": mask, "labels": wanted}


def _pick_first_token(
    selected: HeadInput,
    rows: Sequence[int],
    starts: dict[int, int],
    first: Sequence[int],
) -> dict[int, int]:
    """Row number to index of the choice whose first token is likeliest at the answer's start."""
    before = torch.tensor([starts.get(row, 0) - 1 for row in rows], device=selected.rows.device)
    at_start = selected.positions == before[selected.rows]
    logits = selected.logits(at_start)
    best = logits[:, torch.tensor(first, device=logits.device)].argmax(dim=-1).tolist()
    where = selected.rows[at_start].tolist()
    return {rows[i]: choice for i, choice in zip(where, best, strict=True)}
