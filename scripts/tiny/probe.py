"""Held-out accuracy without generating: whether each token of the answer is the likeliest one.

Greedy decoding writes the expected answer exactly when every token of it, given the ones before,
has the largest logit. One forward pass over packed rows therefore tells the exact-match accuracy.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from fiddler.builtin_text.corpus import Question, heldout
from scripts.tiny.attention import document_mask, to_device
from scripts.tiny.model import TinyModel
from scripts.tiny.rows import Document, Encoder, Rows, pack_documents


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """Packed rows of held-out questions; ``tasks`` names the documents of each row."""

    rows: Rows
    tasks: list[list[str]]


def probe_batches(
    encoder: Encoder, length: int, num_questions: int, seed: int, rows_per_batch: int = 8
) -> list[ProbeBatch]:
    """Pack held-out questions with one right wording (all tasks but stories)."""
    questions = [q for q in heldout(num_questions, seed) if q[2] != "story"]
    documents = [(_encode(encoder, question), question[2]) for question in questions]
    bins: list[list[tuple[Document, str]]] = []
    room: list[int] = []
    for document, task in sorted(documents, key=lambda pair: -len(pair[0].ids)):
        size = len(document.ids)
        fitting = next((i for i, left in enumerate(room) if left >= size), None)
        if fitting is None:
            bins.append([])
            room.append(length + 1)
            fitting = len(bins) - 1
        bins[fitting].append((document, task))
        room[fitting] -= size
    bins += [[]] * (-len(bins) % rows_per_batch)
    return [
        _batch(encoder, bins[start : start + rows_per_batch], length)
        for start in range(0, len(bins), rows_per_batch)
    ]


def _batch(encoder: Encoder, bins: list[list[tuple[Document, str]]], length: int) -> ProbeBatch:
    rows = pack_documents([[d for d, _ in row] for row in bins], length, encoder.end_of_text[0])
    return ProbeBatch(rows, [[task for _, task in row] for row in bins])


def _encode(encoder: Encoder, question: Question) -> Document:
    messages, answer, _ = question
    document = encoder.conversation([*messages, {"role": "assistant", "content": answer}])
    reply = len(encoder.encode(answer)) + 1
    tail = len(encoder.end_ids) - 1
    weights = [0.0] * len(document.ids)
    weights[-reply - tail : -tail] = [1.0] * reply
    return Document(document.ids, weights)


@torch.no_grad()
def probe_accuracy(model: TinyModel, batches: list[ProbeBatch]) -> str:
    """Return one line: the share of exactly answered questions, overall and for each task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches:
        wrong_RS = _wrong_tokens(model, batch.rows)
        for row, tasks in enumerate(batch.tasks):
            for number, task in enumerate(tasks):
                of_document = batch.rows.documents_RS[row] == number
                right[task].append(not wrong_RS[row][of_document].any())
    total = np.mean([ok for oks in right.values() for ok in oks])
    each = " ".join(f"{task} {np.mean(oks):.2f}" for task, oks in sorted(right.items()))
    return f"held-out {total:.3f}: {each}"


def _wrong_tokens(model: TinyModel, rows: Rows) -> np.ndarray:
    device = next(model.parameters()).device
    tensors = to_device(rows, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits_TV, _ = model(tensors["ids"], document_mask(tensors["documents"]))
    guesses = logits_TV.argmax(-1).view_as(tensors["ids"])
    wrong: np.ndarray = ((guesses != tensors["targets"]) & (tensors["weights"] > 0)).cpu().numpy()
    return wrong
