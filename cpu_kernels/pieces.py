"""A phase's work in pieces: each worker's first is its own, later ones go to whoever is free.

Equal shares wait for the slowest worker, and workers differ: of 14 on a guest of a shared host five
needed up to twice as long as the others for as many bytes. So half of the work is dealt out in
equal pieces, then half of what is left, and so on ("factoring", Hummel, Schonberg and Flynn 1992):
few pieces to take, and small ones at the end, when all should finish together.

Ordering: the number of pieces taken of a phase is a word of the pool. Worker 0 clears that of the
other phase while nobody takes from it: all meet between the two, and at the end of a job.
"""

from cpu_kernels.addresses import i64_array
from cpu_kernels.intrinsics import atomic_add, atomic_store, jit
from cpu_kernels.worker import LINE

GATE_UP, DOWN = 0, 1  # phases that are dealt out
LEAST_BYTES = 32 << 10  # of weights in a piece: some 3 us, ten times what taking one costs
MAX_ROUNDS = 6


@jit
def num_rounds(num_bytes, num_workers):
    """How often half of what is left of so many bytes of weights is dealt out."""
    rounds = 0
    while rounds < MAX_ROUNDS and num_bytes >= (num_workers << (rounds + 1)) * LEAST_BYTES:
        rounds += 1
    return rounds


@jit
def piece_range(total, piece, rounds, num_workers):
    """[begin, end) of ``total`` that is piece 0, 1, ... of ``num_workers * (rounds + 1)``."""
    turn = piece // num_workers
    size = 1 << max(rounds - turn - 1, 0)  # in units, of which there are num_workers << rounds
    units = num_workers << rounds
    first = units - (units >> turn) + piece % num_workers * size
    return total * first // units, total * (first + size) // units


@jit
def pieces(taken, phase, total, rounds, worker, num_workers):
    """Yield [begin, end) of each piece of ``total`` that this worker takes, until none is left.

    ``taken``: address of the pool's words TAKEN.
    """
    piece = worker
    while piece < num_workers * (rounds + 1):
        yield piece_range(total, piece, rounds, num_workers)
        piece = _next_piece(taken, phase, rounds, num_workers)


@jit
def _next_piece(taken, phase, rounds, num_workers):
    """The first piece that nobody has taken; one past the last if there is none."""
    if rounds == 0:
        return num_workers
    number = num_workers + atomic_add(i64_array(taken, 2 * LINE), phase * LINE, 1)
    return min(number, num_workers * (rounds + 1))


@jit
def forget_pieces(taken, phase, worker):
    """Let a phase that does not run now be dealt out anew."""
    if worker == 0:
        atomic_store(i64_array(taken, 2 * LINE), phase * LINE, 0)
