"""A plain read of memory by the worker pool: the speed that the expert kernels are held against."""

from cpu_kernels.intrinsics import i64_array, jit

STREAMS = 4  # parts read side by side, as the kernels do: one alone is slower by a quarter
STREAM_WORDS = 512  # a part, 4 KB: one after the other they are one range, read once


@jit
def xor_words(address, num_words):
    """The exclusive or of the int64 at ``address``."""
    block = STREAMS * STREAM_WORDS
    total = 0
    for at in range(0, num_words - block + 1, block):
        a, b, c, d = (
            i64_array(address + 8 * at, STREAM_WORDS),
            i64_array(address + 8 * (at + STREAM_WORDS), STREAM_WORDS),
            i64_array(address + 8 * (at + 2 * STREAM_WORDS), STREAM_WORDS),
            i64_array(address + 8 * (at + 3 * STREAM_WORDS), STREAM_WORDS),
        )
        for k in range(STREAM_WORDS):
            total ^= a[k] ^ b[k] ^ c[k] ^ d[k]
    rest = num_words % block
    for word in i64_array(address + 8 * (num_words - rest), rest):
        total ^= word
    return total


@jit
def read_share(job, worker):
    """One worker's part of the range; workers beyond ``num_readers`` read nothing.

    Puts the exclusive or of its words at ``out``'s place ``worker``.
    """
    total = 0
    if worker < job.num_readers:
        begin = job.read_words * worker // job.num_readers
        end = job.read_words * (worker + 1) // job.num_readers
        total = xor_words(job.read + 8 * begin, end - begin)
    i64_array(job.out, worker + 1)[worker] = total
