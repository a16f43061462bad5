"""The folder that is made: beside its place until it is whole, with a journal of finished files.

Ordering: a file is on the disk before the journal names it, and all of them before the folder takes
its name. So whatever interrupts the run, the folder with the name is an old one or a whole one, and
what the journal names need not be made again.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from fiddler.errors import CheckpointError, QuantizeError
from fiddler.hub.cache import free_bytes, gigabytes
from fiddler.models.checkpoint import INDEX
from fiddler.quantize.lock import LOCK, hold
from fiddler.quantize.place import beside, check_replaceable, place_of, remove_model
from fiddler.quantize.plan import Shard
from fiddler.text.model_files import read_json_object

JOURNAL = "quantize.json"
SMALL_BYTES = 64 << 20  # for the copied files and headers
BLOCK = 512  # bytes: the unit of st_blocks, whatever the disk's own
COPIED = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.jinja", "additional_chat_templates", "generation_config.json", "LICENSE*"),
)

Notes = dict[str, Any]  # what is told of a finished file


@dataclass(slots=True)
class Target:
    """``folder`` in the making, as ``partial``. ``job`` says what is made of what, in JSON.

    ``chosen``: what was measured and decided before the first file, in JSON; None: nothing yet.
    ``lock``: keeps other runs out of ``partial``, once that is there.
    """

    folder: Path
    partial: Path
    job: dict[str, Any]
    finished: dict[str, Notes]
    chosen: Any = None
    has_name: bool = False  # an earlier run was interrupted after the folder had taken its name
    lock: IO[str] | None = None

    @classmethod
    def open(cls, folder: Path, job: dict[str, Any], *, resume: bool) -> "Target":
        """A new one, or that of an interrupted run of the same job; nothing is written yet.

        :class:`QuantizeError` if there is something that must not be replaced, another job's part,
        one that is being written, or this one's and ``resume`` was not asked for.
        """
        folder = place_of(folder)
        partial = beside(folder, "partial")
        for made in (folder, beside(folder, "replaced")):
            check_replaceable(made)
        if resume and (whole := _of_whole(folder, job)) is not None:
            return cls(folder, partial, job, whole["finished"], whole["chosen"], has_name=True)
        if not _is_begun(partial):
            return cls(folder, partial, job, {})
        lock = hold(partial)  # before its journal is read, which another run may be writing
        try:
            journal = _journal(partial, job, resume=resume)
        except BaseException:
            lock.close()
            raise
        finished = _finished(partial, journal)
        return cls(folder, partial, job, finished, journal["chosen"], lock=lock)

    def close(self) -> None:
        """Let other runs in."""
        if self.lock is not None:
            self.lock.close()

    def begin(self) -> None:
        """Make the folder, with a journal; where that fails nothing is left of a new one.

        :class:`QuantizeError` if another run has just begun there.
        """
        is_new = not self.partial.exists()
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or hold(self.partial)
            self._write_journal()
        except OSError as error:
            if is_new:
                shutil.rmtree(self.partial, ignore_errors=True)
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise QuantizeError(
                    f"{self.partial} cannot be written: {error.strerror}",
                    hint="choose an -o in a folder that can be written",
                ) from error
            raise

    def check_space(self, shards: Sequence[Shard]) -> None:
        """Raise :class:`QuantizeError` if what is still missing does not fit on the disk."""
        needed, free = self._needed(shards), free_bytes(self.partial)
        if needed > free:
            raise QuantizeError(
                f"{self.folder} needs {gigabytes(needed)} more on the disk, which has"
                f" {gigabytes(free)} free",
                hint=f"free {gigabytes(needed - free)}{self._again()}, or choose another -o",
            )

    @contextmanager
    def writing(self, shards: Sequence[Shard]) -> Iterator[None]:
        """Turn a disk that is full, or takes no large files, into a sentence."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EFBIG:
                largest = gigabytes(max(shard.nbytes for shard in shards))
                raise QuantizeError(
                    f"{self.partial} takes no file of {largest}: its disk or ulimit -f forbids it",
                    hint=f"raise the limit{self._again()}, or choose an -o elsewhere",
                ) from error
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # of a disk or a quota that is full, nothing is free that we could count
            needed = gigabytes(self._needed(shards))
            raise QuantizeError(
                f"the disk of {self.partial} is full, {needed} more are needed",
                hint=f"free {needed}{self._again()}",
            ) from error

    def choose(self, chosen: Any) -> None:
        """Note what was decided: who goes on with this keeps to it."""
        self.chosen = chosen
        self._write_journal()

    def finish(self, shard: Shard, notes: Notes) -> None:
        """Note a file that is whole and on the disk."""
        self.finished[shard.name] = {"bytes": (self.partial / shard.name).stat().st_size, **notes}
        self._write_journal()

    def complete(self, source: Path, shards: Sequence[Shard], config: dict[str, Any]) -> None:
        """Add the small files and give the folder its name; an old one goes."""
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        total = sum(shard.nbytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _copy_small_files(source, self.partial)
        _write_json(self.partial / INDEX, index)
        _write_json(self.partial / "config.json", config)
        if self.folder.exists():
            self._remove_old()  # which an earlier run may have left
            self.folder.rename(beside(self.folder, "replaced"))
        self.partial.rename(self.folder)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove the old folder, then the journal: while it is there, --resume comes back here."""
        self._remove_old()
        for name in (LOCK, JOURNAL):
            (self.folder / name).unlink(missing_ok=True)

    def _remove_old(self) -> None:
        old = beside(self.folder, "replaced")
        if old.exists():
            remove_model(old)

    def _again(self) -> str:
        """What else a hint says where something is kept."""
        return " and run the same command with --resume" if self.partial.exists() else ""

    def _needed(self, shards: Sequence[Shard]) -> int:
        """Bytes that must be free to go on; those of files half written come back."""
        missing = [shard for shard in shards if shard.name not in self.finished]
        half = sum(_disk_bytes(self.partial / shard.name) for shard in missing)
        return max(0, sum(shard.nbytes for shard in missing) - half) + SMALL_BYTES

    def _write_journal(self) -> None:
        journal = {"job": self.job, "chosen": self.chosen, "finished": self.finished}
        _write_json(self.partial / JOURNAL, journal)


def _disk_bytes(path: Path) -> int:
    """What a file takes on its disk."""
    return path.stat().st_blocks * BLOCK if path.exists() else 0


def _is_begun(partial: Path) -> bool:
    """Whether an interrupted run left something; :class:`QuantizeError` if it is another's."""
    if (partial / JOURNAL).exists():
        return True
    # a run may end before its first journal is whole
    names = {LOCK, _new(JOURNAL)}
    is_nothing = partial.is_dir() and {path.name for path in partial.iterdir()} <= names
    if partial.exists() and not is_nothing:
        raise QuantizeError(f"{partial} is in the way", hint="remove it, or choose another -o")
    return False


def _journal(partial: Path, job: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """What an interrupted run of the same job has noted."""
    try:
        journal = read_json_object(partial / JOURNAL)
    except CheckpointError:
        journal = {}
    for field, kind in (("job", dict), ("finished", dict), ("chosen", list | None)):
        if not isinstance(journal.get(field), kind):
            raise QuantizeError(
                f"{partial / JOURNAL} is damaged: {field!r} is not what fiddler writes there",
                hint=f"remove {partial}, or choose another -o",
            )
    theirs = journal["job"]
    if theirs != job:
        differing = sorted(key for key in {*theirs, *job} if theirs.get(key) != job.get(key))
        raise QuantizeError(
            f"{partial} was begun with another {' and '.join(differing)}",
            hint="use the same options and files, remove it, or choose another -o",
        )
    if not resume:
        raise QuantizeError(
            f"{partial} is what an interrupted run left",
            hint="add --resume to go on with it, or remove it",
        )
    return journal


def _of_whole(folder: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """The journal of this job in a folder that has its name and all that the journal says."""
    if not (folder / JOURNAL).exists():
        return None
    try:
        journal = _journal(folder, job, resume=True)
    except QuantizeError:  # of another job: the folder is an old model like others
        return None
    return journal if _finished(folder, journal) == journal["finished"] else None


def _finished(partial: Path, journal: dict[str, Any]) -> dict[str, Notes]:
    """Files of an interrupted run that are as its journal says."""
    finished: dict[str, Any] = journal.get("finished", {})
    return {name: notes for name, notes in finished.items() if _is_whole(partial / name, notes)}


def _is_whole(path: Path, notes: object) -> bool:
    if not isinstance(notes, dict) or not notes.keys() >= {"bytes", "layer", "unfitted"}:
        return False
    return path.is_file() and path.stat().st_size == notes["bytes"]


def _copy_small_files(source: Path, target: Path) -> None:
    """Tokenizer, templates and licence; of a name on the hub the files are links."""
    for path in sorted(source.iterdir()):
        if not any(fnmatchcase(path.name, pattern) for pattern in COPIED):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace the file at once, when the new one is on the disk."""
    part = path.with_name(_new(path.name))
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _new(name: str) -> str:
    """What a file is called until it is whole."""
    return f"{name}.new"
