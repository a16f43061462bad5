"""Which experts every token of a text chose, in their order, and the file that keeps it.

The file is an ``npz`` of four arrays: expert ids, token ids, where windows begin, and a JSON text
with the rest. A model of 48 layers and 8 choices takes about 350 bytes a token.

Shapes: T tokens, W windows, L layers, M layers with experts, K top-k.
"""

import io
import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from cpu_kernels.weight_kind import BITS
from fiddler.errors import ProfileError
from offload.demand import Demand
from offload.plan import Footprint
from offload.whole_file import write_whole

VERSION = 1
MAGIC = b"PK"  # of the archive that an npz file is
REMAKE = "make a new one with: fiddler profile MODEL --text FILE --trace trace.npz"
# what numpy and zipfile raise for files that are cut short or changed
_DAMAGE = (ValueError, KeyError, EOFError, RuntimeError, MemoryError, BadZipFile, zlib.error)
ACTIVATIONS = {"f32", "bf16", "int8"}
MOST = 1 << 60  # bytes or numbers of a model
_ARRAYS = ("about", "experts", "tokens", "starts")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routes of a text's tokens, as the model's routers chose them.

    ``experts_TMK``: row m is of layer ``footprint.moe_layers[m]``. ``tokens_T`` are token ids;
    windows, which know nothing of each other, begin at ``starts_W``. ``demand`` is what a token
    asks of a GPU beside them; traces of earlier releases do not tell.
    """

    model: str
    revision: str | None
    corpus_sha256: str
    footprint: Footprint
    experts_TMK: npt.NDArray[np.int16]
    tokens_T: npt.NDArray[np.int32]
    starts_W: npt.NDArray[np.int64]
    demand: Demand | None = None


class TraceRecorder:
    """Gathers the windows of a text, as :func:`fiddler.profiling.profile_corpus` shows them."""

    def __init__(self, footprint: Footprint, demand: Demand) -> None:
        self._footprint, self._demand = footprint, demand
        self._ids: list[Sequence[int]] = []
        self._routes: list[npt.NDArray[np.int16]] = []

    def __call__(self, ids: Sequence[int], routes_TLK: npt.NDArray[np.int16]) -> None:
        self._ids.append(ids)
        self._routes.append(routes_TLK[:, list(self._footprint.moe_layers)])

    def trace(self, model: str, revision: str | None, corpus_sha256: str) -> RoutingTrace:
        """All of it, of at least one window."""
        ends = np.cumsum([len(ids) for ids in self._ids])
        return RoutingTrace(
            model=model,
            revision=revision,
            corpus_sha256=corpus_sha256,
            footprint=self._footprint,
            experts_TMK=np.concatenate(self._routes),
            tokens_T=np.concatenate([np.asarray(ids, np.int32) for ids in self._ids]),
            starts_W=np.array([0, *ends[:-1]], np.int64),
            demand=self._demand,
        )


def save_trace(trace: RoutingTrace, path: Path | str) -> None:
    """Write ``trace`` whole or not at all; raises :class:`ProfileError` where it cannot be."""
    about = {
        "version": VERSION,
        "model": trace.model,
        "revision": trace.revision,
        "corpus_sha256": trace.corpus_sha256,
        "footprint": asdict(trace.footprint),
        "demand": trace.demand and asdict(trace.demand),
    }
    width = np.uint8 if trace.footprint.num_experts <= 256 else np.int16
    content = io.BytesIO()
    np.savez_compressed(
        content,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        experts=trace.experts_TMK.astype(width),
        tokens=trace.tokens_T,
        starts=trace.starts_W,
    )
    try:
        write_whole(Path(path), content.getvalue())
    except OSError as error:
        raise ProfileError(f"the trace {path} cannot be written: {error.strerror}") from error


def load_trace(path: Path | str) -> RoutingTrace:
    """Read a trace; raises :class:`ProfileError` for a file that is missing, damaged or another."""
    path = Path(path)
    arrays = _read(path)
    try:
        about = json.loads(arrays["about"].astype(np.uint8).tobytes())
        version = about["version"]
        model, revision, text = (about[name] for name in ("model", "revision", "corpus_sha256"))
        footprint = _footprint(about["footprint"])
        demand = _demand(about.get("demand"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "what it says of its model cannot be read") from error
    if version != VERSION:
        raise _damaged(path, f"its version is {version!r}, this fiddler reads {VERSION}")
    if not all(isinstance(name, str) for name in (model, text, revision or "")):
        raise _damaged(path, "its model has no name")
    _check(arrays, footprint, path)
    return RoutingTrace(
        model=model,
        revision=revision,
        corpus_sha256=text,
        footprint=footprint,
        experts_TMK=arrays["experts"].astype(np.int16),
        tokens_T=arrays["tokens"].astype(np.int32),
        starts_W=arrays["starts"].astype(np.int64),
        demand=demand,
    )


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise _damaged(path, "it is no npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in _ARRAYS}
    except OSError as error:
        raise ProfileError(f"the trace {path} cannot be read: {error.strerror}") from error
    except _DAMAGE as error:
        raise _damaged(path, "it is incomplete or of another kind") from error


def _footprint(record: Any) -> Footprint:
    """From JSON types; raises KeyError, TypeError or ValueError."""
    # what a release did not have yet has a default
    known = [field.name for field in fields(Footprint) if field.name in record]
    values = {name: record[name] for name in known}
    names = ("moe_layers", "layer_bytes", "order")
    lists: dict[str, Any] = {name: tuple(values.pop(name)) for name in names}
    numbers = [*values.values(), *(number for listed in lists.values() for number in listed)]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a size is no count")
    found = Footprint(**values, **lists)
    if not found.moe_layers or not 0 < found.top_k <= found.num_experts or not found.expert_bytes:
        raise ValueError("no such model")
    return found


def _demand(record: Any) -> Demand | None:
    """The same; None where there is none."""
    if record is None:
        return None
    found = Demand(**{**record, "layers": ()})
    names = {"codes": found.codes, "activations": found.activations, "few": found.few}
    sizes = [value for name, value in record.items() if name not in {"layers", *names}]
    if not all(isinstance(size, int | float) and 0 <= size < MOST for size in sizes):
        raise ValueError("a size is none")
    if found.codes not in BITS or not {found.activations, found.few} <= ACTIVATIONS:
        raise ValueError("no such numbers")
    if not (found.on_gpu and found.expert_bytes):
        raise ValueError("no such model")
    return found


def _check(arrays: dict[str, npt.NDArray[Any]], footprint: Footprint, path: Path) -> None:
    experts_TMK, tokens_T, starts_W = (arrays[name] for name in _ARRAYS[1:])
    if not all(np.issubdtype(a.dtype, np.integer) for a in (experts_TMK, tokens_T, starts_W)):
        raise _damaged(path, "its ids are no whole numbers")
    shape = (len(tokens_T), len(footprint.moe_layers), footprint.top_k)
    if experts_TMK.shape != shape or tokens_T.ndim != 1 or not len(tokens_T):
        raise _damaged(path, f"its routes are {experts_TMK.shape}, not {shape}")
    if experts_TMK.min() < 0 or experts_TMK.max() >= footprint.num_experts:
        raise _damaged(path, "it names experts that its model does not have")
    begins = [*starts_W.ravel().tolist(), len(tokens_T)]
    if begins[0] != 0 or any(a >= b for a, b in itertools.pairwise(begins)):
        raise _damaged(path, "its windows are not in order")


def _damaged(path: Path, reason: str) -> ProfileError:
    return ProfileError(f"{path} is not a usable trace: {reason}", hint=REMAKE)
