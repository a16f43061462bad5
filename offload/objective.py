"""What a plan makes least: the time of a decoded token, a prompt token, or a request: pure."""

from dataclasses import dataclass
from typing import Self

from fiddler.errors import ConfigError, nearest

# A chat's request: its history and what was pasted, then an answer of a page. A mix of shorter
# prompts gives up large pieces for half a percent of decode, or one, and a prompt of
# 4,096 then takes up to three times as long, since each piece brings every cold expert again.
DEFAULT = "mix:4096:512"
MIX = (1024, 256)
PROMPT = 4096
FORMS = "decode, prefill, mix or mix:P:N, a request's prompt and answer in tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Requests that read ``prompt_tokens`` and then write ``answer_tokens``; least time is best.

    ``behind``: tokens before those that are written. Of prefill's requests nothing is written, and
    of decode's nothing is read.
    """

    name: str
    prompt_tokens: int
    answer_tokens: int
    behind: int

    @property
    def depth(self) -> int:
        """Tokens before the middle one of those that are written."""
        return self.behind + self.answer_tokens // 2

    @property
    def length(self) -> int:
        """Tokens that a request has in the end."""
        return max(self.prompt_tokens, self.behind) + self.answer_tokens

    def within(self, context_tokens: int) -> Self:
        """The same in proportion, with no prompt and no answer longer than a context."""
        longest = max(self.prompt_tokens, self.answer_tokens, self.behind)
        part = min(1.0, context_tokens / longest)
        prompt, answer, behind = (
            max(1, round(part * tokens)) if tokens else 0
            for tokens in (self.prompt_tokens, self.answer_tokens, self.behind)
        )
        return type(self)(name=self.name, prompt_tokens=prompt, answer_tokens=answer, behind=behind)


def parse_objective(text: str) -> Objective:
    """What ``decode``, ``prefill``, ``mix`` or ``mix:P:N`` ask for; ConfigError for all else."""
    kind, *numbers = text.split(":")
    if kind in ("decode", "prefill") and not numbers:
        decodes = kind == "decode"
        return Objective(
            name=kind,
            prompt_tokens=0 if decodes else PROMPT,
            answer_tokens=1 if decodes else 0,
            behind=MIX[0] if decodes else 0,
        )
    given = [int(number) for number in numbers if number.isdecimal() and number.isascii()]
    if kind != "mix" or len(given) != len(numbers) or len(given) not in (0, 2):
        suggested = nearest(kind, ("decode", "prefill", "mix"))
        raise ConfigError(f"{text!r} is no objective{suggested}", hint=f"use {FORMS}")
    prompt, answer = given or MIX
    if prompt + answer == 0:
        raise ConfigError(
            f"a request of {text!r} has no tokens", hint="for example: --objective mix:1024:256"
        )
    return Objective(name=text, prompt_tokens=prompt, answer_tokens=answer, behind=prompt)
