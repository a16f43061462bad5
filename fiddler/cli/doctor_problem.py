"""One finding of ``fiddler doctor``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, what to do, and what it costs; fiddler cannot run if fatal."""

    what: str
    todo: str
    effect: str = ""
    is_fatal: bool = False
