"""From what a user writes (a folder, a file, a hub id) to a local path.

A local path always wins over a hub id of the same spelling. Text that can only
be a path (it starts with `.`, `/` or `~`, or is no valid hub id) is never looked
up on the hub: a typing error would otherwise end as a network error. The hub is
asked only for what loading reads (safetensors, JSON, tokenizer files), not for
the pickles, ONNX exports and original-format copies many repositories also hold.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from qlora_kit.core.errors import SourceError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./-]+\.gguf)")
ALLOW = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*")
IGNORE = ("*/*", "consolidated*", "adapter_model*", "pytorch_model*")


def locate(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Find a local folder or GGUF file, downloading from the hub if it is an id.

    Args:
        path_or_id: a folder, a `.gguf` file, a hub id such as `org/model`, or one GGUF
            file of a hub repository, `org/model/file.gguf`.
        revision: branch, tag or commit of a hub id.
        offline: True: use only what the hub cache already holds. None: as
            HF_HUB_OFFLINE says.
        cache_dir: hub cache folder; the hub library's own by default.

    Returns:
        An existing folder or file.

    Raises:
        SourceError: nothing is there, or the hub cannot provide it.

    Example:
        >>> locate(".").is_dir()
        True
    """
    text = os.fspath(path_or_id)
    path = Path(text).expanduser()
    if path.exists():
        return path
    file_match = HUB_FILE.fullmatch(text)
    is_id = HUB_ID.fullmatch(text) and not text.lower().endswith((".gguf", ".safetensors", ".bin"))
    if isinstance(path_or_id, Path) or not (is_id or file_match):
        raise SourceError(f"{text!r} does not exist.{_nearest(path)}")
    if file_match:
        return _from_hub(file_match[1], text, revision, offline, cache_dir, file=file_match[2])
    return _from_hub(text, text, revision, offline, cache_dir)


def _from_hub(
    repo: str,
    text: str,
    revision: str | None,
    offline: bool | None,
    cache_dir: str | Path | None,
    file: str | None = None,
) -> Path:
    """Download, or find in the hub cache, a repository's files or one of them."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    local_only = constants.HF_HUB_OFFLINE if offline is None else offline
    options: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_only,
    }
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, **options))
        options |= {"allow_patterns": list(ALLOW), "ignore_patterns": list(IGNORE)}
        return Path(snapshot_download(repo, **options))
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        advice = _advice(error, revision, file, local_only)
        raise SourceError(f"cannot get {text!r}: {advice}{_nearest(Path(text))}") from error


def _advice(error: Exception, revision: str | None, file: str | None, local_only: bool) -> str:
    """What went wrong on the hub, and what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too
        return (
            "the repository is gated. Accept its terms on its hub page, then log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the hub has no such repository, or it is private. Check the spelling, log in with "
            "`hf auth login` if it is private, or name a local folder."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}."
    if isinstance(error, LocalEntryNotFoundError):  # an EntryNotFoundError too
        return _unreachable(local_only)
    if isinstance(error, EntryNotFoundError):
        return f"the repository has no file {file!r}."
    return f"the hub answered with an error: {error}"


def _unreachable(local_only: bool) -> str:
    """What to do when the hub was not, or could not be, asked."""
    if local_only:
        return (
            "it is no local path and not in the hub cache, and offline mode is on "
            "(HF_HUB_OFFLINE or offline=True). Download it once online, or name a local folder."
        )
    return (
        "it is no local path, not in the hub cache, and the hub cannot be reached. Check the "
        "connection (HF_ENDPOINT names a mirror), or name a local folder."
    )


def _nearest(path: Path) -> str:
    """Point at the sibling whose name is closest, if one is close."""
    parent = path.expanduser().parent
    while not parent.is_dir():
        if parent == parent.parent:
            return ""
        path, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f" The nearest name there is {str(parent / close[0])!r}."
    return ""
