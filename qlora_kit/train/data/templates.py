"""Conversations as text, through the tokenizer's own chat template.

`apply_chat_template` is the only thing that writes special tokens here. A model
without a template (GPT-2 and most base models) is given `PLAIN_TEMPLATE`; it is
set on the tokenizer, so that it is saved beside the adapter and the merged model
and every later use of them speaks the same format.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError

from qlora_kit.core.errors import DataError
from qlora_kit.core.log import log_once
from qlora_kit.train.data.formats import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### ' + message['role'].capitalize() + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)
"""`### User:`, a line break, the text; an answer ends with the end-of-sequence token."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def install_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Give a tokenizer that has no chat template the plain one.

    Args:
        tokenizer: changed in place when it has no template.

    Returns:
        `tokenizer` when it brought its own template, `plain` when it has ours.

    Raises:
        DataError: it has neither a template nor an end-of-sequence token.

    Example:
        >>> from types import SimpleNamespace
        >>> tokenizer = SimpleNamespace(chat_template=None, eos_token="</s>")
        >>> install_template(tokenizer), tokenizer.chat_template == PLAIN_TEMPLATE
        ('plain', True)
    """
    if tokenizer.chat_template is None:
        if not tokenizer.eos_token:
            raise DataError(
                "The tokenizer has no chat template and no end-of-sequence token, so an answer "
                "could not be ended. Set one of them in tokenizer_config.json."
            )
        tokenizer.chat_template = PLAIN_TEMPLATE
        log_once("The tokenizer has no chat template: using the plain one (### User: ...).")
    return "plain" if tokenizer.chat_template == PLAIN_TEMPLATE else "tokenizer"


def has_generation_marks(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Tell whether the template itself marks what the assistant generates.

    Args:
        tokenizer: any, with or without a template.

    Returns:
        True when the template holds a `generation` block.

    Example:
        >>> from types import SimpleNamespace
        >>> has_generation_marks(SimpleNamespace(chat_template="{% generation %}"))
        True
    """
    template = tokenizer.chat_template
    return isinstance(template, str) and bool(_GENERATION.search(template))


def with_system(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """Put a system message first, unless the conversation has one.

    Args:
        conversation: not modified.
        system_prompt: None leaves the conversation as it is.

    Returns:
        The same conversation or a longer one.

    Example:
        >>> with_system(Conversation((Message("user", "hi"),)), "Be brief.").messages[0].role
        'system'
    """
    if system_prompt is None or any(turn.role == "system" for turn in conversation.messages):
        return conversation
    return Conversation((Message("system", system_prompt), *conversation.messages))


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    place: str,
    add_generation_prompt: bool = False,
) -> str:
    """Write messages as the model's chat template does.

    Args:
        tokenizer: has a template (see `install_template`).
        messages: turns in order.
        place: where the row stands, for errors.
        add_generation_prompt: end where the assistant starts to answer.

    Returns:
        The text, special tokens included.

    Raises:
        DataError: the template refuses these messages.

    Example:
        >>> from types import SimpleNamespace
        >>> echo = SimpleNamespace(apply_chat_template=lambda m, **kw: m[0]["content"])
        >>> render(echo, [Message("user", "hi")], place="row 1")
        'hi'
    """
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in messages)
        raise DataError(
            f"{place}: the model's chat template refuses a conversation of the roles {roles}: "
            f"{error}. Change the row (templates often want user and assistant in turn), or "
            f"remove data.system_prompt if the model knows no system messages."
        ) from error
    return str(text)
