"""The table of tasks with their shares of the dialogues."""

from collections.abc import Callable
from random import Random

from scripts.tiny.dialogue import Dialogue
from scripts.tiny.facts import ask_without_facts, facts
from scripts.tiny.letters import copy, reverse, spell
from scripts.tiny.numbers import add, compare, multiply, subtract
from scripts.tiny.passkeys import passkey
from scripts.tiny.tales import tale
from scripts.tiny.talk import beyond, talk

# task -> (share of dialogues, writer)
TASKS: dict[str, tuple[float, Callable[[Random], Dialogue]]] = {
    "add": (0.13, add),
    "subtract": (0.13, subtract),
    "multiply": (0.07, multiply),
    "compare": (0.07, compare),
    "copy": (0.06, copy),
    "reverse": (0.08, reverse),
    "spell": (0.1, spell),
    "facts": (0.16, facts),
    "nofacts": (0.01, ask_without_facts),
    "passkey": (0.05, passkey),
    "story": (0.04, tale),
    "talk": (0.04, talk),
    "beyond": (0.04, beyond),
}
