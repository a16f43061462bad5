"""Sums, differences, products and comparisons of small numbers."""

from random import Random

from fiddler.builtin_text import words
from fiddler.builtin_text.dialogue import Dialogue, reworded
from fiddler.builtin_text.prose import join_words, open_word, person

_ADD_FORMS = (
    "What is {a} + {b}?",
    "what's {a} + {b}",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Compute {a} + {b}.",
    "And {a} + {b}?",
    "and {a}+{b}",
    "Calculate {a}+{b}",
    "What is {a} plus {b}?",
)
_SUBTRACT_FORMS = (
    "What is {a} - {b}?",
    "what's {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "Subtract {b} from {a}.",
    "How much is {a} minus {b}?",
    "What is {a} minus {b}?",
    "Compute {a} - {b}.",
    "And {a} - {b}?",
    "and {a}-{b}",
    "Take {b} away from {a}.",
)
_MULTIPLY_FORMS = (
    "What is {a} x {b}?",
    "what's {a} * {b}",
    "{a}*{b}",
    "{a} x {b}",
    "{a} * {b}",
    "What is {a} times {b}?",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
    "Compute {a} * {b}.",
    "What is {a} * {b}?",
)
_ADD_TALES = (
    "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
    "{n} has {a} {t} and finds {b} more. How many {t} does {n} have?",
    "There are {a} {t} in the {p} and {b} {t} in the {q}. How many {t} are there together?",
    "{n} counts {a} {t} and then {b} more. How many {t} is that?",
    "I have {a} {t} and buy {b} more. How many {t} do I have?",
    "I have {a} {t} and {m} has {b} {t}. How many {t} do we have?",
    "If you have {a} {t} and get {b} more {t}, how many {t} do you have?",
    "{n} buys {a} {t} and {m} buys {b} {t}. How many {t} do they have together?",
)
_SUBTRACT_TALES = (
    "{n} has {a} {t}. {m} takes {b} of them. How many {t} are left?",
    "{n} has {a} {t} and gives {b} {t} to {m}. How many {t} does {n} have now?",
    "There are {a} {t} in the {p}. {n} takes away {b}. How many {t} are left?",
    "{n} had {a} {t} and lost {b}. How many {t} does {n} have now?",
    "I have {a} {t}. I give {b} {t} to {m}. How many {t} do I have?",
    "I had {a} {t} and lost {b} of them. How many {t} are left?",
    "{n} has {a} {t}. {n} sells {b} of them. How many {t} does {n} have?",
    "If you have {a} {t} and eat {b} of them, how many {t} are left?",
)


def _number(rng: Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


def _tale(rng: Random, forms: tuple[str, ...], a: int, b: int) -> str:
    places = rng.sample(words.PLACES, 2)
    text = rng.choice(forms)
    names = (person(rng), person(rng))
    thing = rng.choice((*words.THINGS, "apples", "pears", open_word(rng) + "s"))
    return text.format(a=a, b=b, n=names[0], m=names[1], t=thing, p=places[0], q=places[1])


def add(rng: Random) -> Dialogue:
    """Sums of numbers up to 999, bare or as a tale."""
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.1:
        return _add_three(rng, a, b, _number(rng))
    if rng.random() < 0.25:
        question = _tale(rng, _ADD_TALES, a, b)
    else:
        question = reworded(rng, rng.choice(_ADD_FORMS).format(a=a, b=b))
    return Dialogue("add", f"add {min(a, b)} {max(a, b)}", ((question, f"{a} + {b} = {a + b}"),))


def _add_three(rng: Random, a: int, b: int, c: int) -> Dialogue:
    form = rng.choice(("What is {} + {} + {}?", "{} + {} + {}", "Add {}, {} and {}.", "{}+{}+{}"))
    question = reworded(rng, form.format(a, b, c))
    answer = f"{a} + {b} + {c} = {a + b} + {c} = {a + b + c}"
    return Dialogue("add", f"add {sorted((a, b, c))}", ((question, answer),))


def subtract(rng: Random) -> Dialogue:
    """Differences of numbers up to 999; one bare question in eight has a negative answer."""
    b, a = sorted((_number(rng), _number(rng)))
    key = f"sub {b} {a}"
    if rng.random() < 0.25:
        question = _tale(rng, _SUBTRACT_TALES, a, b)
    else:
        if rng.random() < 0.12:
            a, b = b, a
        question = reworded(rng, rng.choice(_SUBTRACT_FORMS).format(a=a, b=b))
    return Dialogue("subtract", key, ((question, f"{a} - {b} = {a - b}"),))


def multiply(rng: Random) -> Dialogue:
    """Products of numbers up to 99 and 9, or up to 12, worked out by tens and ones."""
    a, b = rng.randrange(100), rng.randrange(10)
    if rng.random() < 0.3:
        a, b = rng.randrange(13), rng.randrange(13)
    question = reworded(rng, rng.choice(_MULTIPLY_FORMS).format(a=a, b=b))
    if rng.random() < 0.5:
        question = reworded(rng, rng.choice(_MULTIPLY_FORMS).format(a=b, b=a))
    high, low = max(a, b), min(a, b)
    tens, ones = high // 10 * 10, high % 10
    steps = f"{tens * low} + {ones * low} = " if tens and ones and low else ""
    answer = f"{high} x {low} = {steps}{high * low}"
    # the few products of two numbers above 9 have to be learned by heart
    key = f"mul {low} {high}" if low < 10 else "by heart"
    return Dialogue("multiply", key, ((question, answer),))


def compare(rng: Random) -> Dialogue:
    """Which of two or three numbers is larger or smaller, and yes or no."""
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.4:  # close ones, where the last digits decide
        b = max(0, a + rng.choice((-30, -10, -3, -2, -1, 1, 2, 3, 10, 30)))
    if a == b:
        b += 1
    form = rng.randrange(6)
    key = f"cmp {min(a, b)} {max(a, b)}"
    low, high = sorted((a, b))
    if form == 0:
        word = rng.choice(("larger", "bigger", "greater"))
        turn = f"Which is {word}, {a} or {b}?", f"{high} is {word} than {low}."
    elif form == 1:
        turn = f"Which is smaller, {a} or {b}?", f"{low} is smaller than {high}."
    elif form == 2:
        word = rng.choice(("larger", "bigger", "greater"))
        answer = f"Yes, {a} is {word} than {b}." if a > b else f"No, {a} is smaller than {b}."
        turn = f"Is {a} {word} than {b}?", answer
    elif form == 3:
        answer = f"Yes, {a} is smaller than {b}." if a < b else f"No, {a} is larger than {b}."
        turn = f"Is {a} smaller than {b}?", answer
    else:
        c = _number(rng)
        order = sorted((a, b, c))
        key += f" {c}"
        if form == 4:
            asked = rng.choice(("Sort {a}, {b} and {c}.", "Put {a}, {b} and {c} in order."))
            turn = asked.format(a=a, b=b, c=c), join_words([str(n) for n in order]) + "."
        else:
            turn = f"Which is the largest: {a}, {b} or {c}?", f"The largest is {order[2]}."
    return Dialogue("compare", key, ((reworded(rng, turn[0]), turn[1]),))
