"""`qlora-kit chat`: talk to a model or an adapter; answers appear as they are written.

The conversation goes through the model's chat template as in training. With
`--base` the base answers the same question too, each keeping its own history, so
that the two can be compared over several turns. With `--adapter` several adapters
are loaded on one base, and `/adapter` switches between them or combines them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_kit.cli.arguments import Parser
from qlora_kit.cli.logs import setup_logging
from qlora_kit.cli.target import (
    add_loading_arguments,
    load_target,
    named_adapters,
    resolve_target,
    run_settings,
)
from qlora_kit.core.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_kit.adapters.attached import AttachedAdapter
    from qlora_kit.adapters.multi_adapter.bank import AdapterBank

_ABOUT = """\
Talk to a model, an adapter or the result of a run. Answers stream; the
conversation is remembered until /reset."""
_EXAMPLES = """\
in the conversation:
  /reset                  forget the conversation
  /base                   let the base answer as well, or stop doing so
  /adapter NAME           let another adapter answer, of several; none: the base
  /adapter A=0.7 B=0.3    let a linear combination answer
  /adapter                list the adapters
  /quit                   leave (so does the end of the input)

examples:
  qlora-kit chat runs/quickstart --base
  qlora-kit chat runs/home_assistant --prompt "turn on the kitchen light"
  qlora-kit chat runs/quickstart --adapter home=runs/home_assistant
"""
_COMMANDS = "known are /reset, /base, /adapter and /quit"


def _parser() -> Parser:
    parser = Parser("chat", "TARGET [--prompt TEXT] [--base] [options]", _ABOUT, _EXAMPLES)
    parser.add_argument("target", help="a model, an adapter folder, or the folder of a run")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this one question and stop")
    parser.add_argument("--base", action="store_true", help="show the base's answer as well")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="load this adapter as well, on the same base; may be repeated. TARGET answers first",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: as in the run)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest"
    )
    add_loading_arguments(parser)
    return parser


class Conversation:
    """A model, and what it and the user said so far."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        adapter: "AttachedAdapter | AdapterBank | None",
        options: argparse.Namespace,
        write: Callable[[str], object],
    ) -> None:
        """Start without history.

        Args:
            model: a causal language model.
            tokenizer: given the plain chat template if it has none.
            adapter: attached to the model, or several; None without one.
            options: the flags of the command.
            write: takes text as it comes.
        """
        from qlora_kit.train.data.templates import install_template

        install_template(tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.options = options
        self.write = write
        self.show_base = bool(options.base)
        self.histories: dict[str, list[dict[str, str]]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        start = [{"role": "system", "content": self.options.system}] if self.options.system else []
        self.histories = {"base": list(start), "model": list(start)}

    def toggle_base(self) -> None:
        """Switch the base's answers on or off."""
        self.need_adapter()
        self.show_base = not self.show_base
        if self.show_base:
            self.histories["base"] = list(self.histories["model"])
        self.write(f"the base {'answers as well' if self.show_base else 'is silent'}\n")

    def need_adapter(self) -> None:
        """Refuse to compare with a base that is the model itself.

        Raises:
            ConfigError: there is no adapter.
        """
        if self.adapter is None:
            raise ConfigError(f"there is no adapter in {self.options.target} to compare with.")

    def switch(self, words: Sequence[str]) -> None:
        """Let another adapter, or a combination, answer from now on.

        Args:
            words: one name, or `name=weight` words; none: list what there is.

        Raises:
            ConfigError: there are not several adapters, or a weight is not a number.
        """
        from qlora_kit.adapters.multi_adapter.bank import AdapterBank

        bank = self.adapter
        if not isinstance(bank, AdapterBank):
            raise ConfigError("there is one adapter at most; load more with --adapter NAME=PATH.")
        name = " ".join(words)
        if "=" in name and name not in bank.names:
            bank.combine(name, dict(_weight(word) for word in words))
        if name:
            bank.use(None if name == "none" else name)
        others = [other for other in (*bank.names, "none") if other != (bank.active or "none")]
        self.write(f"{self._answering()} answers; there are also: {', '.join(others)}\n")

    def _answering(self) -> str:
        """Who answers besides the base."""
        from qlora_kit.adapters.multi_adapter.bank import AdapterBank

        if isinstance(self.adapter, AdapterBank):
            return self.adapter.active or "the base"
        return "adapter"

    def ask(self, question: str) -> None:
        """Answer a question and remember both.

        Args:
            question: what the user said.
        """
        if self.show_base:
            self.write("base: ")
            self._answer("base", question)
            self.write(f"{self._answering()}: ")
        self._answer("model", question)

    def _answer(self, who: str, question: str) -> None:
        from qlora_kit.train.generate import generate_stream

        history = [*self.histories[who], {"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(
            history, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        pieces = []
        for piece in generate_stream(
            self.model,
            self.tokenizer,
            prompt,
            max_new_tokens=self.options.max_new_tokens,
            temperature=self.options.temperature,
            adapter=self.adapter,
            base=who == "base",
        ):
            self.write(piece)
            pieces.append(piece)
        self.write("\n")
        answer = "".join(pieces).strip()
        self.histories[who] = [*history, {"role": "assistant", "content": answer}]


def run(argv: Sequence[str]) -> int:
    """Talk; see `qlora-kit chat --help`.

    Args:
        argv: the words after `qlora-kit chat`.

    Returns:
        0.

    Raises:
        ConfigError: the target is a classifier, or has no base to compare with.
    """
    options = _parser().parse_args(argv)
    setup_logging()
    target = resolve_target(options.target, options)
    if target.task != "causal_lm":
        raise ConfigError(f"{options.target} is a classifier; measure it with `qlora-kit eval`.")
    run = run_settings(options.target)
    if options.system is None and run is not None:
        options.system = run.data.system_prompt
    others = named_adapters(options.adapter)
    conversation = Conversation(*load_target(target, options, others), options, _write)
    if options.base:
        conversation.need_adapter()
    if options.prompt is not None:
        conversation.ask(options.prompt)
        return 0
    also = ", /adapter" if others else ""
    print(f"ask something; /reset, /base{also} or /quit", file=sys.stderr)
    while (line := _read()) is not None:
        _react(conversation, line)
    return 0


def _react(conversation: Conversation, line: str) -> None:
    """Obey or answer one line; a mistake does not end the conversation."""
    commands = {"/reset": conversation.reset, "/base": conversation.toggle_base}
    try:
        if line in commands:
            commands[line]()
        elif line.split()[:1] == ["/adapter"]:
            conversation.switch(line.split()[1:])
        elif line.startswith("/"):
            print(f"{line}: {_COMMANDS}", file=sys.stderr)
        elif line:
            conversation.ask(line)
    except UserError as error:
        print(f"{error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)


def _weight(word: str) -> tuple[str, float]:
    name, _, number = word.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise ConfigError(f"a combination is NAME=WEIGHT NAME=WEIGHT ..., got {word!r}.") from error


def _read() -> str | None:
    """One line of the user; None to leave."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
