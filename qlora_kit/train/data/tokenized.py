"""A tokenized data set, and the account of how it came about.

Rows are plain lists of ints, so that any collator, `torch.utils.data.DataLoader`
and `transformers.Trainer` can read them; in memory they are arrays of four bytes
per token. `build_dataset` (dataset.py) makes them.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.core.errors import DataError
from qlora_kit.train.config import Task
from qlora_kit.train.data.formats import Conversation
from qlora_kit.train.data.tokenize import answer_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
"""One row of a `TokenizedSet`: lists of ints by name, or one int for a class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptAnswer:
    """One held-out question: what the model is shown and what it should answer."""

    prompt_ids: tuple[int, ...]
    """The prompt as tokens, up to where the answer starts; ready to generate from."""
    prompt: str
    """The message before the answer, for people to read."""
    reference: str
    """The expected answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What became of the rows of one source."""

    source: str
    """File, folder or hub id the rows came from."""
    format: str
    """Row layout that was used."""
    template: str
    """`tokenizer`, `plain` or `none`: whose chat template wrote the tokens."""
    max_length: int
    """Longest example allowed, after the tokenizer's own limit."""
    rows: int
    """Rows read."""
    examples: int
    """Examples kept."""
    packed_rows: int
    """Rows after packing; equal to `examples` without."""
    tokens: int
    """Tokens of all kept examples."""
    loss_tokens: int
    """Tokens that count in the loss; for classification, one per example."""
    longest: int
    """Longest kept example in tokens."""
    truncated: int
    """Examples that were cut at max_length, dropped ones included."""
    tokens_lost: int
    """Tokens that were cut away."""
    dropped: int
    """Examples left out because no loss token survived the cut."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports and logs.

        Returns:
            Field names to values.

        Example:
            >>> DataReport(**dict.fromkeys(DataReport.__dataclass_fields__, 0)).to_dict()["tokens"]
            0
        """
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Chooser:
    """Tokenizes other answers after one of a set's prompts."""

    tokenizer: "PreTrainedTokenizerBase"
    """Has a chat template."""
    conversation: Conversation
    """Any of the set's; ends with an answer."""
    system_prompt: str | None
    """As the set was made with."""

    def tokens(self, answer: str) -> list[int]:
        """Tokenize an answer, its end token included.

        Args:
            answer: text in place of the conversation's answer.

        Returns:
            Token ids.

        Example:
            See `TokenizedSet.choice_ids`.
        """
        return answer_tokens(
            self.tokenizer, self.conversation, answer, system_prompt=self.system_prompt
        )


class TokenizedSet:
    """A map-style data set of token lists; see the module's text for its use.

    Attributes:
        lengths: tokens per row.
        examples: held-out conversations only: prompt and reference of each.
        report: what became of the rows.
        task: text generation or classification.
        packed: several documents per row, with `position_ids`.
        label_names: classes in the order of their ids; empty for generation.
        pad_token_id: what the collators fill with.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        report: DataReport,
        task: Task,
        packed: bool,
        pad_token_id: int,
        label_names: tuple[str, ...] = (),
        examples: Sequence[PromptAnswer] = (),
        chooser: Chooser | None = None,
    ) -> None:
        """Keep rows compactly; `build_dataset` is the way to make one.

        Args:
            rows: lists of ints by name, or one int under `labels`.
            report: what became of the source's rows.
            task: text generation or classification.
            packed: rows hold `position_ids`.
            pad_token_id: any valid token id.
            label_names: classes in the order of their ids.
            examples: one per row that ends with an answer, or none.
            chooser: tokenizes answers after this set's prompts.
        """
        self._rows = [
            {key: array("i", v) if isinstance(v, list) else v for key, v in row.items()}
            for row in rows
        ]
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.examples = list(examples)
        self.report = report
        self.task = task
        self.packed = packed
        self.pad_token_id = pad_token_id
        self.label_names = label_names
        self._chooser = chooser

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        return {key: v.tolist() if isinstance(v, array) else v for key, v in row.items()}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def choice_tokens(self, choices: Sequence[str]) -> list[int]:
        """First answer token of each choice, as it would follow this set's prompts.

        Args:
            choices: at least two different answers.

        Returns:
            One token id per choice, all different.

        Raises:
            DataError: the set has no prompts, or two choices start with the same token.

        Example:
            >>> class Letters:  # in place of a tokenizer and a prompt
            ...     def tokens(self, answer):
            ...         return [ord(letter) for letter in answer]
            >>> TokenizedSet([], report=None, task="causal_lm", packed=False, pad_token_id=0,
            ...     chooser=Letters()).choice_tokens(["no", "yes"])
            [110, 121]
        """
        tokens = [ids[0] for ids in self.choice_ids(choices)]
        for i, token in enumerate(tokens):
            if token in tokens[:i]:
                raise DataError(
                    f"The choices {choices[tokens.index(token)]!r} and {choices[i]!r} start with "
                    f"the same token, so their first tokens cannot tell them apart. Use other "
                    f"words, or eval.task: exact_match."
                )
        return tokens

    def choice_ids(self, choices: Sequence[str]) -> list[list[int]]:
        """All tokens of each choice, end token included, as they would follow this set's prompts.

        Args:
            choices: answers; they may begin alike.

        Returns:
            Token ids of each choice.

        Raises:
            DataError: the set has no prompts.

        Example:
            >>> class Letters:  # in place of a tokenizer and a prompt
            ...     def tokens(self, answer):
            ...         return [ord(letter) for letter in answer]
            >>> TokenizedSet([], report=None, task="causal_lm", packed=False, pad_token_id=0,
            ...     chooser=Letters()).choice_ids(["ab", "a"])
            [[97, 98], [97]]
        """
        if self._chooser is None:
            raise DataError(
                f"{self.report.source} holds no prompts and answers, so there is nothing to "
                f"choose between. Use eval.task: perplexity."
            )
        return [self._chooser.tokens(choice) for choice in choices]
