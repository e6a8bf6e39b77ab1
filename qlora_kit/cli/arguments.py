"""The argument parser of the small commands: argparse with our manners.

Unknown options are refused with the nearest known one, abbreviations are off
(they change meaning when an option is added), errors are `ConfigError`s instead
of an exit, and help fits into 80 columns. `train` and `preview` read their flags
from the run schema instead: see `run_config.py`.
"""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from qlora_kit.core.errors import ConfigError

WIDTH = 79
"""Columns that help text may fill."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Suggest a known name for an unknown one.

    Args:
        name: what was given.
        known: what would have been understood.

    Returns:
        A sentence with a leading space, empty when nothing is near.

    Example:
        >>> nearest("--adaptor", ["--adapter", "--data"])
        ' Did you mean --adapter?'
    """
    near = get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help text of a fixed width, on any terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=WIDTH, max_help_position=26)


class Parser(argparse.ArgumentParser):
    """Parser of one command.

    Args:
        command: name after `qlora-kit`.
        words: what follows the command in the usage line.
        description: what the command does, in lines of at most 79 columns.
        epilog: examples, likewise.
    """

    def __init__(self, command: str, words: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"qlora-kit {command}",
            usage=f"qlora-kit {command} {words}".rstrip(),
            description=description,
            epilog=epilog or None,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parse all words.

        Args:
            args: the words after the command.
            namespace: not used; here to match argparse.

        Returns:
            The options.

        Raises:
            ConfigError: a word is not understood.
        """
        known = [name for action in self._actions for name in action.option_strings]
        for word in args or ():  # before argparse complains that another one is missing
            name = word.split("=")[0]
            if name.startswith("--") and name not in known:
                raise ConfigError(
                    f"{name} is not a known flag.{nearest(name, known)} See `{self.prog} --help`."
                )
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise ConfigError(f"cannot place {unknown[0]!r}. See `{self.prog} --help`.")
        return options

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Args:
            message: argparse's words.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}. See `{self.prog} --help`.")
