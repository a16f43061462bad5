"""What was measured on this machine, kept for every later start: one file in the user's cache.

Two measurements of one thing differ by noise, and so does what follows from them: who computes an
expert, hence how its sums are rounded, hence now and then a token. So each thing is measured once
and read from then on, as long as all that it depends on stays the same.

The file holds a section for each machine (a home folder may be shared), each with the versions that
its figures were measured with: other versions are measured anew, and take the section's place.

Ordering: who stores holds a lock beside the file, reads it again, and replaces it whole. Of two
starts that measure one thing at the same time both take what the first one has stored.
"""

import fcntl
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cpu_kernels.thread_count import cache_file
from offload.machine_facts import Machine, changes, forced_otherwise, name_of, plain
from offload.whole_file import write_whole

T = TypeVar("T")
Section = dict[str, Any]

FORMAT = 1

_log = logging.getLogger("fiddler.calibration")


@dataclass(frozen=True, slots=True)
class Quantity(Generic[T]):
    """Something that can be measured. ``name`` begins its keys.

    ``from_json`` undoes ``to_json`` and raises ValueError for what cannot be a result.
    """

    name: str
    to_json: Callable[[T], Any]
    from_json: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The measurements of one machine, in a file that is made when it is needed."""

    path: Path
    machine: Machine

    def once(
        self, quantity: Quantity[T], subject: Mapping[str, Any], measure: Callable[[], T]
    ) -> T:
        """The quantity of ``subject`` (JSON types), measured if no start before this one has.

        A RuntimeWarning says where the file is damaged or cannot be written or read; the quantity
        is then measured.
        """
        found = self.known(quantity, subject)
        if found is not None:
            return found
        return self._keep(quantity, subject, measure(), anew=False)

    def known(self, quantity: Quantity[T], subject: Mapping[str, Any]) -> T | None:
        """The quantity, if it has been measured here with these versions; warns as :meth:`once`."""
        section = self._section(self._load())
        if section is None:
            return None
        if changed := changes(section["versions"], self.machine.versions):
            text = "%s is of other versions (%s): all has to be measured anew"
            _log.warning(text, self.path, changed)
            return None
        return self._found(section, quantity, subject)

    def store(self, quantity: Quantity[T], subject: Mapping[str, Any], value: T) -> T:
        """Put ``value`` in the place of what was measured before, and return it."""
        return self._keep(quantity, subject, value, anew=True)

    def is_outdated(self, quantity: Quantity[Any]) -> bool:
        """Whether it was measured, but with other versions, or only on hardware unlike this.

        What ``FIDDLER_ISA`` alone makes different does not count. Never warns.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sections = self._load()
        section = self._section(sections)
        if section is not None:
            is_known = bool(_subjects(section, quantity.name))
            return is_known and section["versions"] != plain(self.machine.versions)
        is_forced = bool(self._forced_otherwise(sections, quantity.name))
        return not is_forced and any(_subjects(s, quantity.name) for s in sections)

    def why_unknown(self, quantity: Quantity[Any], subject: Mapping[str, Any]) -> str:
        """Why this machine's ``quantity`` is not known, or nothing if it is; never warns."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sections = self._load()
            section = self._section(sections)
            if section is not None and self._found(section, quantity, subject) is not None:
                changed = changes(section["versions"], self.machine.versions)
                return f"it was calibrated with other versions ({changed})" if changed else ""
        if section is not None and key_of(quantity.name, subject) in section["measured"]:
            return f"what {self.path} has of it cannot be used"
        if section is not None and (found := _subjects(section, quantity.name)):
            return f"it was calibrated with other settings ({changes(found[-1], plain(subject))})"
        if forced := self._forced_otherwise(sections, quantity.name):
            return f"it was calibrated with other settings ({forced})"
        if section is None and sections:
            others = ", ".join(name_of(other["hardware"]) for other in sections)
            return f"{self.path} is of another machine ({others})"
        return "this machine is not calibrated"

    def _keep(
        self, quantity: Quantity[T], subject: Mapping[str, Any], value: T, *, anew: bool
    ) -> T:
        text = json.dumps(quantity.to_json(value))
        try:
            with locked(self.path):
                with warnings.catch_warnings():  # said when it was looked for
                    warnings.simplefilter("ignore")
                    sections = self._load()
                    section = self._section(sections)
                    if section is None or section["versions"] != self.machine.versions:
                        sections = [s for s in sections if s is not section]
                        section = self._new_section()
                        sections.append(section)
                    found = None if anew else self._found(section, quantity, subject)
                if found is not None:  # another start has measured meanwhile
                    return found
                section["measured"][key_of(quantity.name, subject)] = {
                    "of": plain(subject),
                    "found": json.loads(text),
                }
                record = {"format": FORMAT, "machines": sections}
                write_whole(self.path, json.dumps(record, indent=1).encode())
        except OSError as error:
            warnings.warn(
                f"{self.path} cannot be written ({error.strerror}): the next start measures anew, "
                "and may divide prompts between CPU and GPU in another way; make it writable, or "
                "set XDG_CACHE_HOME to a folder of yours",
                RuntimeWarning,
                stacklevel=3,
            )
        return quantity.from_json(json.loads(text))

    def _load(self) -> list[Section]:
        """The file's sections; a file that is there and says nothing is worth a warning."""
        try:
            return sections_of(json.loads(self.path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError, RecursionError) as error:
            warnings.warn(
                f"{self.path} cannot be used ({error}): all has to be measured anew",
                RuntimeWarning,
                stacklevel=4,
            )
            return []

    def _section(self, sections: list[Section]) -> Section | None:
        return next((s for s in sections if s["hardware"] == self.machine.hardware), None)

    def _forced_otherwise(self, sections: list[Section], name: str) -> str:
        """How ``FIDDLER_ISA`` differs where the quantity called ``name`` is known; or nothing."""
        now = self.machine.hardware
        others = [s["hardware"] for s in sections if _subjects(s, name)]
        return next(filter(None, (forced_otherwise(other, now) for other in others)), "")

    def _new_section(self) -> Section:
        machine = self.machine
        return {**plain({"hardware": machine.hardware, "versions": machine.versions})} | {
            "measured": {}
        }

    def _found(
        self, section: Section, quantity: Quantity[T], subject: Mapping[str, Any]
    ) -> T | None:
        key = key_of(quantity.name, subject)
        if key not in section["measured"]:
            return None
        try:
            record = section["measured"][key]
            if not isinstance(record, dict) or record.get("of") != plain(subject):
                raise ValueError("it is of something else")
            return quantity.from_json(record.get("found"))
        except (ValueError, RecursionError) as error:
            text = f"{self.path} cannot be used ({error}): {quantity.name} has to be measured anew"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
            return None


def _subjects(section: Section, name: str) -> list[Mapping[str, Any]]:
    """What the quantity called ``name`` was measured of."""
    records = [record for key, record in section["measured"].items() if key.startswith(f"{name}-")]
    return [r["of"] for r in records if isinstance(r, dict) and isinstance(r.get("of"), dict)]


def default_path() -> Path:
    """Beside the number of workers: ``$XDG_CACHE_HOME/fiddler/calibration.json``."""
    return cache_file().parent / "calibration.json"


def key_of(name: str, subject: Mapping[str, Any]) -> str:
    """``NAME-HASH``; equal facts have equal keys, in whatever order they were given."""
    digest = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:16]}"


def sections_of(record: Any) -> list[Section]:
    """The machines of a file's ``record``; ValueError for what is no such file."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"it is no calibration of format {FORMAT}")
    sections = record.get("machines")
    wanted = ("hardware", "versions", "measured")
    if not isinstance(sections, list) or not all(
        isinstance(s, dict) and all(isinstance(s.get(part), dict) for part in wanted)
        for s in sections
    ):
        raise ValueError("its machines are not described")
    return sections


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else who asks for the same lock is within; the system releases it if we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        with suppress(OSError):  # a file system without locks: the last one wins
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
