"""Voice commands and the JSON they mean, from Home Assistant's English templates.

Every pair is a sampled sentence and a compact JSON object: the intent, the slots
the sentence filled and the slots its template fixes, by name in alphabetical
order. Rooms, devices and free texts, which a real home would bring, come from the
lists below. Everything follows from the seed.

Two held-out sets ask two questions. `test_seen`: new commands of templates that
also occur in training. `test_unseen`: commands of templates that do not occur at
all, which is much harder. No command is in two sets, and a command that could mean
two things is in none.
"""

import json
import random
from collections.abc import Mapping
from typing import Any

from sentence_templates import Node, Value, parse, sample

Pair = dict[str, str]
PER_TEMPLATE = 12  # about 10,100 pairs in all
UNSEEN_SHARE = 0.08
SEEN_PER_TEMPLATE = 1
_DRAWS = 60  # per template; short templates have fewer different sentences

AREAS = (
    "kitchen", "living room", "bedroom", "bathroom", "hallway", "office", "garage", "garden",
    "dining room", "guest room", "attic", "basement", "laundry room", "kids room", "balcony",
)  # fmt: skip
FLOORS = ("ground", "first", "second", "upper", "lower", "top")
NAMES: dict[str, tuple[str, ...]] = {
    "light": ("bedside lamp", "desk lamp", "ceiling light", "floor lamp", "porch light",
              "fairy lights", "night light", "mirror light"),
    "switch": ("coffee machine", "heater", "christmas tree", "water pump", "kettle"),
    "fan": ("ceiling fan", "tower fan", "extractor fan"),
    "cover": ("left curtain", "roller shutter", "garage door", "skylight", "patio awning"),
    "lock": ("front door", "back door", "shed door", "side gate"),
    "valve": ("sprinkler valve", "main water valve", "radiator valve"),
    "climate": ("thermostat", "air conditioner", "heat pump"),
    "media_player": ("tv", "speaker", "soundbar", "radio", "projector"),
    "sensor": ("outdoor sensor", "power meter", "rain gauge"),
    "binary_sensor": ("smoke detector", "window sensor", "motion sensor"),
    "person": ("Alice", "Bob", "Carla", "Dmitri"),
    "weather": ("home forecast", "mountain weather", "beach weather"),
    "lawn_mower": ("lawn mower", "garden robot"),
    "vacuum": ("robot vacuum", "rosie", "upstairs vacuum"),
    "todo": ("groceries", "chores", "packing", "homework"),
    "scene": ("movie night", "party time", "good morning", "romantic"),
    "script": ("bedtime routine", "leaving home", "wake up"),
    "button": ("doorbell", "restart", "garage opener"),
    "input_button": ("panic", "feeder"),
    "input_boolean": ("guest mode", "vacation mode"),
}  # fmt: skip
FREE_TEXT: dict[str, tuple[str, ...]] = {
    "message": ("dinner is ready", "we are leaving in five minutes", "the bus is here",
                "please come downstairs", "the movie starts now"),
    "search_query": ("bohemian rhapsody", "jazz classics", "the daily news", "abbey road",
                     "miles davis", "space documentaries", "rain sounds"),
    "zone": ("school", "work", "the gym", "grandma's house"),
    "timer_name": ("pizza", "laundry", "tea", "workout", "egg", "nap"),
    "timer_command": ("turn off the lights", "open the garage door", "lock the front door",
                      "pause the music", "start the vacuum"),
    "shopping_list_item": ("milk", "eggs", "olive oil", "bread", "apples", "dish soap"),
    "todo_list_item": ("call the dentist", "water the plants", "buy stamps", "clean the oven",
                       "return the library books"),
}  # fmt: skip


def make_splits(intents: Mapping[str, Any], seed: int = 0) -> dict[str, list[Pair]]:
    """Sample pairs and part them into train, test_seen and test_unseen.

    Args:
        intents: the content of the package's `data/en.json`. Not modified.
        seed: of everything drawn.

    Returns:
        Rows {"prompt": command, "completion": JSON} by split, shuffled.

    Example:
        >>> tiny = {"intents": {"Stop": {"data": [{"sentences": ["stop [it]"]}]}},
        ...         "lists": {}, "expansion_rules": {}}
        >>> splits = make_splits(tiny)
        >>> sorted(row["prompt"] for rows in splits.values() for row in rows)
        ['stop', 'stop it']
    """
    generator = random.Random(seed)
    by_template = _unambiguous(_draw_all(intents, generator))
    unseen = _unseen_templates(by_template, generator)
    splits: dict[str, list[Pair]] = {"train": [], "test_seen": [], "test_unseen": []}
    for template, (_, pairs) in by_template.items():
        rows = [{"prompt": said, "completion": meant} for said, meant in pairs.items()]
        if template in unseen:
            splits["test_unseen"] += rows
            continue
        held_out = SEEN_PER_TEMPLATE if len(rows) > 3 else 0
        splits["test_seen"] += rows[:held_out]
        splits["train"] += rows[held_out:]
    for rows in splits.values():
        generator.shuffle(rows)
    return splits


_Drawn = dict[str, tuple[str, dict[str, str]]]  # template -> (intent, {command: JSON})


def _draw_all(
    intents: Mapping[str, Any], generator: random.Random
) -> list[tuple[str, str, str, str]]:
    """(template, intent, command, JSON) of every draw; the same sentence may recur."""
    rules = {name: parse(text) for name, text in intents["expansion_rules"].items()}
    drawn: list[tuple[str, str, str, str]] = []
    for intent, content in sorted(intents["intents"].items()):
        for block in content["data"]:
            filler = _Filler(intents["lists"], rules, _names(block))
            for template in block["sentences"]:
                tree = parse(template)
                found: dict[str, str] = {}
                for _ in range(_DRAWS):
                    said, slots = sample(tree, rules, filler, generator)
                    meaning = {
                        "intent": intent,
                        **dict(sorted((block.get("slots", {}) | slots).items())),
                    }
                    found.setdefault(said, json.dumps(meaning, separators=(",", ":")))
                    if len(found) == PER_TEMPLATE:
                        break
                drawn += [(template, intent, said, meant) for said, meant in found.items()]
    return drawn


def _unambiguous(drawn: list[tuple[str, str, str, str]]) -> _Drawn:
    """Group by template; each command once, and only if it means one thing."""
    meanings: dict[str, set[str]] = {}
    for _, _, said, meant in drawn:
        meanings.setdefault(said, set()).add(meant)
    by_template: _Drawn = {}
    taken: set[str] = set()
    for template, intent, said, meant in drawn:
        if len(meanings[said]) == 1 and said not in taken:
            taken.add(said)
            by_template.setdefault(template, (intent, {}))[1][said] = meant
    return by_template


def _unseen_templates(by_template: _Drawn, generator: random.Random) -> set[str]:
    """Templates to hold out whole; every intent keeps most of its own."""
    by_intent: dict[str, list[str]] = {}
    for template, (intent, _) in by_template.items():
        by_intent.setdefault(intent, []).append(template)
    unseen: set[str] = set()
    for templates in by_intent.values():
        count = round(len(templates) * UNSEEN_SHARE + generator.random() - 0.5)
        unseen.update(generator.sample(templates, min(count, len(templates) - 1)))
    return unseen


def _names(block: Mapping[str, Any]) -> tuple[str, ...]:
    """Device names that suit a block of templates."""
    wanted = block.get("requires_context", {}).get("domain") or list(NAMES)
    wanted = [wanted] if isinstance(wanted, str) else wanted
    return tuple(name for domain in wanted for name in NAMES.get(domain, ()))


class _Filler:
    """Chooses list entries for `sample`."""

    def __init__(
        self, lists: Mapping[str, Any], rules: Mapping[str, Node], names: tuple[str, ...]
    ) -> None:
        self._lists = lists
        self._rules = rules
        self._names = names

    def __call__(self, name: str, generator: random.Random) -> tuple[str, Value]:
        own = {"area": AREAS, "floor": FLOORS, "name": self._names, **FREE_TEXT}
        if name in own:
            word = generator.choice(own[name])
            return word, word
        content = self._lists[name]
        if "range" in content:
            return _number(content["range"], generator)
        entry = generator.choice(content["values"])
        said, _ = sample(parse(entry["in"]), self._rules, self, generator)
        return said, entry["out"]


def _number(content: Mapping[str, Any], generator: random.Random) -> tuple[str, Value]:
    if content.get("type") == "temperature":  # people ask for room temperatures
        number: float = generator.randrange(30, 61) / 2 if "fractions" in content else 20
    else:
        number = generator.randrange(content["from"], content["to"] + 1, content.get("step", 1))
    value = number * content.get("multiplier", 1)
    return f"{number:g}", int(value) if value == int(value) else value
