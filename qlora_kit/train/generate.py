"""Answers from a model: greedy in batches for measuring, streamed for talking.

Prompts are token lists. A batch is padded on the left, so that every row's answer
starts in the same column, and the pad is masked by position: a model whose pad is
its end token loses nothing.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from qlora_kit.core.errors import DataError
from qlora_kit.train.data.collate import collate_prompts
from qlora_kit.train.sampling import divide

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.adapters.attached import AttachedAdapter
    from qlora_kit.adapters.multi_adapter.bank import AdapterBank

Track = Callable[[Sequence[Any]], Iterable[Any]]


def stop_tokens(model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Collect the tokens that end an answer, from the tokenizer and the model.

    Args:
        model: its generation configuration may name several (Llama 3, Gemma).
        tokenizer: its end token.

    Returns:
        Token ids, sorted, without repeats; may be empty.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 7]))
        >>> stop_tokens(model, SimpleNamespace(eos_token_id=2))
        [2, 7]
    """
    found = {tokenizer.eos_token_id}
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found.update(named if isinstance(named, list | tuple) else [named])
    return sorted(int(token) for token in found if token is not None)


def _generation_config(stops: list[int], pad: int, max_new_tokens: int) -> GenerationConfig:
    # Explicit about sampling and cache: a model's own defaults may sample, and the Trainer turns
    # the cache off in the model's configuration.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )


def _pad_id(tokenizer: "PreTrainedTokenizerBase", stops: list[int]) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stops[0] if stops else 0


def generate_answers(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    most_tokens: int | None = None,
    track: Track = iter,
) -> list[str]:
    """Answer prompts greedily, in batches of similar length.

    Args:
        model: a causal language model; evaluation mode is set and restored.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt, ready to be continued.
        max_new_tokens: longest answer.
        batch_size: prompts answered together; does not change the answers beyond
            floating point ties.
        most_tokens: of a batch, prompts and answers together; None for any number.
        track: wraps the list of batches, to show progress.

    Returns:
        One text per prompt, in order, without special tokens, stripped.

    Raises:
        DataError: a prompt is empty.

    Example:
        >>> generate_answers(None, None, [], max_new_tokens=1, batch_size=1)
        []
    """
    if not prompts:
        return []
    if any(len(prompt) == 0 for prompt in prompts):
        raise DataError("a prompt has no tokens; every row to answer needs a question.")
    stops = stop_tokens(model, tokenizer)
    pad = _pad_id(tokenizer, stops)
    config = _generation_config(stops, pad, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    batches = divide(order, lambda row: len(prompts[row]) + max_new_tokens, batch_size, most_tokens)
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for rows in track(batches):
            batch = collate_prompts([prompts[row] for row in rows], pad)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with torch.no_grad():
                output = model.generate(**batch, generation_config=config)
            written = output[:, batch["input_ids"].shape[1] :].tolist()
            for row, tokens in zip(rows, written, strict=True):
                answers[row] = _decode(tokenizer, tokens, stops)
    finally:
        model.train(was_training)
    return answers


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: list[int], stops: list[int]) -> str:
    for position, token in enumerate(tokens):
        if token in stops:  # what follows is padding
            tokens = tokens[:position]
            break
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.strip()


def generate_stream(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    adapter: "AttachedAdapter | AdapterBank | None" = None,
    base: bool = False,
) -> Iterator[str]:
    """Answer one prompt, yielding text as it is written.

    Args:
        model: a causal language model.
        tokenizer: decodes the answer.
        prompt: token ids, ready to be continued.
        max_new_tokens: longest answer.
        temperature: 0 answers greedily; above, samples at this temperature.
        adapter: attached to the model; needed for `base`.
        base: answer as the base does, with the adapter switched off.

    Yields:
        Pieces of text; joined, they are the answer.

    Raises:
        DataError: the prompt is empty, or `base` without an adapter.

    Example:
        >>> list(generate_stream(None, None, []))
        Traceback (most recent call last):
        ...
        qlora_kit.core.errors.DataError: the prompt has no tokens...
    """
    if len(prompt) == 0:
        raise DataError("the prompt has no tokens; write a question.")
    if base and adapter is None:
        raise DataError("there is no adapter to compare the base with; load one.")
    stops = stop_tokens(model, tokenizer)
    pad = _pad_id(tokenizer, stops)
    config = _generation_config(stops, pad, max_new_tokens)
    if temperature > 0:
        config.do_sample, config.temperature = True, temperature
    batch = collate_prompts([prompt], pad)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()

    def work() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    **batch,
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_StopWhen(stop)]),
                )
        finally:
            streamer.end()  # also after an error, so that the reader below does not wait forever

    model.eval()
    switched = adapter.disabled() if base and adapter is not None else nullcontext()
    with switched, ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(work)
        try:
            yield from (piece for piece in streamer if piece)
        finally:  # the reader may have gone away in the middle of an answer
            stop.set()
        running.result()


class _StopWhen(StoppingCriteria):
    """Ends a generation from outside."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tell every row of the batch to stop once the event is set."""
        stopped = self.event.is_set()
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device)
