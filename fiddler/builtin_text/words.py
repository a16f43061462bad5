"""Word lists of the invented world that the built-in model learns, read from ``words.txt``."""

from pathlib import Path
from typing import Final

Words = tuple[str, ...]


def _read_lists() -> dict[str, Words]:
    """Return the lists of ``words.txt`` by name; the item "-" stands for an empty one."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    lists: dict[str, Words] = {}
    for paragraph in text.split("\n\n")[1:]:
        name, _, items = paragraph.partition(":\n")
        parts = [item.strip() for item in items.replace("\n", " ").split("|")]
        lists[name.strip()] = tuple("" if part == "-" else part for part in parts)
    return lists


_LISTS = _read_lists()

NAMES: Final = _LISTS["names"]
TOWN_STARTS: Final = _LISTS["town_starts"]
TOWN_ENDS: Final = _LISTS["town_ends"]
COLOURS: Final = _LISTS["colours"]
OBJECTS: Final = _LISTS["objects"]
ANIMALS: Final = _LISTS["animals"]
JOBS: Final = _LISTS["jobs"]
FOODS: Final = _LISTS["foods"]
SPORTS: Final = _LISTS["sports"]
PLACES: Final = _LISTS["places"]
ADJECTIVES: Final = _LISTS["adjectives"]
FEELINGS: Final = _LISTS["feelings"]
VERBS: Final = _LISTS["verbs"]
PREPOSITIONS: Final = _LISTS["prepositions"]
WEATHER: Final = _LISTS["weather"]
TIMES: Final = _LISTS["times"]
THINGS: Final = _LISTS["things"]
# syllables of invented words and names: the reader must copy them, it cannot know them
ONSETS: Final = _LISTS["onsets"]
VOWELS: Final = _LISTS["vowels"]
CODAS: Final = _LISTS["codas"]
# common words that no task is about, to be copied, reversed, spelled and told of
COMMON: Final = _LISTS["common"]
# questions beyond the model: it answers honestly that it is too small
BEYOND_TOPICS: Final = _LISTS["beyond_topics"]
BEYOND_FORMS: Final = _LISTS["beyond_forms"]
BEYOND_FIXED: Final = _LISTS["beyond_fixed"]
# what a placeholder of the prose templates stands for
BY_FIELD: Final = {
    "adjective": ADJECTIVES,
    "animal": ANIMALS,
    "colour": COLOURS,
    "feeling": FEELINGS,
    "food": FOODS,
    "job": JOBS,
    "object": OBJECTS,
    "place": PLACES,
    "preposition": PREPOSITIONS,
    "things": THINGS,
    "time": TIMES,
    "verb": VERBS,
    "weather": WEATHER,
}
