"""Plans from a hub id: configurations in a cache laid out as huggingface_hub does, no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plan.shapes import llama

NAME = "someone/small-llama"
_PROGRAM = """\
import json, sys

def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"the network was asked: {event} {arguments}")

sys.addaudithook(no_network)
import qlora_kit as qk
from qlora_kit.cli.main import main

words = ["plan", sys.argv[1], "--seq", "128", "--batch", "2", "--gpu", "l4", "--json"]
code = main([*words, "--budget", "4GiB", *sys.argv[2:]])
found = qk.plan(sys.argv[1], seq=128, batch=2, optimizer="adamw_torch", gpu="l4", budget="4GiB")
print(json.dumps({"code": code, "peak": found.run.peak_bytes}))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """`main` of a model has two layers, the tag `old` one; neither has weights."""
    hub = tmp_path_factory.mktemp("hub")
    home = hub / f"models--{NAME.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    for name, commit, layers in (("main", "a" * 40, 2), ("old", "b" * 40, 1)):
        snapshot = home / "snapshots" / commit
        llama(layers).save_pretrained(snapshot)
        blob = home / "blobs" / commit[:32]
        blob.parent.mkdir(exist_ok=True)
        (snapshot / "config.json").rename(blob)
        (snapshot / "config.json").symlink_to(blob)
        assert [path.name for path in snapshot.iterdir()] == ["config.json"]
        (home / "refs" / name).write_text(commit)
    return hub


def planned(cache: Path, *words: str, name: str = NAME) -> subprocess.CompletedProcess[str]:
    """A fresh process, as whoever types the command has one; it must not ask the network."""
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH")))
        ),
    }
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, name, *words],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str]) -> tuple[dict, dict]:
    assert done.returncode == 0, done.stderr
    decoder, text = json.JSONDecoder(), done.stdout.strip()
    first, end = decoder.raw_decode(text)
    return first, json.loads(text[end:])


def test_a_cached_hub_id_is_planned(cache):
    """By the command and from Python; a tag's one layer is less than `main`'s two."""
    said, ended = told(planned(cache))
    made = said["run"]
    assert ended == {"code": 0, "peak": made["peak_bytes"]}
    assert made["peak_bytes"] == sum(made["components_bytes"].values())
    old, same = told(planned(cache, "--model.revision", "old"))
    weights = old["run"]["components_bytes"]["weights"]
    assert made["components_bytes"]["weights"] == 2 * weights
    assert same == ended


def test_what_is_not_cached_is_refused(cache):
    done = planned(cache, name="someone/large-llama")
    assert "no hub id that can be reached or is in the cache" in done.stderr
    assert "network was asked" not in done.stderr + done.stdout
