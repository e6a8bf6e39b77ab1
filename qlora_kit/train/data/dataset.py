"""From a `DataConfig` to something a Trainer can read: the one entry of this room.

    train = build_dataset(config.data, tokenizer, "train")
    held_out = build_dataset(config.data, tokenizer, "eval")
    train[0]                 # {"input_ids": [...], "labels": [...]} and, when packed, "position_ids"
    train.lengths            # tokens per row, for grouping by length
    train.report             # DataReport: what was read, cut, dropped
    held_out.examples        # PromptAnswer per kept example: prompt_ids, prompt, reference
    held_out.choice_tokens(("positive", "negative"))      # first token of each answer
    collator = collate.make_collator(train, pad_to_multiple_of=8)   # torch tensors

`labels` hold -100 where a token does not count, also at the first token of every
document, so counting `labels != -100` gives exactly the number of predictions in
the loss. For `task="sequence_classification"` rows are `{"input_ids", "labels":
int}` and `label_names` tells the classes; pass the training set's `label_names`
as `labels` for every other set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.train.config import DataConfig, Task

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
    """The last user message, for people to read."""
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
    rows: int
    """Rows read."""
    examples: int
    """Examples kept."""
    packed_rows: int
    """Rows after packing; equal to `examples` without."""
    tokens: int
    """Tokens of all kept examples."""
    loss_tokens: int
    """Tokens that count in the loss."""
    longest: int
    """Longest kept example in tokens."""
    truncated: int
    """Examples that were cut at max_length, dropped ones included."""
    tokens_lost: int
    """Tokens that were cut away."""
    dropped: int
    """Examples left out because no loss token survived the cut."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports and logs."""
        return asdict(self)


class TokenizedSet:
    """A map-style data set of token lists; see the module's text for its use."""

    rows: Sequence[Row]
    lengths: list[int]
    examples: list[PromptAnswer]
    report: DataReport
    task: Task
    packed: bool
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        raise NotImplementedError

    def choice_tokens(self, choices: Sequence[str]) -> list[int]:
        """First answer token of each choice, as it would follow this set's prompts."""
        raise NotImplementedError


def eval_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the held-out sets of a configuration: valid values of `which`."""
    raise NotImplementedError


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

    `which` is "train", "eval" (config.eval, or eval_fraction of train) or a name of
    config.eval_sets. Held-out sets are never packed.
    """
    raise NotImplementedError
