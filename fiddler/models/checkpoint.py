"""Safetensors files of a model folder: checked from their headers, then read or looked at in place.

Ordering: files are opened and mapped when the checkpoint opens and never change, so any number of
threads may read at once. A tensor that is a view keeps its file mapped, also after ``close()``.
"""

import mmap
import weakref
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from fiddler.errors import CheckpointError
from fiddler.models.config import ModelConfig
from fiddler.models.json_file import read_json
from fiddler.models.manifest import all_parts
from fiddler.models.safetensors_header import Entry, read_header
from fiddler.models.tensor_reader import StoredFile, read_bytes, read_numbers

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXPERT = ".experts."  # in the name of every routed expert's tensor
_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_PACKED = {"U8": "uint8"}


class Checkpoint:
    """The tensors of one folder, by name."""

    def __init__(self, folder: Path, entries: dict[str, tuple[Path, Entry]]) -> None:
        self.folder = folder
        self._entries = entries
        paths = dict.fromkeys(path for path, _ in entries.values())
        self._maps = {path: _map(path) for path in paths}
        self._files = {path: StoredFile(path) for path in paths}
        weakref.finalize(self, _close_all, [*self._files.values()])

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read all headers and open the files, no data; damage is a :class:`CheckpointError`."""
        folder = Path(folder)
        if (folder / INDEX).exists():
            return cls(folder, _sharded_entries(folder))
        return cls(folder, _entries_of(_single_file(folder)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(self._files)

    def close(self) -> None:
        """Let go of the files; mapped memory goes back when the last view does."""
        self._maps.clear()
        _close_all(self._files.values())

    def check(self, config: ModelConfig) -> None:
        """Verify that every tensor of ``config`` is here with its shape and a readable dtype."""
        for part in all_parts(config):
            self._entry(part.name, part.shape, _PACKED if part.is_packed else _TORCH_NAMES)

    def tensor(self, name: str, shape: tuple[int, ...]) -> "torch.Tensor":
        """Return a view of the mapped file, as stored. Do not write to it."""
        import torch

        path, entry = self._entry(name, shape, _TORCH_NAMES)
        dtype = _torch_dtype(entry)
        flat = torch.frombuffer(
            self._maps[path], dtype=dtype, count=prod(shape), offset=entry.begin
        )
        return flat.view(shape)

    def forget(self, name: str) -> None:
        """Drop the resident pages of a tensor; a later read takes them from the file again."""
        path, entry = self._entries[name]
        begin = entry.begin - entry.begin % mmap.PAGESIZE
        self._maps[path].madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def dtype(self, name: str) -> str | None:
        """The type of a tensor as safetensors spells it; None if there is none."""
        return self._entries[name][1].dtype if name in self._entries else None

    def raw(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> tuple[str, memoryview]:
        """Return the type of a tensor, one of ``dtypes``, and its mapped bytes, not to be written.

        For types that torch does not have, and for who needs no torch.
        """
        path, entry = self._entry(name, shape, dtypes)
        return entry.dtype, memoryview(self._maps[path])[entry.begin : entry.end]

    def read(self, name: str, out: "torch.Tensor") -> bool:
        """Fill ``out`` with the tensor, which has its shape; whether all numbers are finite."""
        path, entry = self._entry(name, tuple(out.shape), _TORCH_NAMES)
        return read_numbers(self._files[path], entry.begin, out, _torch_dtype(entry))

    def read_packed(self, name: str, out_B: "torch.Tensor") -> np.ndarray:
        """Fill ``out_B`` with a packed expert; its bytes on the host, good until the next read."""
        path, entry = self._entry(name, tuple(out_B.shape), _PACKED)
        return read_bytes(self._files[path], entry.begin, out_B)

    def _entry(
        self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]
    ) -> tuple[Path, Entry]:
        if name not in self._entries:
            raise CheckpointError(f"{self.folder} has no tensor {name}", hint="is it complete?")
        path, entry = self._entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(entry.shape)}, not {list(shape)} as the"
                " config.json says"
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry.dtype}; fiddler reads {', '.join(dtypes)}"
            )
        return path, entry


def stored_dtype(folder: Path) -> str | None:
    """Return torch's name of the widest dtype that a routed expert is stored in, from the headers.

    None where the folder has no weights. ``config.json`` may say something else: the files count.
    """
    found = {
        _TORCH_NAMES[entry.dtype]
        for path in folder.glob("model*.safetensors")
        for name, entry in read_header(path).items()
        if EXPERT in name and entry.dtype in _TORCH_NAMES
    }
    return next((name for name in ("float32", "float16", "bfloat16") if name in found), None)


def _single_file(folder: Path) -> Path:
    path = folder / SINGLE
    if not path.exists():
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".gguf"))
        found = f"; it has {others[0]}, which fiddler does not read" if others else ""
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}{found}",
            hint="take a repository with safetensors weights",
        )
    return path


def _entries_of(path: Path) -> dict[str, tuple[Path, Entry]]:
    return {name: (path, entry) for name, entry in read_header(path).items()}


def _sharded_entries(folder: Path) -> dict[str, tuple[Path, Entry]]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    headers: dict[str, dict[str, tuple[Path, Entry]]] = {}
    for name, shard in weight_map.items():
        if shard not in headers:
            headers[shard] = _entries_of(_shard(folder, shard))
        if name not in headers[shard]:
            raise CheckpointError(
                f"{folder / shard} lacks the tensor {name} that {INDEX} puts there"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _shard(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise CheckpointError(f"{folder / INDEX} names {name!r}, which is no file of this folder")
    if not (folder / name).exists():
        raise CheckpointError(
            f"{folder} lacks the shard {name} that {INDEX} names", hint="download the model again"
        )
    return folder / name


def _torch_dtype(entry: Entry) -> "torch.dtype":
    import torch

    found: torch.dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
    return found


def _close_all(files: Iterable[StoredFile]) -> None:
    for file in files:
        file.close()


def _map(path: Path) -> mmap.mmap:
    # private and writable, though nobody writes: torch warns about read-only buffers
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
