"""What was measured on this machine, kept for every later start.

Two measurements of one thing differ by noise, and so does what follows from them: who computes an
expert, hence how its sums are rounded, hence now and then a token. So each thing is measured once
and read from then on, as long as all that it depends on stays the same.

Every measurement is a JSON file of its own, ``{"of": what it depends on, "found": the result}``,
written whole or not at all and named by a hash of its "of". Of two starts that measure at the same
time both take what the first one has stored.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cpu_kernels.thread_count import cache_file, fingerprint_of
from cpu_kernels.topology import read_machine
from offload.hardware import Hardware

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Quantity(Generic[T]):
    """Something that can be measured. ``name`` begins its files' names.

    ``from_json`` undoes ``to_json`` and raises ValueError for what cannot be a result.
    """

    name: str
    to_json: Callable[[T], Any]
    from_json: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The measurements of one machine, in a folder that is made when it is needed.

    ``machine`` is what every measurement depends on, as JSON types.
    """

    folder: Path
    machine: Mapping[str, Any]

    def once(
        self, quantity: Quantity[T], subject: Mapping[str, Any], measure: Callable[[], T]
    ) -> T:
        """The quantity of ``subject`` (JSON types), measured if no start before this one has.

        A RuntimeWarning says where a file is damaged or cannot be written or read; the quantity is
        then measured.
        """
        facts = {"machine": dict(self.machine), "subject": dict(subject)}
        of = json.loads(json.dumps(facts))  # as a file gives it back
        path = self.folder / file_name(quantity.name, of)
        found = _load(path, quantity, of)
        if found is None:
            text = json.dumps({"of": of, "found": quantity.to_json(measure())})
            # another start may have measured meanwhile
            found = _load(path, quantity, of, warns=False)
            if found is None:
                _store(path, text)
                found = quantity.from_json(json.loads(text)["found"])
        return found


def default_folder() -> Path:
    """Beside the number of workers: ``$XDG_CACHE_HOME/fiddler/measured``."""
    return cache_file().parent / "measured"


def machine_facts(hardware: Hardware, version: str) -> dict[str, Any]:
    """What every measurement depends on: CPU and the kernels' sources, GPU, driver, fiddler."""
    return {
        "cpu": hardware.cpu_name,
        **{f"cpu_{name}": fact for name, fact in fingerprint_of(read_machine()).items()},
        "gpu": hardware.gpu_name,
        "driver": hardware.driver,
        "version": version,
    }


def file_name(name: str, of: Mapping[str, Any]) -> str:
    """``NAME-HASH.json``; equal facts have equal names, in whatever order they were given."""
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:16]}.json"


def _load(
    path: Path, quantity: Quantity[T], of: Mapping[str, Any], *, warns: bool = True
) -> T | None:
    """What the file says, or None; a file that is there and says nothing is worth a warning."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("of") != of:
            raise ValueError("it is of something else")
        return quantity.from_json(record.get("found"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        if warns:
            text = f"{path} cannot be used ({error}): {quantity.name} is measured anew"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        return None


def _store(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            with whole.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            whole.replace(path)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({error.strerror}): the next start measures anew, and may "
            "divide prompts between CPU and GPU in another way",
            RuntimeWarning,
            stacklevel=3,
        )
