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
from scripts.tiny.user import about_user

# task -> (share of dialogues, writer)
TASKS: dict[str, tuple[float, Callable[[Random], Dialogue]]] = {
    "add": (0.11, add),
    "subtract": (0.11, subtract),
    "multiply": (0.06, multiply),
    "compare": (0.06, compare),
    "copy": (0.07, copy),
    "reverse": (0.08, reverse),
    "spell": (0.09, spell),
    "facts": (0.22, facts),
    "nofacts": (0.01, ask_without_facts),
    "user": (0.04, about_user),
    "passkey": (0.04, passkey),
    "story": (0.04, tale),
    "talk": (0.04, talk),
    "beyond": (0.04, beyond),
}
