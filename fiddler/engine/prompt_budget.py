"""How many prompt tokens a step may have while other requests wait for their next token. Pure.

A target for the time between two tokens bounds a step's seconds. What a step will take is foreseen
from the last ones: what steps without a prompt took, and what prompt tokens added. On a model whose
experts stream through the GPU most of that does not grow with the tokens, so a larger chunk is
cheaper; chunks grow step by step for as long as the target allows.
"""

import itertools
import statistics
from collections import deque

LEAST = 16  # tokens of a prompt in a step, whatever the target: it has to end some time
GROWTH = 2  # a chunk has at most so many times the tokens of the largest of the last ones
APART = 1.1  # sizes that are nearer say nothing about what a token adds: that would be noise
CHEAPEST = 0.25  # what a token adds, in means over all tokens of a chunk, is at least so much
REMEMBERED = 3  # steps of a kind; the median of three forgets one that compiled or was disturbed


class PromptBudget:
    """Told of every step by :meth:`observe`; ``target_s`` None: nothing is bounded."""

    def __init__(self, target_s: float | None) -> None:
        self._target_s = target_s
        self._plain_s: deque[float] = deque(maxlen=REMEMBERED)  # steps that only decode
        # (prompt tokens, seconds) of steps that do both
        self._mixed: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step has ended; one in which nobody decodes says nothing about those that do."""
        if num_decodes and num_prompt_tokens:
            self._mixed.append((num_prompt_tokens, seconds))
        elif num_decodes:
            self._plain_s.append(seconds)

    def most_tokens(self, num_decodes: int, room: int) -> int:
        """Prompt tokens that the next step may have, of the ``room`` that is left in it."""
        if self._target_s is None or num_decodes == 0:
            return room
        if not self._mixed:
            return min(room, LEAST)
        fitting = self._fitting_tokens(self._target_s)
        largest = GROWTH * max(tokens for tokens, _ in self._mixed)
        return min(room, max(LEAST, min(fitting, largest)))

    def _fitting_tokens(self, target_s: float) -> int:
        """By a straight line through the last steps with prompts."""
        plain_s = statistics.median(self._plain_s) if self._plain_s else 0.0
        mean_s = min(max(0.0, s - plain_s) / n for n, s in self._mixed)
        slopes = [
            (s - t) / (n - m)
            for (m, t), (n, s) in itertools.product(self._mixed, repeat=2)
            if n >= APART * m
        ]
        token_s = max(mean_s * CHEAPEST, statistics.median(slopes)) if slopes else mean_s
        token_s = max(1e-9, min(token_s, mean_s))
        begin_s = statistics.median(s - token_s * n for n, s in self._mixed)
        return int((target_s - begin_s) / token_s)
