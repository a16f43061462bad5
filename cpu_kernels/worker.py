"""What a worker thread runs outside Python: wait for a layer, do a share of it, say so.

Ordering: the caller writes the job, then SUBMITTED (all words are sequentially consistent); workers
read the job after they saw it. A worker adds to ARRIVED after its last store to act, and reads act
after all have; it adds to DONE after its last store to out, the caller reads out after all have.
Counters only grow, so nothing is ever reset. A worker that finishes last reads ASLEEP after adding
to DONE; a caller that goes to sleep reads DONE after setting ASLEEP: one of them sees the other.
"""

from cpu_kernels.expert_kernels import clear_out, run_stage, share
from cpu_kernels.intrinsics import atomic_add, atomic_load, jit, pause, yield_core
from cpu_kernels.read_kernel import read_share

# Words that threads share, each on its own cache line.
LINE = 8  # int64 per cache line
SUBMITTED, ARRIVED, DONE, STOP, ASLEEP, PATIENCE = (LINE * k for k in range(6))
NUM_WORDS = LINE * 6

# Why the workers' loop came back to Python.
IDLE, STOPPED, FINISHED = range(3)


@jit
def wait_for_word(words, index, target, max_spins):
    """Spin until words[index] >= target: True. False on a stop, or after ``max_spins`` if >= 0.

    After words[PATIENCE] pauses it offers its core to others at each spin.
    """
    spins, patience = 0, words[PATIENCE]
    while atomic_load(words, index) < target:
        if atomic_load(words, STOP) != 0 or spins == max_spins:
            return False
        spins += 1
        if spins < patience:
            pause()
        else:
            yield_core()
    return True


@jit
def run_share(words, job, number, worker, num_workers):
    """One worker's share of job ``number``; False if the pool was stopped midway."""
    if job.num_readers > 0:
        read_share(job, worker)
        atomic_add(words, ARRIVED, 1)  # the counts of later layers start from here
        return True
    for is_down in (False, True):
        begin, end = share(job.hidden if is_down else job.width, worker, num_workers)
        if is_down:
            clear_out(job, begin, end)
        run_stage(job, is_down, begin, end)
        if not is_down:
            atomic_add(words, ARRIVED, 1)
            if not wait_for_word(words, ARRIVED, number * num_workers, -1):
                return False
    return True


@jit
def worker_loop(words, jobs, seen, worker, num_workers, max_spins):
    """Work on layers ``seen + 1``, ... as they are submitted; returns (reason, last layer done).

    IDLE: nothing came for ``max_spins``; FINISHED: the layer is done, this worker was its last and
    the caller sleeps; STOPPED: the stop word is set.
    """
    while True:
        if not wait_for_word(words, SUBMITTED, seen + 1, max_spins):
            return (STOPPED if atomic_load(words, STOP) != 0 else IDLE), seen
        seen += 1
        if not run_share(words, jobs[0], seen, worker, num_workers):
            return STOPPED, seen
        is_last = atomic_add(words, DONE, 1) + 1 == seen * num_workers
        if is_last and atomic_load(words, ASLEEP) != 0:
            return FINISHED, seen
