"""What ``fiddler doctor`` reads of host memory and of what is kept between starts: text in, facts
out."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder that is kept between starts; ``variable`` moves it. It may not exist yet."""

    folder: str
    num_bytes: int
    is_writable: bool
    variable: str


def memory_facts() -> dict[str, Any]:
    """Pages, nodes and limits of this process."""
    from cpu_kernels.arena import NODES_WITH_MEMORY, memory_nodes
    from cpu_kernels.topology import numbers_of_list

    found: dict[str, Any] = {"memlock_bytes": memlock_bytes()}
    if HUGE_PAGES.exists():
        found["huge_pages"] = chosen_word(HUGE_PAGES.read_text())
    if NODES_WITH_MEMORY.exists():
        found["memory_nodes"] = len(list(numbers_of_list(NODES_WITH_MEMORY.read_text()))) or None
        found["allowed_nodes"] = len(memory_nodes()) or None
    return found


def chosen_word(text: str) -> str | None:
    """What stands in brackets, as in ``always [madvise] never``."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else None


def memlock_bytes() -> int | None:
    """Bytes that this process may lock; None: any number, or no such limit here."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def cache_facts() -> dict[str, Any]:
    """Compiled kernels and measurements; nothing where FIDDLER_ISA keeps kernels from loading."""
    try:
        from cpu_kernels.thread_count import cache_file
    except ValueError:
        return {}
    triton = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folders = {
        "CPU kernels": (_numba_folder(), "NUMBA_CACHE_DIR"),
        "GPU kernels": (Path(triton) if triton else home / ".triton" / "cache", "TRITON_CACHE_DIR"),
        "measurements": (cache_file().parent, "XDG_CACHE_HOME"),
    }
    return {
        "caches": {
            name: cache_of(folder, variable)
            for name, (folder, variable) in folders.items()
            if folder is not None
        }
    }


def cache_of(folder: Path, variable: str) -> Cache:
    """The facts about one folder."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Cache(
        folder=str(folder),
        num_bytes=sum(_size(path) for path in folder.rglob("*")) if folder.is_dir() else 0,
        is_writable=existing.is_dir() and os.access(existing, os.W_OK),
        variable=variable,
    )


def _size(path: Path) -> int:
    """0 for what is no file, or gone again."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _numba_folder() -> Path | None:
    """Where Numba keeps what is compiled; None: nowhere, so that every start compiles."""
    from cpu_kernels.compiled import cache_folder, needs_compile

    return cache_folder(needs_compile)
