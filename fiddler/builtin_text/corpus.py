"""The synthetic corpus of the built-in model: seeded conversations and held-out questions.

Training and held-out dialogues are disjoint by their content: one content in twenty, chosen by a
hash, never appears in training in any wording. Everything here is pure: same seed, same text.
"""

from random import Random
from zlib import crc32

from fiddler.builtin_text import passkeys
from fiddler.builtin_text.dialogue import Dialogue
from fiddler.builtin_text.facts import statements_only
from fiddler.builtin_text.prose import filler, random_cast, story
from fiddler.builtin_text.tasks import TASKS

Message = dict[str, str]
Question = tuple[list[Message], str, str]
"""(messages up to the question, expected answer, task); see ``is_correct``."""

HELDOUT_ONE_IN = 20
_SYSTEM_PROMPTS = (
    "You are fiddler, a small model.",
    "You are a helpful assistant.",
    "You are the small model built into fiddler.",
    "Answer briefly.",
    "Be polite and brief.",
    "You are a friendly assistant. Answer truthfully.",
    "You answer questions.",
    "You are a careful assistant.",
    "Please help the user.",
    "Answer in one sentence.",
)
# tasks that state facts: two of them in one conversation would contradict each other
_STATES_FACTS = frozenset({"facts", "nofacts", "user", "passkey"})
_NUM_DIALOGUES = (1, 1, 1, 1, 2, 2, 3, 4, 6, 12)


def is_heldout(key: str) -> bool:
    """Whether the content ``key`` is kept out of training."""
    return crc32(key.encode()) % HELDOUT_ONE_IN == 0


def sample_dialogue(rng: Random, task: str, *, heldout: bool = False) -> Dialogue:
    """Return a dialogue of ``task`` from the training or the held-out side of the split."""
    write = TASKS[task][1]
    while True:
        dialogue = write(rng)
        if is_heldout(dialogue.key) == heldout:
            return dialogue


def sample_conversation(rng: Random) -> list[Message]:
    """Return a training conversation of one to twelve dialogues, their turns interleaved."""
    tasks = _choose_tasks(rng)
    dialogues = [sample_dialogue(rng, task) for task in tasks]
    system = " ".join(d.system for d in dialogues if d.system)
    if rng.random() < 0.3:
        system = f"{rng.choice(_SYSTEM_PROMPTS)} {system}".strip()
    messages = [_message("system", system)] if system else []
    queues = [list(d.turns) for d in dialogues]
    while queues:
        queue = rng.choice(queues)
        user, reply = queue.pop(0)
        messages += [_message("user", user), _message("assistant", reply)]
        queues = [q for q in queues if q]
    return messages


def sample_text(rng: Random) -> str:
    """Return a passage of plain prose: a story, filler, or facts."""
    form = rng.randrange(3)
    if form == 0:
        return story(rng, random_cast(rng))
    if form == 1:
        return filler(rng, rng.randrange(3, 20))
    return statements_only(rng)


def heldout(n: int, seed: int) -> list[Question]:
    """Return ``n`` questions whose content never occurs in training, the tasks in turn."""
    names = [task for task in TASKS if task != "nofacts"]
    questions = []
    for i in range(n):
        rng = Random(f"heldout/{seed}/{i}")
        dialogue = sample_dialogue(rng, names[i % len(names)], heldout=True)
        questions.append(_question(rng, dialogue))
    return questions


def heldout_conversations(n: int, seed: int) -> list[list[Message]]:
    """Return ``n`` conversations with their answers, of contents and tasks as in ``heldout``."""
    names = [task for task in TASKS if task != "nofacts"]
    conversations = []
    for i in range(n):
        rng = Random(f"conversation/{seed}/{i}")
        dialogue = sample_dialogue(rng, names[i % len(names)], heldout=True)
        conversations.append(_messages(rng, dialogue))
    return conversations


def heldout_passkeys(n: int, seed: int, sentences: int) -> list[Question]:
    """Return ``n`` held-out pass-keys in ``sentences`` sentences of about 13 tokens each."""
    questions = []
    for i in range(n):
        rng = Random(f"passkey/{seed}/{sentences}/{i}")
        dialogue = passkeys.passkey(rng, sentences)
        while not is_heldout(dialogue.key):
            dialogue = passkeys.passkey(rng, sentences)
        questions.append(_question(rng, dialogue))
    return questions


def is_correct(reply: str, expected: str, task: str) -> bool:
    """Whether ``reply`` answers: equal text, or for a story all expected words and an end."""
    reply = reply.strip()
    if task != "story":
        return reply == expected
    return reply.endswith("The end.") and all(word in reply for word in expected.split(", "))


def _choose_tasks(rng: Random) -> list[str]:
    names, shares = list(TASKS), [share for share, _ in TASKS.values()]
    chosen: list[str] = []
    for task in rng.choices(names, shares, k=rng.choice(_NUM_DIALOGUES)):
        if task not in _STATES_FACTS or _STATES_FACTS.isdisjoint(chosen):
            chosen.append(task)
    return chosen


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _question(rng: Random, dialogue: Dialogue) -> Question:
    *before, answer = _messages(rng, dialogue)
    return before, ", ".join(dialogue.keywords) or answer["content"], dialogue.task


def _messages(rng: Random, dialogue: Dialogue) -> list[Message]:
    """All of a dialogue; in three of ten cases some system prompt is put before its own."""
    system = dialogue.system
    if rng.random() < 0.3:
        system = f"{rng.choice(_SYSTEM_PROMPTS)} {system}".strip()
    messages = [_message("system", system)] if system else []
    for asked, replied in dialogue.turns:
        messages += [_message("user", asked), _message("assistant", replied)]
    return messages
