"""A second stream for what may run beside a step or the rest of it; nothing without a GPU.

Ordering: what is put on it within :meth:`SideStream.beside` follows all that the current stream has
by then; :meth:`SideStream.join` lets the current stream wait for it, both also within a CUDA graph,
and :meth:`SideStream.synchronize` the host. A tensor made on the side may be used until the next
``beside``, on the stream that joined it; one that the side reads has to be kept until ``join``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Of one device; for one user at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within does not hold what the current stream gets afterwards."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the side."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def synchronize(self) -> None:
        """Let the host wait for the side."""
        if self._stream is not None:
            self._stream.synchronize()
