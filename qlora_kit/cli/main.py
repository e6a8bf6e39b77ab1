"""`qlora-kit`: finds the command, runs it, and turns errors into exit codes.

Nothing heavy is imported here: `qlora-kit --help` has to answer at once, so each
command lives in a module of its own that is imported when it is called.

Exit codes: 0 done, 2 the user's input has to change, 1 a bug of ours. A user's
error is one message without a traceback; `--debug` or `QLORA_KIT_DEBUG=1` shows
the traceback as well.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from types import TracebackType

from qlora_kit.core.allocator import use_growing_segments
from qlora_kit.core.errors import ConfigError, UserError

COMMANDS = {
    "train": "fine-tune a model as a YAML file says",
    "plan": "predict memory and speed of a run, and what fits a card",
    "eval": "measure a model or an adapter on any data file",
    "chat": "talk to a model or an adapter",
    "merge": "write the adapter into the base's weights",
    "search": "find the best structures in a trained GLoRA super-net",
    "preview": "show training examples token by token, with the loss mask",
    "inspect": "look into adapters: subspaces, amplification, spectra, sweeps",
    "bench": "measure memory and speed of every method on this machine",
    "doctor": "check this machine and this installation",
    "version": "print versions",
}
"""Command to what it does; `qlora_kit.cli.<command>` holds `run(argv) -> int`."""

_HELP = """\
usage: qlora-kit COMMAND [ARGUMENTS]
       qlora-kit COMMAND --help

Fine-tune large language models on one GPU: a 4-bit NF4 base, LoRA methods,
honest merging.

commands:
{commands}

options:
  -h, --help   show this text
  --version    print the version
  --debug      after any command: show the traceback of an error

Start with `qlora-kit train --help` and examples/quickstart.yaml.
"""
_BUG = (
    "qlora-kit stopped on an error of its own, not of your input. Please report it: what you ran, "
    "the lines above, and the output of `qlora-kit doctor` (CONTRIBUTING.md, 'Reporting a bug')."
)


def help_text() -> str:
    """The text of `qlora-kit --help`."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return _HELP.format(commands="\n".join(lines))


def run_command(argv: Sequence[str]) -> int:
    """Run one command line; errors are raised, not printed.

    Args:
        argv: the words after `qlora-kit`.

    Returns:
        The exit code of the command.

    Raises:
        ConfigError: there is no such command.
    """
    if not argv:
        print(help_text(), end="", file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if name in ("-V", "--version"):
        name, rest = "version", ["--short"]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ConfigError(
            f"there is no command {name!r}.{hint} Known: {', '.join(COMMANDS)}. "
            "See `qlora-kit --help`."
        )
    code: int = import_module(f"qlora_kit.cli.{name}").run(rest)
    return code


def main(argv: Sequence[str]) -> int:
    """Run one command line and report a user's error as one message.

    Args:
        argv: the words after `qlora-kit`.

    Returns:
        0, 2 after a user's error, or 130 when interrupted.

    Example:
        >>> main(["version", "--short"])
        0.1.0
        0
    """
    words = [word for word in argv if word != "--debug"]
    debug = len(words) < len(argv) or os.environ.get("QLORA_KIT_DEBUG", "0") not in ("", "0")
    try:
        return run_command(words)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"qlora-kit: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a missing file, a full disk, a refused download
        if debug:
            traceback.print_exc()
        print(f"qlora-kit: {error} (--debug shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("\nqlora-kit: interrupted", file=sys.stderr)
        return 130


def _report_bug(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an unexpected error and where to send it (Python then exits with 1)."""
    traceback.print_exception(kind, error, trace)
    print(f"\n{_BUG}", file=sys.stderr)


def entry() -> None:
    """Entry point of the console script."""
    sys.excepthook = _report_bug
    # Before torch is imported: threads that wait for each other sleep instead of spinning. That
    # costs speed on an idle CPU and saves a shared one from collapse: docs/decisions/0007.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.argv[1:2] != ["bench"]:  # its processes choose: other libraries run as they come
        use_growing_segments()
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
