"""Requests for short stories."""

from random import Random

from fiddler.builtin_text.dialogue import Dialogue, reworded
from fiddler.builtin_text.prose import random_cast, story, with_article

_STORY_ASKS = (
    "Write a short story about {s}.",
    "Tell me a story about {s}.",
    "Tell a short story about {s}.",
    "Write a story with {s}.",
)
_STORY_OPEN = (
    "Tell me a story.",
    "Write a short story.",
    "Can you tell a story?",
    "Tell me a short story, please.",
    "I want to hear a story.",
)


_STORY_AGAIN = (
    "Another one, please.",
    "Another one.",
    "Tell me another story.",
    "One more story, please.",
    "Again!",
    "Tell me one more.",
)


def tale(rng: Random) -> Dialogue:
    """A request for a story, with one to four things that it must hold."""
    cast = random_cast(rng)
    kind, thing = with_article(cast.kind), with_article(cast.thing)
    named = f"{kind} named {cast.name}"
    keywords: tuple[str, ...]
    subject, keywords = rng.choice(
        (
            (kind, (cast.kind,)),
            (named, (cast.kind, cast.name)),
            (f"{kind} and {thing}", (cast.kind, cast.thing)),
            (f"{cast.name} at the {cast.place}", (cast.name, cast.place)),
            (
                f"{named}, {thing} and the {cast.place}",
                (cast.kind, cast.name, cast.thing, cast.place),
            ),
        )
    )
    question, key = rng.choice(_STORY_ASKS).format(s=subject), f"story {subject}"
    if rng.random() < 0.1:
        question, keywords, key = rng.choice(_STORY_OPEN), (), "any story"
    turns = [(reworded(rng, question), story(rng, cast))]
    if rng.random() < 0.15:
        turns.append((reworded(rng, rng.choice(_STORY_AGAIN)), story(rng, random_cast(rng))))
        key, keywords = "two stories", ()
    return Dialogue("story", key, tuple(turns), keywords=keywords)
