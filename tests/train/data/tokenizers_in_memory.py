"""Tokenizers made on the spot, each with the habit that breaks naive masking.

`bytes_tokenizer` has one token per byte. `chatml` copies SmolLM2's traps: a default
system prompt, and padding that is the end-of-turn token.
"""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# Earlier answers lose their thoughts, and the last one is given an empty one: not prefix-stable.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt for generation opens a thought that the finished text does not have.
THINKING = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n",
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n",
)
# The same, with the template's own marks.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# No break between the prompt and the answer: a merging tokenizer joins them.
GLUED = (
    "{% for m in messages %}{{ m['role'][0] + '=' + m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a={% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>")


def bytes_tokenizer(
    template: str | None = None,
    *,
    pad: str | None = None,
    eos: str = "</s>",
    merges: tuple[tuple[str, str], ...] = (),
) -> Any:
    """One token per byte, plus merges, plus the special tokens above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges))
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    if pad:
        made.pad_token = pad
    made.chat_template = template
    return made


def chatml() -> Any:
    """SmolLM2 in miniature: pad == eos == end of turn."""
    return bytes_tokenizer(CHATML, pad="<|im_end|>", eos="<|im_end|>")
