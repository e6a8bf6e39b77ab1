"""The folder of one run: what lies where, and when it may be written to.

    adapter/        the result, in PEFT's format
    merged/         the merged model, if asked for
    checkpoints/    what a resume needs
    logs/           TensorBoard
    config.json     the run as it was started
    before.json     the base's measurements, so that a resumed run does not repeat them
    run.json        the record: written last, so its presence means "finished"
    report.html     the same for people

A finished run is never written over by accident, and an interrupted one is never
started afresh by accident.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_kit.core.atomic import atomic_write_text
from qlora_kit.core.errors import ConfigError, FormatError
from qlora_kit.core.log import logger
from qlora_kit.train.checkpoints import whole_checkpoints
from qlora_kit.train.config import RunConfig

_MAY_CHANGE = ("output", "resume", "overwrite", "export", "eval")
"""Parts of a run that do not decide what is learnt."""


class Workspace:
    """Paths of a run's folder.

    Example:
        >>> Workspace(Path("runs/demo")).report.as_posix()
        'runs/demo/report.html'
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is created.

        Args:
            folder: of the run.
        """
        self.folder = folder
        self.adapter = folder / "adapter"
        self.merged = folder / "merged"
        self.checkpoints = folder / "checkpoints"
        self.logs = folder / "logs"
        self.config = folder / "config.json"
        self.before = folder / "before.json"
        self.record = folder / "run.json"
        self.report = folder / "report.html"

    def outputs(self, *, merged: bool) -> dict[str, str | None]:
        """Where results lie, for the record.

        Args:
            merged: whether there is a merged model.

        Returns:
            Name to path.
        """
        return {
            "adapter": str(self.adapter),
            "merged": str(self.merged) if merged else None,
            "record": str(self.record),
            "report": str(self.report),
        }

    def check(self, config: RunConfig) -> None:
        """Refuse a run that would destroy something; touches nothing.

        Args:
            config: the run; `resume` and `overwrite` decide what is allowed.

        Raises:
            ConfigError: the folder holds a finished run, or an interrupted one that is
                neither resumed nor overwritten, or there is nothing to resume.
        """
        if config.overwrite and not config.resume:
            return
        finished = self.record.exists()
        interrupted = not finished and bool(whole_checkpoints(self.checkpoints))
        if finished:
            raise ConfigError(
                f"{self.folder} holds a finished run. Choose another output, or set "
                "overwrite=true to replace it."
            )
        if config.resume and not interrupted:
            raise ConfigError(
                f"there is nothing to resume in {self.folder}: no whole checkpoint. Start without "
                "resume, or name the output of the interrupted run."
            )
        if interrupted and not config.resume:
            raise ConfigError(
                f"{self.folder} holds an interrupted run. Set resume=true to continue it, or "
                "overwrite=true to start again."
            )

    def open(self, config: RunConfig) -> None:
        """Make the folder ready for a run that `check` has passed.

        Args:
            config: the run; without `resume`, what an earlier run wrote is removed.
        """
        if config.resume:
            self._warn_about_changes(config)
            return
        self._clear()
        atomic_write_text(self.config, json.dumps(asdict(config), indent=1) + "\n")

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        for folder in (self.adapter, self.merged, self.checkpoints, self.logs):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.before, self.record, self.report):
            file.unlink(missing_ok=True)

    def _warn_about_changes(self, config: RunConfig) -> None:
        if not self.config.is_file():
            return
        before = json.loads(self.config.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(asdict(config)))
        changed = [
            name for name in changed_fields(before, now) if name.split(".")[0] not in _MAY_CHANGE
        ]
        if changed:
            logger.warning(
                "resuming with other settings than the run was started with (%s): the result will "
                "differ from an uninterrupted run.",
                ", ".join(changed),
            )

    def read_before(self) -> list[dict[str, Any]] | None:
        """Read the base's measurements of an interrupted run.

        Returns:
            What `before.json` holds, or None if there is none.

        Raises:
            FormatError: the file is damaged.
        """
        if not self.before.is_file():
            return None
        try:
            found: list[dict[str, Any]] = json.loads(self.before.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(
                f"{self.before} is not JSON: {error}. Remove it; the base is measured again."
            ) from error
        return found


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the fields in which two nested settings differ.

    Args:
        before: nested dictionaries of plain values.
        now: the same.

    Returns:
        Dotted names, sorted.

    Example:
        >>> changed_fields({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
        ['a.c']
    """
    names = []
    for key in sorted({*before, *now}):
        left, right = before.get(key), now.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += [f"{key}.{name}" for name in changed_fields(left, right)]
        elif left != right:
            names.append(key)
    return names
