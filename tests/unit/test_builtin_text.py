"""The corpus of the built-in model: right answers, a clean split, whole rows."""

import re
from pathlib import Path
from random import Random

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fiddler.builtin_text.corpus import (
    heldout,
    heldout_passkeys,
    is_correct,
    is_heldout,
    sample_conversation,
    sample_dialogue,
)
from fiddler.builtin_text.prose import random_cast, story
from fiddler.builtin_text.tasks import TASKS
from scripts.tiny.rows import CHAT_TEMPLATE, Encoder, pack_rows

FOLDER = Path(__file__).parents[2] / "fiddler" / "assets" / "builtin"
seeds = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))


def _last_turn(task: str, seed: int) -> tuple[str, str]:
    return sample_dialogue(Random(seed), task).turns[-1]


@given(seeds)
def test_sums_are_right(seed: int) -> None:
    for task in ("add", "subtract", "multiply"):
        _, answer = _last_turn(task, seed)
        values = {eval(part.replace("x", "*")) for part in answer.split("=")}
        assert len(values) == 1


@given(seeds)
def test_comparisons_are_right(seed: int) -> None:
    question, answer = _last_turn("compare", seed)
    asked = [int(n) for n in re.findall(r"\d+", question)]
    named = [int(n) for n in re.findall(r"\d+", answer)]
    if "larg" in answer or "bigger" in answer or "greater" in answer:
        assert named[0] == max(asked)
    elif "smaller" in answer:
        assert named[0] == min(asked)
    else:
        assert named == sorted(asked)
    if answer.startswith(("Yes", "No")):
        low_first = "smaller" in question
        assert answer.startswith("Yes") == ((asked[0] < asked[1]) == low_first)


@given(seeds)
def test_words_are_copied_reversed_and_spelled(seed: int) -> None:
    question, answer = _last_turn("reverse", seed)
    items = question.split(": ")[1].split()
    assert answer.split() == items[::-1]
    question, answer = _last_turn("spell", seed)
    word = answer.replace("-", "")
    assert word in question or word[::-1] in question
    question, answer = _last_turn("copy", seed)
    assert answer in question or (answer.split()[0] in question and "times" in question)


@given(seeds)
def test_facts_answer_from_the_conversation(seed: int) -> None:
    dialogue = sample_dialogue(Random(seed), "facts")
    told = " ".join([dialogue.system, *(user for user, _ in dialogue.turns)])
    for question, answer in dialogue.turns:
        if question.rstrip().endswith("?") and "do not know" not in answer:
            value = answer.rstrip(".").removesuffix(" years old").split()[-1]
            assert value in told


@given(seeds)
def test_the_key_asked_for_is_in_the_text(seed: int) -> None:
    dialogue = sample_dialogue(Random(seed), "passkey")
    code = dialogue.turns[-1][1].rstrip(".").split()[-1]
    assert dialogue.turns[0][0].count(f" {code}.") >= 1


@given(seeds)
def test_stories_hold_their_cast_and_end(seed: int) -> None:
    rng = Random(seed)
    cast = random_cast(rng)
    text = story(rng, cast)
    expected = f"{cast.kind}, {cast.name}, {cast.thing}, {cast.place}"
    assert is_correct(text, expected, "story")
    assert not is_correct(text.removesuffix("The end."), expected, "story")
    assert not is_correct(text, "a word that is not there", "story")
    assert "{" not in text


def test_same_seed_same_questions() -> None:
    assert heldout(26, seed=4) == heldout(26, seed=4)
    assert heldout(26, seed=4) != heldout(26, seed=5)


def test_every_task_is_asked_equally() -> None:
    tasks = [task for _, _, task in heldout(2 * (len(TASKS) - 1), seed=1)]
    assert {tasks.count(task) for task in tasks} == {2}


def test_heldout_sums_are_never_trained_on() -> None:
    def operands(text: str) -> frozenset[str]:
        return frozenset(re.findall(r"\d+", text))

    asked = [q for q in heldout(1300, seed=2) if q[2] in ("add", "subtract", "multiply")]
    for task in ("add", "subtract", "multiply"):
        rng = Random(3)
        trained = {operands(sample_dialogue(rng, task).turns[0][0]) for _ in range(4000)}
        kept = [operands(q[0][-1]["content"]) for q in asked if q[2] == task]
        assert kept
        assert trained.isdisjoint(kept)


def test_one_content_in_twenty_is_held_out() -> None:
    share = np.mean([is_heldout(f"add {a} {b}") for a in range(100) for b in range(100)])
    assert 0.04 < share < 0.06


def test_passkey_questions_have_the_length_asked_for(encoder: Encoder) -> None:
    for messages, expected, _ in heldout_passkeys(3, seed=0, sentences=190):
        length = sum(len(encoder.encode(message["content"])) for message in messages)
        assert 1700 < length < 2400
        assert expected.rstrip(".").split()[-1] in " ".join(m["content"] for m in messages)


@settings(max_examples=30)
@given(seed=seeds)
def test_encoding_is_what_the_chat_template_gives(encoder: Encoder, seed: int) -> None:
    messages = sample_conversation(Random(seed))
    document = encoder.conversation(messages)
    text = jinja2.Template(CHAT_TEMPLATE).render(messages=messages)
    assert document.ids == encoder.tokenizer.encode(text).ids


@settings(max_examples=20)
@given(seed=seeds)
def test_the_loss_is_on_the_replies(encoder: Encoder, seed: int) -> None:
    messages = sample_conversation(Random(seed))
    document = encoder.conversation(messages)
    learned = [i for i, w in zip(document.ids, document.weights, strict=True) if w == 1.0]
    replies = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert encoder.tokenizer.decode(learned, skip_special_tokens=False) == replies


def test_rows_hold_whole_documents(encoder: Encoder) -> None:
    rows = pack_rows(encoder, Random(1), num_rows=3, length=768)
    assert rows.ids_RS.shape == rows.targets_RS.shape == (3, 768)
    assert (np.diff(rows.documents_RS, axis=1) >= 0).all()
    starts = np.diff(rows.documents_RS, axis=1) > 0  # the target there opens another document
    assert (rows.weights_RS[:, :-1][starts] == 0).all()
    assert (rows.weights_RS > 0).mean() > 0.7
    again = pack_rows(encoder, Random(1), num_rows=3, length=768)
    assert (again.ids_RS == rows.ids_RS).all()


@pytest.mark.slow
def test_the_exported_folder_computes_what_was_trained(encoder: Encoder, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from scripts.tiny.attention import document_mask
    from scripts.tiny.export import export_folder
    from scripts.tiny.model import TinyConfig, TinyModel

    torch.manual_seed(0)
    model = TinyModel(TinyConfig(num_layers=2, num_experts=6, num_experts_per_token=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
            parameter.copy_(parameter.bfloat16())
    export_folder(model, encoder.tokenizer, tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 1536, (2, 40))
    with torch.no_grad():
        expected = oracle(ids).logits.flatten(0, 1)
        logits, _ = model(ids, document_mask(torch.zeros_like(ids)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
