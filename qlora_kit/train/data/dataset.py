"""From a `DataConfig` to something a Trainer can read: the one entry of this room.

    train = build_dataset(config.data, tokenizer, "train")
    held_out = build_dataset(config.data, tokenizer, "eval")
    train[0]                 # {"input_ids": [...], "labels": [...]}; packed: "position_ids" too
    train.lengths            # tokens per row, for grouping by length
    train.report             # DataReport: what was read, cut, dropped
    held_out.examples        # PromptAnswer per kept example: prompt_ids, prompt, reference
    held_out.choice_tokens(("positive", "negative"))      # first token of each answer
    collator = collate.make_collator(train, pad_to_multiple_of=8)   # torch tensors

`labels` hold -100 where a token does not count, also at the first token of every
document, so counting `labels != -100` gives exactly the number of predictions in
the loss. For `task="sequence_classification"` rows are `{"input_ids", "labels":
int}` and `label_names` tells the classes; pass the training set's `label_names`
as `labels` for every other set. `examples` is filled for held-out conversations
only: training rows and raw text have none.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.core.errors import ConfigError, DataError
from qlora_kit.core.log import log_once
from qlora_kit.train.config import DataConfig, Task
from qlora_kit.train.data.formats import Conversation, Example, Labelled, Text, to_examples
from qlora_kit.train.data.packing import join, plan_rows
from qlora_kit.train.data.sources import Rows, load_rows
from qlora_kit.train.data.templates import install_template
from qlora_kit.train.data.tokenize import (
    IGNORED,
    ConversationEncoder,
    Encoded,
    encode_text,
)
from qlora_kit.train.data.tokenized import Chooser, DataReport, PromptAnswer, Row, TokenizedSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataReport", "PromptAnswer", "Row", "TokenizedSet", "build_dataset", "eval_names"]


def eval_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the held-out sets of a configuration: valid values of `which`.

    Args:
        config: the data part of a run.

    Returns:
        `eval` first, if there is one, then the names of `eval_sets`.

    Example:
        >>> eval_names(DataConfig(train="a.jsonl", eval_sets={"unseen": "b.jsonl"}))
        ('unseen',)
    """
    first = ("eval",) if config.eval is not None or config.eval_fraction > 0 else ()
    return (*first, *config.eval_sets)


def build_dataset(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    which: str = "train",
    *,
    task: Task = "causal_lm",
    labels: Sequence[str] = (),
    seed: int = 0,
) -> TokenizedSet:
    """Read, understand, tokenize and (for training) pack the rows of one set.

    Args:
        config: where rows are and how they are read.
        tokenizer: of the model to train. Given the plain chat template if it has
            none and the rows are conversations.
        which: `train`, `eval` (config.eval, or eval_fraction of train), or a name of
            config.eval_sets. Held-out sets are never packed.
        task: text generation or classification.
        labels: classes in the order of their ids; empty: taken from the rows.
        seed: of the eval_fraction split; the same for both halves.

    Returns:
        The set; at least one row.

    Raises:
        ConfigError: a field is out of range, or there is no such set.
        SourceError: the source cannot be found or fetched.
        DataError: rows cannot be understood, or none has anything to learn.

    Example:
        >>> build_dataset(DataConfig(train="gone.jsonl"), None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        qlora_kit.core.errors.SourceError: No data at gone.jsonl ...
    """
    _check(config)
    rows = _rows_of(config, which, seed)
    limit = config.limit_train if which == "train" else config.limit_eval
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    examples, layout = to_examples(rows, config.format, task=task)
    builder = _Builder(config, tokenizer, rows, layout, which)
    if task == "sequence_classification":
        return builder.classification([e for e in examples if isinstance(e, Labelled)], labels)
    return builder.causal(examples)


def _check(config: DataConfig) -> None:
    """Refuse values no data could satisfy."""
    limits = {"limit_train": config.limit_train, "limit_eval": config.limit_eval}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ConfigError(f"data.{name} has to be at least 1 or left out; it is {value}.")
    if config.max_length < 8:
        raise ConfigError(
            f"data.max_length has to be at least 8 tokens; it is {config.max_length}."
        )
    if not 0 <= config.eval_fraction < 1:
        raise ConfigError(
            f"data.eval_fraction is a share of the training rows, at least 0 and below 1; it is "
            f"{config.eval_fraction}."
        )
    taken = {"train", "eval"} & set(config.eval_sets)
    if taken:
        raise ConfigError(f"data.eval_sets cannot use the name {min(taken)!r}; choose another.")


def _rows_of(config: DataConfig, which: str, seed: int) -> Rows:
    """Load the rows of one set, columns renamed."""
    if which in config.eval_sets:
        rows = load_rows(config.eval_sets[which], split=config.eval_split)
    elif which == "eval" and config.eval is not None:
        rows = load_rows(config.eval, split=config.eval_split)
    elif which in ("train", "eval"):
        rows = load_rows(config.train, split=config.train_split)
        if config.eval is None and config.eval_fraction > 0:
            rows = _split(rows, config.eval_fraction, seed, held_out=which == "eval")
        elif which == "eval":
            raise ConfigError(
                "There are no held-out rows: set data.eval to a file, or data.eval_fraction to "
                "the share of the training rows to hold out."
            )
    else:
        known = ", ".join(("train", *eval_names(config)))
        raise ConfigError(f"There is no set {which!r}; this configuration has {known}.")
    return rows.rename(config.columns)


def _split(rows: Rows, fraction: float, seed: int, *, held_out: bool) -> Rows:
    """One half of a seeded split; both keep the rows' order."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise DataError(
            f"{rows.source} has {len(rows)} rows; holding out {fraction:.0%} leaves none to train "
            f"on. Use fewer held-out rows, or name a file in data.eval."
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.select([i for i in range(len(rows)) if (i in chosen) == held_out])


class _Builder:
    """Tokenizes, cuts, counts; one use per set."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        rows: Rows,
        layout: str,
        which: str,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._rows = rows
        self._layout = layout
        self._training = which == "train"
        self._template = "none"
        self._max_length = config.max_length
        if tokenizer.model_max_length < config.max_length:
            self._max_length = tokenizer.model_max_length
            log_once(
                f"data.max_length is {config.max_length}, but the tokenizer says the model reads "
                f"at most {self._max_length} tokens: using that."
            )
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else tokenizer.eos_token_id or 0
        self._kept: list[Row] = []
        self._loss_tokens = self._truncated = self._lost = self._dropped = 0

    def causal(self, examples: Sequence[Example]) -> TokenizedSet:
        answers: list[PromptAnswer] = []
        chooser = None
        if isinstance(examples[0], Text):
            for text in examples:
                assert isinstance(text, Text)
                for encoded in encode_text(
                    self._tokenizer,
                    text,
                    max_length=self._max_length,
                    long_text=self._config.long_text,
                ):
                    self._add(encoded)
        else:
            conversations = [e for e in examples if isinstance(e, Conversation)]
            self._template = install_template(self._tokenizer)
            encoder = ConversationEncoder(
                self._tokenizer,
                loss_on=self._config.loss_on,
                system_prompt=self._config.system_prompt,
            )
            all_encoded = encoder.encode(conversations, self._rows.place)
            for conversation, encoded in zip(conversations, all_encoded, strict=True):
                if not self._add(encoded) or self._training:
                    continue
                if encoded.prompt_length and conversation.messages[-1].role == "assistant":
                    answers.append(_prompt_answer(conversation, encoded))
                    chooser = chooser or Chooser(
                        self._tokenizer, conversation, self._config.system_prompt
                    )
        if not self._kept:
            raise DataError(self._nothing_left())
        lengths = [len(row["input_ids"]) for row in self._kept]
        packed = self._config.packing and self._training
        rows = self._packed(lengths) if packed else self._kept
        return self._set(rows, lengths, "causal_lm", packed, examples=answers, chooser=chooser)

    def _add(self, encoded: Encoded) -> bool:
        """Cut, count and keep one example; False when nothing of it can be learnt."""
        labels = encoded.labels()[: self._max_length]
        lost = len(encoded.input_ids) - len(labels)
        self._truncated += lost > 0
        self._lost += lost
        counted = len(labels) - labels.count(IGNORED)
        if not counted:
            self._dropped += 1
            return False
        self._loss_tokens += counted
        self._kept.append({"input_ids": encoded.input_ids[: self._max_length], "labels": labels})
        return True

    def _packed(self, lengths: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        for indices in plan_rows(lengths, self._max_length):
            kept = [self._kept[i] for i in indices]
            row = join([(one["input_ids"], one["labels"]) for one in kept])
            rows.append(
                {
                    "input_ids": row.input_ids,
                    "labels": row.labels,
                    "position_ids": row.position_ids,
                }
            )
        return rows

    def classification(self, examples: Sequence[Labelled], labels: Sequence[str]) -> TokenizedSet:
        names = tuple(labels) or self._rows.class_names or _names_in(examples)
        if len(names) < 2:
            raise DataError(
                f"{self._rows.source} has only the class {', '.join(names)}; a classifier needs at "
                f"least two. Check the column 'label'."
            )
        texts = [example.text for example in examples]
        all_ids = self._tokenizer(texts, verbose=False)["input_ids"]
        cut_ids = self._tokenizer(
            texts, truncation=True, max_length=self._max_length, verbose=False
        )["input_ids"]  # keeps the closing special token
        for i, example in enumerate(examples):
            lost = len(all_ids[i]) - len(cut_ids[i])
            self._truncated += lost > 0
            self._lost += lost
            label = _class_id(example.label, names, self._rows.place(i))
            self._kept.append({"input_ids": list(cut_ids[i]), "labels": label})
        self._loss_tokens = len(examples)
        lengths = [len(row["input_ids"]) for row in self._kept]
        return self._set(self._kept, lengths, "sequence_classification", False, names=names)

    def _set(
        self,
        rows: Sequence[Row],
        lengths: Sequence[int],
        task: Task,
        packed: bool,
        *,
        names: tuple[str, ...] = (),
        examples: Sequence[PromptAnswer] = (),
        chooser: Chooser | None = None,
    ) -> TokenizedSet:
        report = DataReport(
            source=self._rows.source,
            format=self._layout,
            template=self._template,
            max_length=self._max_length,
            rows=len(self._rows),
            examples=len(lengths),
            packed_rows=len(rows),
            tokens=sum(lengths),
            loss_tokens=self._loss_tokens,
            longest=max(lengths),
            truncated=self._truncated,
            tokens_lost=self._lost,
            dropped=self._dropped,
        )
        return TokenizedSet(
            rows,
            report=report,
            task=task,
            packed=packed,
            pad_token_id=self._pad,
            label_names=names,
            examples=examples,
            chooser=chooser,
        )

    def _nothing_left(self) -> str:
        return (
            f"{self._rows.source}: none of the {len(self._rows)} rows has a token to learn: "
            f"{self._truncated} were longer than data.max_length = {self._max_length} and lost "
            f"their whole answer, the rest are empty. Raise data.max_length or shorten the prompts."
        )


def _prompt_answer(conversation: Conversation, encoded: Encoded) -> PromptAnswer:
    return PromptAnswer(
        prompt_ids=tuple(encoded.input_ids[: encoded.prompt_length]),
        prompt=conversation.messages[-2].content,
        reference=conversation.messages[-1].content,
    )


def _names_in(examples: Sequence[Labelled]) -> tuple[str, ...]:
    """Classes that occur: sorted names, or 0 to the largest number."""
    found = {example.label for example in examples}
    numbers = [label for label in found if isinstance(label, int)]
    if len(numbers) == len(found):
        return tuple(map(str, range(max(numbers) + 1)))
    return tuple(sorted(map(str, found)))


def _class_id(label: str | int, names: tuple[str, ...], place: str) -> int:
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise DataError(
        f"{place}: {label!r} is none of the classes {', '.join(names)}. Correct the row, or set "
        f"model.labels."
    )
