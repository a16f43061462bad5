"""From a text's tokens and a model's answers to figures: pure.

Standard errors take tokens and questions for independent, as other programs do.

Shapes: T scored tokens.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, values_T: Floats) -> "Estimate":
        """Of at least one value; the error of a single one is not known, and told as 0."""
        deviation = float(np.std(values_T, ddof=1)) if len(values_T) > 1 else 0.0
        return cls(float(np.mean(values_T)), deviation / math.sqrt(len(values_T)))


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``exp`` of ``nll``, the mean nats per token."""

    num_tokens: int
    nll: Estimate

    @classmethod
    def of(cls, surprise_T: Floats) -> "Perplexity":
        """From minus the log-probabilities of a text's tokens."""
        return cls(len(surprise_T), Estimate.of(surprise_T))

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(self.nll.mean)

    @property
    def stderr(self) -> float:
        """Its standard error, to first order."""
        return self.value * self.nll.stderr


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a model's predictions are from a reference's: nats, and shares of tokens.

    ``p99`` is the 99th percentile, interpolated between the nearest values.
    """

    kl: Estimate
    p99: float
    largest: float
    same_top: Estimate

    @classmethod
    def of(cls, kl_T: Floats, same_T: npt.NDArray[np.bool_]) -> "Divergence":
        """From each token's divergence, and whether both found the same token likeliest."""
        return cls(
            kl=Estimate.of(kl_T),
            p99=float(np.quantile(kl_T, 0.99)),
            largest=float(kl_T.max()),
            same_top=Estimate.of(same_T.astype(np.float64)),
        )


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Questions answered right and asked, by task."""

    by_task: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, judged: Iterable[tuple[str, bool]]) -> "Accuracy":
        """From each question's task and whether its answer was right."""
        counts: dict[str, tuple[int, int]] = {}
        for task, is_right in judged:
            right, asked = counts.get(task, (0, 0))
            counts[task] = (right + is_right, asked + 1)
        return cls(counts)

    @property
    def num_right(self) -> int:
        """Of all tasks."""
        return sum(right for right, _ in self.by_task.values())

    @property
    def num_asked(self) -> int:
        """Of all tasks."""
        return sum(asked for _, asked in self.by_task.values())

    @property
    def share(self) -> Estimate:
        """Of right answers, with its binomial error."""
        mean = self.num_right / self.num_asked
        return Estimate(mean, math.sqrt(mean * (1 - mean) / self.num_asked))
