"""Kernels and the host telling each other a number, by words of mapped host memory.

A kernel that publishes work rings once all of its programs have stored theirs; a kernel that needs
results waits for a word before it reads them. A stream's own stores and waits do the same, for 5 us
each on one H200. What waits here holds the device's time limit for kernels, where one is set.

Ordering: who reads the rung number sees every store of the launch. What was stored before the
awaited number is seen by what was loaded behind the wait's result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bell:
    """``number`` in the lower half of ``word``, int64 ``[1]`` in mapped host memory."""

    word: Tensor
    number: int

    def check(self) -> None:
        """Assert what kernels rely on."""
        assert (self.word.shape, self.word.dtype) == ((1,), torch.int64)


@dataclass(frozen=True, slots=True)
class Ring:
    """What the kernel that publishes work stores at its end: 0 to ``clear``, then ``bell``.

    ``clear`` is a word as a bell's. ``bell`` None: the stream rings. ``num_done`` (int32 ``[1]`` on
    the device) is 0 between launches: each leaves it so.
    """

    clear: Tensor
    bell: Bell | None = None
    num_done: Tensor | None = None

    def check(self, device: torch.device) -> None:
        """Assert what kernels on ``device`` rely on."""
        Bell(self.clear, 0).check()
        assert (self.bell is None) == (self.num_done is None)
        if self.bell is not None and self.num_done is not None:
            self.bell.check()
            assert (self.num_done.shape, self.num_done.dtype) == ((1,), torch.int32)
            assert self.num_done.device == device


def answer(awaited: Bell, then: Bell) -> None:
    """Put on the stream: wait for one bell, then ring the other. Safe in a CUDA graph."""
    awaited.check()
    then.check()
    _answer_kernel[(1,)](awaited.word, awaited.number, then.word, then.number, num_warps=1)


@triton.jit(do_not_specialize=["awaited", "number"])
def _answer_kernel(awaited_ptr, awaited, bell_ptr, number):
    bell_ptr += wait_for(awaited_ptr, awaited)
    ring_after_all(bell_ptr, bell_ptr, number, True)


@triton.jit
def ring_after_all(done_ptr, bell_ptr, number, IS_ALONE: tl.constexpr):
    """Store ``number`` once all programs of the launch, of two axes, are here.

    ``IS_ALONE`` says that there is one.
    """
    tl.debug_barrier()  # every thread's stores come before one thread's release
    if IS_ALONE:
        _store_release(bell_ptr, number)
    else:
        num_programs = tl.num_programs(0) * tl.num_programs(1)
        if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="sys") == num_programs - 1:
            tl.store(done_ptr, 0)
            _store_release(bell_ptr, number)


@triton.jit
def _store_release(word_ptr, number):
    # by one thread: a second store could come when the number has been answered
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred is_first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 is_first, thread, 0;
        @is_first st.release.sys.global.u32 [$1], $2;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [word_ptr, number],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for(word_ptr, number):
    """Return 0 when the word is ``number``. Add it to addresses, to load behind the wait."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .pred waits;
        .reg .u32 word;
        again:
        ld.acquire.sys.global.u32 word, [$1];
        setp.ne.u32 waits, word, $2;
        @waits bra again;
        sub.u32 $0, word, $2;
        }
        """,
        "=r,l,r",
        [word_ptr, number],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
