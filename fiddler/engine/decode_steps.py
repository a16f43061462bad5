"""Steps in which every request decodes one token: the bucket of each, and what is under way.

A step takes the smallest bucket that its requests fit; :mod:`fiddler.engine.decode_graph` says what
a bucket is and in which order the device sees their work.

The next step may be put behind one that is under way, before anybody knows what that draws: its
tokens are taken on the device. So the device does not wait for Python between two tokens.

Shapes: L layers, T tokens, K choices.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fiddler.engine.decode_graph import Bucket, Decoded, DecodeSetup, SharedBuffers
from fiddler.engine.scheduler import Chunk
from fiddler.errors import WorkerError
from fiddler.models.buckets import bucket_for, largest_bucket
from offload.step_routing import StepRouting


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A step on the stream, for :meth:`DecodeSteps.collect`."""

    chunks: Sequence[Chunk]
    bucket: Bucket
    side: int


class DecodeSteps:
    """Runs steps in which every request decodes one token."""

    def __init__(self, setup: DecodeSetup) -> None:
        self._setup = setup
        self._largest = largest_bucket(setup.max_num_seqs)
        self._shared: SharedBuffers | None = None
        self._buckets: dict[tuple[int, bool], Bucket] = {}

    def bucket(self, chunks: Sequence[Chunk], is_drawn: bool = False) -> int | None:
        """The bucket of a step, or None if it has to run another way.

        ``is_drawn``: its expert ids will be given to :meth:`start`.
        """
        num_rows = bucket_for(len(chunks), self._largest)
        if num_rows is None or not self._bucket(num_rows, is_drawn).staging.fits(chunks):
            return None
        return num_rows

    def start(
        self, chunks: Sequence[Chunk], num_rows: int, drawn_LTK: np.ndarray | None = None
    ) -> UnderWay:
        """Put a step in the bucket of ``num_rows`` on the stream, while none is under way.

        ``drawn_LTK``: see :class:`StepBatch`. WorkerError if the CPU workers failed while it was
        captured; the next step has new ones.
        """
        with self._new_workers_after_errors():
            bucket = self._bucket(num_rows, drawn_LTK is not None)
            bucket.prepare()
            return UnderWay(chunks, bucket, bucket.put(chunks, drawn_LTK))

    def may_follow(self, step: UnderWay, chunks: Sequence[Chunk]) -> bool:
        """Whether ``chunks``, the next tokens of the same requests, may be put behind ``step``."""
        return not step.bucket.must_move and step.bucket.staging.fits(chunks)

    def start_next(
        self, step: UnderWay, chunks: Sequence[Chunk], drawn_LTK: np.ndarray | None = None
    ) -> UnderWay:
        """Put a step behind the one that is under way, which draws its tokens."""
        bucket, side = step.bucket, 1 - step.side
        with self._new_workers_after_errors():
            return UnderWay(chunks, bucket, bucket.put(chunks, drawn_LTK, side, is_next=True))

    def collect(self, step: UnderWay) -> Decoded:
        """Wait for a step. What those requests chose that are finished by now is not counted.

        WorkerError if the CPU workers failed; then nothing is under way, and the next step has new
        ones.
        """
        with self._new_workers_after_errors():
            rows = [r for r, c in enumerate(step.chunks) if not c.request.is_finished]
            return step.bucket.collect(step.side, len(step.chunks), rows)

    def pulled_bytes(self, step: StepRouting) -> float:
        """See :meth:`offload.decode_experts.DecodeExperts.pulled_bytes`."""
        return 0.0 if self._shared is None else self._shared.experts.pulled_bytes(step)

    def settle(self) -> None:
        """Before a step that runs another way: every expert is in its one place."""
        self._setup.settle()

    def clear(self) -> None:
        """Drop graphs and buffers; the next step makes new ones."""
        self._buckets.clear()
        self._shared = None

    def abandon(self) -> None:
        """Wait until nothing is under way, for what it gives nobody wants.

        Workers may have failed in a step that ran another way: then the next one has new ones too.
        """
        with contextlib.suppress(WorkerError), self._new_workers_after_errors():
            self._wait()
        if self._setup.workers_failed():
            self._renew_workers()

    def _wait(self) -> None:
        if self._shared is not None:
            self._shared.wait()

    @contextlib.contextmanager
    def _new_workers_after_errors(self) -> Iterator[None]:
        try:
            yield
        except WorkerError:
            with contextlib.suppress(WorkerError):
                self._wait()  # a step behind the one that failed uses what is dropped now
            self._renew_workers()
            raise

    def _renew_workers(self) -> None:
        self.clear()
        self._setup.renew_workers()

    def _bucket(self, num_rows: int, is_drawn: bool) -> Bucket:
        key = num_rows, is_drawn
        if key not in self._buckets:
            self._shared = self._shared or SharedBuffers(self._setup, self._largest)
            self._buckets[key] = Bucket(self._setup, self._shared, *key)
        return self._buckets[key]
