"""The table of tasks with their shares of the dialogues."""

from collections.abc import Callable
from random import Random

from fiddler.builtin_text.dialogue import Dialogue
from fiddler.builtin_text.facts import ask_without_facts, facts
from fiddler.builtin_text.letters import copy, reverse, spell
from fiddler.builtin_text.numbers import add, compare, multiply, subtract
from fiddler.builtin_text.passkeys import passkey
from fiddler.builtin_text.tales import tale
from fiddler.builtin_text.talk import beyond, talk
from fiddler.builtin_text.user import about_user

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
