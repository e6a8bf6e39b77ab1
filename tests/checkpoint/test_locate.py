"""Paths and hub ids: local first, no network for what can only be a path."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from qlora_kit.checkpoint.locate import locate
from qlora_kit.core.errors import SourceError


@pytest.fixture
def hub(monkeypatch):
    """Replace the download functions; `calls` records what they were asked."""

    class Hub:
        def __init__(self):
            self.calls = []
            self.result = None

        def __call__(self, *args, **options):
            self.calls.append((args, options))
            if isinstance(self.result, Exception):
                raise self.result
            return self.result

    double = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", double)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", double)
    return double


def test_local_paths_win(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert locate("org/model") == Path("org/model")
    assert locate(tmp_path) == tmp_path
    assert hub.calls == []


@pytest.mark.parametrize(
    "text",
    ["./llama", "/no/such", "~/no-such-folder", "a/b/c", "llama.gguf", "x y", "org/m.safetensors"],
)
def test_what_can_only_be_a_path_is_never_looked_up(hub, text):
    with pytest.raises(SourceError, match="does not exist"):
        locate(text)
    with pytest.raises(SourceError, match="does not exist"):
        locate(Path("org/model"))
    assert hub.calls == []


def test_the_nearest_local_name_is_offered(tmp_path, hub):
    (tmp_path / "SmolLM2-135M").mkdir()
    with pytest.raises(SourceError, match=r"nearest name there is '.*SmolLM2-135M'"):
        locate(tmp_path / "SmolLM-135M")
    with pytest.raises(SourceError, match=r"nearest name there is '.*SmolLM2-135M'"):
        locate(str(tmp_path / "SmolLM2-135" / "model" / "deep"))


def test_a_hub_id_downloads_only_what_is_read(hub, tmp_path):
    hub.result = str(tmp_path)
    assert locate("org/model", revision="v1", cache_dir="c") == tmp_path
    (repo,), options = hub.calls[0]
    assert repo == "org/model"
    assert options["revision"] == "v1"
    assert options["cache_dir"] == "c"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern for pattern in options["allow_patterns"])


def test_one_gguf_file_of_a_repository(hub, tmp_path):
    hub.result = str(tmp_path / "f.gguf")
    assert locate("org/model/sub/f.gguf") == tmp_path / "f.gguf"
    assert hub.calls[0][0] == ("org/model", "sub/f.gguf")


@pytest.mark.parametrize(
    ("offline", "env", "expected"), [(None, True, True), (False, True, False), (True, False, True)]
)
def test_offline_is_honoured(hub, monkeypatch, tmp_path, offline, env, expected):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", env)
    hub.result = str(tmp_path)
    locate("org/model", offline=offline)
    assert hub.calls[0][1]["local_files_only"] is expected


def _http(kind):
    """Make a hub error without a response, whatever its constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, "the server's words")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "gated. Accept its terms"),
        (errors.RepositoryNotFoundError, "no such repository, or it is private"),
        (errors.RevisionNotFoundError, "no revision 'v9'"),
        (errors.LocalEntryNotFoundError, "hub cannot be reached"),
        (errors.RemoteEntryNotFoundError, "no file"),
        (errors.HFValidationError, "answered with an error"),
        (ConnectionError, "answered with an error"),
    ],
)
def test_each_hub_failure_says_what_to_do(hub, error, message):
    hub.result = _http(error)
    with pytest.raises(SourceError, match=message):
        locate("org/model", revision="v9", offline=False)


def test_offline_and_not_cached(hub):
    hub.result = _http(errors.LocalEntryNotFoundError)
    with pytest.raises(SourceError, match="offline mode is on"):
        locate("org/model", offline=True)


def test_the_real_library_offline(tmp_path):
    with pytest.raises(SourceError, match="not in the hub cache, and offline mode is on"):
        locate("qlora-kit-tests/none-such", offline=True, cache_dir=tmp_path)
