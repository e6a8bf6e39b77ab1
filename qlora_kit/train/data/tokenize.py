"""From examples to tokens, and which of them count in the loss.

What counts is decided by position. For each assistant turn the conversation is
written twice more: up to the generation prompt (where the model starts to answer)
and up to the end of the turn; the lengths of those prefixes in tokens bound the
answer. Nothing is searched for in the text, and no token id is special: with
SmolLM2, whose padding is its end-of-turn token, masking by id would teach a model
that never stops.

A prefix has to be one, token for token, and that is checked. Two things can go
wrong. The tokenizer may merge across the boundary: then the pieces between the
boundaries are tokenized one by one, exactly as at inference. Or the template may
rewrite earlier turns (reasoning models drop old thoughts): then the template's own
{% generation %} marks decide, and without those an error says so.

After the answer a template may write glue (ChatML: a line break). It stays in the
row and does not count: the last token that counts is the one that ends the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from qlora_kit.core.errors import DataError
from qlora_kit.core.log import log_once
from qlora_kit.train.data.formats import Conversation, Message, Text
from qlora_kit.train.data.templates import has_generation_marks, render, with_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that does not count; torch's cross entropy skips it."""

LossOn = Literal["completion", "assistant", "all"]
_CHUNK = 256  # conversations tokenized in one call: one thread per text, bounded memory
_LONGEST_GLUE = 4  # tokens between the end of an answer and the next turn


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens, before any cut."""

    input_ids: list[int]
    """All tokens."""
    spans: tuple[tuple[int, int], ...]
    """Token ranges [start, end) that count, in order, not overlapping."""
    prompt_length: int
    """Tokens before the last answer: what the model is shown at inference."""

    def labels(self) -> list[int]:
        """Make the labels: the token where it counts, else -100; the first never counts.

        The first token of a document has nothing that predicts it, and in a packed
        row the last token of the document before must not.

        Returns:
            As many as there are tokens.

        Example:
            >>> Encoded([5, 6, 7], ((0, 2),), 0).labels()
            [-100, 6, -100]
        """
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.spans:
            labels[start:end] = self.input_ids[start:end]
        labels[:1] = [IGNORED]
        return labels


class ConversationEncoder:
    """Tokenizes conversations with one tokenizer and one choice of what counts.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = ["</s>", "user", "assistant", "2+2", "4"]
        >>> core = Tokenizer(models.WordLevel(dict(zip(words, range(5))), unk_token="</s>"))
        >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %} {{ m.role }} {{ m.content }} </s>{% endfor %}"
        ...     "{% if add_generation_prompt %} assistant{% endif %}")
        >>> chat = Conversation((Message("user", "2+2"), Message("assistant", "4")))
        >>> encoded = ConversationEncoder(tokenizer).encode([chat], "row {}".format)[0]
        >>> encoded.input_ids, encoded.labels()
        ([1, 3, 0, 2, 4, 0], [-100, -100, -100, -100, 4, 0])
        >>> answer_tokens(tokenizer, chat, "2+2")
        [3, 0]
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        loss_on: LossOn = "completion",
        system_prompt: str | None = None,
    ) -> None:
        """Remember the choices.

        Args:
            tokenizer: has a chat template (see `install_template`).
            loss_on: the last answer, every assistant turn, or every token.
            system_prompt: put before conversations without a system message.
        """
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self._system_prompt = system_prompt
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._end_ids = frozenset(special | set(tokenizer.all_special_ids))

    def encode(
        self, conversations: Sequence[Conversation], place: Callable[[int], str]
    ) -> list[Encoded]:
        """Tokenize conversations.

        Args:
            conversations: in order. Not modified.
            place: where entry i stands, for errors.

        Returns:
            One `Encoded` each, in order.

        Raises:
            DataError: nothing in a conversation can count, the template refuses it, or
                the template cannot be cut into prompt and answer.
        """
        encoded: list[Encoded] = []
        for first in range(0, len(conversations), _CHUNK):
            chunk = [
                with_system(conversation, self._system_prompt)
                for conversation in conversations[first : first + _CHUNK]
            ]
            drafts = [self._draft(c, place(first + i)) for i, c in enumerate(chunk)]
            texts = list(dict.fromkeys(text for draft in drafts for text in draft.texts()))
            ids = dict(zip(texts, self._ids(texts), strict=True))
            encoded += [self._finish(draft, ids) for draft in drafts]
        return encoded

    def _draft(self, conversation: Conversation, place: str) -> "_Draft":
        """Write the conversation and the prefixes that bound what may count."""
        turns = conversation.messages
        # An assistant that speaks first answers nothing: there is no prompt to learn it from.
        answers = [i for i, turn in enumerate(turns) if i and turn.role == "assistant"]
        if self._loss_on == "completion" and not (answers and answers[-1] == len(turns) - 1):
            raise DataError(
                f"{place}: a completion is an assistant message at the end, after at least one "
                f"other message; the roles here are {', '.join(t.role for t in turns)}. Change the "
                f"row, or set data.loss_on: assistant."
            )
        if self._loss_on == "assistant" and not answers:
            raise DataError(
                f"{place}: the conversation has no assistant message after another one, so nothing "
                f"would be learnt. "
                f"Remove the row, or set data.loss_on: all."
            )
        wanted = answers if self._loss_on == "assistant" else answers[-1:]
        full = render(self._tokenizer, turns, place=place)
        bounds: list[tuple[str, str]] = []
        for i in wanted:
            prompt = render(self._tokenizer, turns[:i], place=place, add_generation_prompt=True)
            last = i == len(turns) - 1
            until = full if last else render(self._tokenizer, turns[: i + 1], place=place)
            bounds.append((prompt, until))
        return _Draft(conversation, full, tuple(bounds), place)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts that already hold their special tokens."""
        if not texts:
            return []
        ids = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(one) for one in ids]

    def _finish(self, draft: "_Draft", ids: dict[str, list[int]]) -> Encoded:
        tokens = ids[draft.full]
        bounds = [(ids[prompt], ids[until]) for prompt, until in draft.bounds]
        if all(_is_prefix(p, tokens) and _is_prefix(u, tokens) for p, u in bounds):
            spans = [(len(p), len(u)) for p, u in bounds]
        elif all(map(draft.full.startswith, (text for pair in draft.bounds for text in pair))):
            tokens, spans = self._pieces(draft)
        elif has_generation_marks(self._tokenizer):
            tokens, spans = self._marked(draft)
        elif self._loss_on == "all":
            spans = []
        else:
            raise DataError(self._unstable(draft))
        prompt_length = spans[-1][0] if spans else 0
        if self._loss_on == "all":
            return Encoded(tokens, ((0, len(tokens)),), prompt_length)
        trimmed = tuple((start, self._answer_end(tokens, start, end)) for start, end in spans)
        return Encoded(tokens, trimmed, prompt_length)

    def _pieces(self, draft: "_Draft") -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize between the boundaries, so that no token straddles one."""
        cuts = sorted({0, len(draft.full), *(len(t) for pair in draft.bounds for t in pair)})
        pieces = [draft.full[a:b] for a, b in pairwise(cuts)]
        tokens: list[int] = []
        token_at = {0: 0}
        for piece, cut in zip(self._ids(pieces), cuts[1:], strict=True):
            tokens += piece
            token_at[cut] = len(tokens)
        return tokens, [(token_at[len(p)], token_at[len(u)]) for p, u in draft.bounds]

    def _marked(self, draft: "_Draft") -> tuple[list[int], list[tuple[int, int]]]:
        """Let the template's own {% generation %} marks say what is generated."""
        log_once("The chat template rewrites earlier turns: using its own generation marks.")
        result = self._tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in draft.conversation.messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, mask = list(result["input_ids"]), [0, *result["assistant_masks"], 0]
        starts = [i for i in range(len(tokens)) if mask[i + 1] and not mask[i]]
        ends = [i + 1 for i in range(len(tokens)) if mask[i + 1] and not mask[i + 2]]
        spans = list(zip(starts, ends, strict=True))
        if not spans:
            raise DataError(f"{draft.place}: the template's generation marks cover no token.")
        return tokens, spans if self._loss_on == "assistant" else spans[-1:]

    def _answer_end(self, tokens: list[int], start: int, end: int) -> int:
        """End of the answer proper: after its end token, before the template's glue."""
        for last in range(end - 1, max(start, end - 1 - _LONGEST_GLUE) - 1, -1):
            if tokens[last] in self._end_ids:
                glue = tokens[last + 1 : end]
                blank = not glue or not str(self._tokenizer.decode(glue)).strip()
                return last + 1 if blank else end
        log_once(
            "The chat template ends answers without a special token: the model may not learn "
            "to stop."
        )
        return end

    def _unstable(self, draft: "_Draft") -> str:
        advice = (
            "set data.loss_on: completion to learn the last answer only, or "
            if self._loss_on == "assistant"
            else ""
        )
        return (
            f"{draft.place}: the chat template writes a conversation differently once later turns "
            f"are added, so the assistant's tokens cannot be told by position. To go on, {advice}"
            f"use a template with {{% generation %}} marks (save it as chat_template.jinja beside "
            f"the model), or data.loss_on: all."
        )


@dataclass(frozen=True, slots=True)
class _Draft:
    """A conversation as text, and the texts whose lengths bound its answers."""

    conversation: Conversation
    full: str
    bounds: tuple[tuple[str, str], ...]  # (up to the generation prompt, up to the turn's end)
    place: str

    def texts(self) -> list[str]:
        return [self.full, *(text for pair in self.bounds for text in pair)]


def _is_prefix(short: list[int], long: list[int]) -> bool:
    return long[: len(short)] == short


def encode_text(
    tokenizer: "PreTrainedTokenizerBase",
    text: Text,
    *,
    max_length: int,
    long_text: Literal["split", "cut"] = "split",
) -> list[Encoded]:
    """Tokenize a raw document; every token counts.

    A begin-of-sequence token is there if the tokenizer itself adds one; the
    end-of-sequence token is added if it does not. When a long document is split,
    each piece starts with the last token of the piece before as context, so that
    every token is predicted exactly once.

    Args:
        tokenizer: any.
        text: the document.
        max_length: longest piece in tokens, at least 2.
        long_text: `cut` returns the whole document as one piece, to be cut and
            counted like any other example.

    Returns:
        One piece, or several.

    Example:
        >>> class Letters:  # a tokenizer in miniature
        ...     eos_token_id = 0
        ...     def __call__(self, text, verbose):
        ...         return {"input_ids": [ord(c) for c in text]}
        >>> [e.input_ids for e in encode_text(Letters(), Text("abcd"), max_length=3)]
        [[97, 98, 99], [99, 100, 0]]
    """
    ids = list(tokenizer(text.text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    if long_text == "cut" or len(ids) <= max_length:
        return [Encoded(ids, ((0, len(ids)),), 0)]
    starts = range(0, len(ids) - 1, max_length - 1)
    pieces = [ids[start : start + max_length] for start in starts]
    return [Encoded(piece, ((0, len(piece)),), 0) for piece in pieces]


def answer_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    answer: str,
    *,
    system_prompt: str | None = None,
) -> list[int]:
    """Tokenize another answer in the place of a conversation's last one.

    Args:
        tokenizer: has a chat template.
        conversation: ends with an assistant message. Not modified.
        answer: text to put there.
        system_prompt: as for the encoder.

    Returns:
        The answer's tokens, end token included.

    Raises:
        DataError: the template refuses the conversation.

    Example:
        See `ConversationEncoder`.
    """
    changed = Conversation((*conversation.messages[:-1], Message("assistant", answer)))
    encoder = ConversationEncoder(tokenizer, system_prompt=system_prompt)
    encoded = encoder.encode([changed], lambda _: f"the choice {answer!r}")[0]
    start, end = encoded.spans[-1]
    return encoded.input_ids[start:end]
