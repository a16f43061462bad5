"""Kernels and the host telling each other a number, by words of mapped host memory.

A kernel that publishes work rings once all of its programs have stored theirs; a kernel that needs
results waits for a word before it reads them. A stream's own stores and waits do the same, for 5 us
each on one H200. What waits here holds the device's time limit for kernels, where one is set.

Ordering: who reads the rung number sees every store that a program made before it came to
``ring_after_all``. What was stored before the awaited number is seen by what was loaded behind the
wait's result, by this kernel and no later one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.host_words import Bell


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
    """Return 0 when the word is ``number``. Add it to addresses, to load behind the wait.

    Times 16, for a compiler that has to know how addresses are aligned: else four bytes at a time.
    """
    return tl.inline_asm_elementwise(
        """
        {
        .reg .pred waits;
        .reg .u32 word;
        bra look;
        again:
        nanosleep.u32 100;
        look:
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
