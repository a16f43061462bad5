"""How often each expert is chosen: counts, smoothed shares, and the file that keeps them.

Shapes: L layers, E experts.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt

from fiddler.errors import ProfileError
from offload.placement import Placement
from offload.units import counted
from offload.whole_file import write_whole

VERSION = 1
REMAKE = "make a new one with: fiddler profile MODEL --text FILE -o profile.json"


@dataclass(frozen=True, slots=True, eq=False)
class Popularity:
    """Routed tokens per layer and expert, int64 ``[L, E]``, read-only.

    Rows of layers without experts are all zero.
    """

    counts_LE: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        counts_LE = np.array(self.counts_LE, dtype=np.int64)
        assert counts_LE.ndim == 2 and (counts_LE >= 0).all()
        counts_LE.setflags(write=False)
        object.__setattr__(self, "counts_LE", counts_LE)

    @classmethod
    def uniform(cls, num_layers: int, num_experts: int) -> Self:
        """Nothing is known: every expert counts the same."""
        return cls(np.zeros((num_layers, num_experts), dtype=np.int64))

    @property
    def is_uniform(self) -> bool:
        """Whether the counts say nothing about which expert is better."""
        return bool((self.counts_LE == self.counts_LE[:, :1]).all())

    def shares(self) -> npt.NDArray[np.float64]:
        """Float64 ``[L, E]`` rows that sum to 1, with one added to every count.

        The added one keeps an expert that a short profile never saw from counting as never used.
        """
        smoothed_LE = self.counts_LE + 1.0
        shares_LE: npt.NDArray[np.float64] = smoothed_LE / smoothed_LE.sum(axis=1, keepdims=True)
        return shares_LE

    def entropy_bits(self) -> list[float]:
        """Per layer, the entropy of :meth:`shares`; ``log2(E)`` means perfectly even use."""
        shares_LE = self.shares()
        return [float(bits) for bits in -(shares_LE * np.log2(shares_LE)).sum(axis=1)]


def hit_rate(placement: Placement, counts_LE: npt.NDArray[np.int64]) -> float:
    """Share of the routed ``counts_LE`` that meet a resident expert; 0.0 if there are none."""
    total = int(counts_LE.sum())
    hits = sum(
        int(counts_LE[layer, sorted(experts)].sum())
        for layer, experts in enumerate(placement.resident)
        if experts
    )
    return hits / total if total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """Counts with where they come from; ``num_tokens`` were routed. ``created`` is ISO 8601.

    ``architecture`` tells models apart that need not be called the same; None: the file is of a
    release that kept none, so the name has to.
    """

    model: str
    architecture: str | None
    revision: str | None
    corpus_sha256: str
    num_tokens: int
    popularity: Popularity
    created: str

    @property
    def name(self) -> str:
        """What is said of it."""
        return f"profile of {self.num_tokens:,} tokens"

    def name_for(self, model: str) -> str:
        """What a plan calls it; one that was made with a model of another name says so."""
        return self.name if same_name(self.model, model) else f"{self.name}, made with {self.model}"

    def is_of(self, model: str, architecture: str | None, shape: tuple[int, ...]) -> bool:
        """Whether that model may use it; by name where either side knows no architecture."""
        if self.popularity.counts_LE.shape != shape:
            return False
        if self.architecture is None or architecture is None:
            return same_name(self.model, model)
        return self.architecture == architecture

    @property
    def subject(self) -> str:
        """What it is of, for people."""
        return subject(self.model, self.architecture, self.popularity.counts_LE.shape)


def save_profile(profile: Profile, path: Path | str) -> None:
    """Write ``profile`` as JSON; a crash leaves the earlier file or the new one, never half of it.

    Raises :class:`ProfileError` where the file cannot be written.
    """
    record = {
        "version": VERSION,
        "model": profile.model,
        "architecture": profile.architecture,
        "revision": profile.revision,
        "corpus_sha256": profile.corpus_sha256,
        "num_tokens": profile.num_tokens,
        "created": profile.created,
        "counts": profile.popularity.counts_LE.tolist(),
    }
    try:
        write_whole(Path(path), json.dumps(record).encode())
    except OSError as error:
        raise ProfileError(f"the profile {path} cannot be written: {error.strerror}") from error


def check_writable(path: Path | str) -> None:
    """Raise :class:`ProfileError` if :func:`save_profile` could not write ``path``."""
    folder = Path(path).parent
    if not folder.is_dir() or Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise ProfileError(
            f"the profile {path} cannot be written there", hint="name a file in a writable folder"
        )


def load_profile(
    path: Path | str,
    *,
    model: str,
    architecture: str | None = None,
    num_layers: int,
    num_experts: int,
) -> Profile:
    """Read a profile for a model of this architecture, or of this name where none is known.

    Raises :class:`ProfileError` for a file that is missing, damaged or of another model. Names
    are compared without their folder or organisation, so a local copy may use the hub's profile.
    """
    profile = read_profile(path)
    shape = num_layers, num_experts
    found = profile.popularity.counts_LE.shape
    if profile.architecture is not None and profile.architecture == architecture:
        if found != shape:
            raise _damaged(
                Path(path),
                f"its counts are of {counted(found[0], 'layer')} and "
                f"{counted(found[1], 'expert')}, not {num_layers} and {num_experts}",
            )
        return profile
    if not profile.is_of(model, architecture, shape):
        known = None if profile.architecture is None else architecture
        raise ProfileError(
            f"the profile {path} is of {profile.subject}, not of {subject(model, known, shape)}",
            hint=REMAKE,
        )
    return profile


def read_profile(path: Path | str) -> Profile:
    """Read a profile of any model; raises :class:`ProfileError` if it is missing or damaged."""
    return _parse(_read_record(Path(path)), Path(path))


def subject(model: str, architecture: str | None, shape: tuple[int, ...]) -> str:
    """A model for people."""
    num_layers, num_experts = shape
    return f"{model} ({architecture or f'{num_layers} layers, {num_experts} experts'})"


def same_name(one: str, other: str) -> bool:
    """Whether two models are called the same, whatever folder or organisation they are in."""
    return _last_part(one) == _last_part(other)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"the profile {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise _damaged(path, "it is not JSON") from error
    if not isinstance(record, dict):
        raise _damaged(path, "it holds no JSON object")
    return record


def _parse(record: dict[str, Any], path: Path) -> Profile:
    version = record.get("version")
    if version != VERSION:
        raise _damaged(path, f"its version is {version!r}, this fiddler reads {VERSION}")
    texts = [record.get(key) for key in ("model", "corpus_sha256", "created")]
    revision, num_tokens = record.get("revision"), record.get("num_tokens")
    architecture = record.get("architecture")
    if not all(isinstance(text, str) for text in texts):
        raise _damaged(path, "model, corpus_sha256 or created is no text")
    for name, value in (("revision", revision), ("architecture", architecture)):
        if not (value is None or isinstance(value, str)):
            raise _damaged(path, f"{name} is neither text nor null")
    if not _is_count(num_tokens):
        raise _damaged(path, "num_tokens is no count")
    model, corpus_sha256, created = map(str, texts)
    counts_LE = _counts(record.get("counts"), path)
    if num_tokens and not counts_LE.any():
        raise _damaged(path, f"it has counted no expert of {num_tokens:,} tokens")
    return Profile(
        model=model,
        architecture=architecture,
        revision=revision,
        corpus_sha256=corpus_sha256,
        num_tokens=num_tokens,
        popularity=Popularity(counts_LE),
        created=created,
    )


def _counts(rows: Any, path: Path) -> npt.NDArray[np.int64]:
    is_table = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
    if not is_table or not rows[0] or len({len(row) for row in rows}) != 1:
        raise _damaged(path, "counts is no table of layers by experts")
    if not all(_is_count(count) for row in rows for count in row):
        raise _damaged(path, "counts holds something that is no count")
    return np.array(rows, dtype=np.int64)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 53


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _damaged(path: Path, reason: str) -> ProfileError:
    return ProfileError(f"{path} is not a usable profile: {reason}", hint=REMAKE)
