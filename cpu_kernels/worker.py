"""What a worker runs outside Python: wait for a job's number, do a share of each phase, say so.

A job is a record that starts with JOB_HEADER; table[k] is the address of job k. Its stage is a C
function (job address, phase, worker, number of workers), which all workers call for phase 0, 1, ...
and between two phases all wait for each other.

Protocol: a feeder (Python, a compiled loop or a GPU stream, with stores of 8 or of the lower 4
bytes) stores 0 to DONE_BELL, then k to DOORBELL, and may ring again once it has read k from
DONE_BELL. A feeder that does not look at PARKED has to keep the workers awake.

Ordering: the feeder writes the job before it rings (release); workers read it after they saw the
bell (acquire). A worker's stores of a phase come before it releases its word of ARRIVED; worker 0
acquires all of these, then releases GENERATION, which the others acquire before they go on. So
nobody runs ahead by more than one generation, and "it differs" is all they need to compare. At a
job's end worker 0 clears DOORBELL before it releases GENERATION: who looks at the bell again sees 0
or a new job, never the old one. DONE_BELL comes last: the feeder that has read it owns the job, its
results and the bell. A caller that is worker 0 has acquired the others' words and stored DONE_BELL
itself when it goes on, so no late DONE_BELL can follow the 0 of its next ring; others may still be
on their way out of the last meeting, where they read nothing of the job any more. These stores are
plain moves on x86. Two pairs need a full fence, as both sides write a word and then read the
other's: DOORBELL and PARKED (ring, park), DONE_BELL and ASLEEP (worker 0, a caller that goes to
sleep): with it at least one of the two sees the other.
"""

import numpy as np

from cpu_kernels.addresses import i64_array
from cpu_kernels.intrinsics import (
    atomic_load,
    atomic_store,
    call_stage,
    float_control,
    flush_denormals,
    jit,
    nap,
    pause,
    set_float_control,
    store_release,
    yield_core,
)

# The first fields of a job's record: a C function's address and its number of phases.
JOB_HEADER: list[tuple[str, type]] = [("stage", np.int64), ("num_phases", np.int64)]

# Words that threads share. Each has two cache lines, since cores fetch lines in pairs.
LINE = 16  # int64
(
    DOORBELL,  # the job to run; 0: none
    DONE_BELL,  # the job that is done; 0: it runs
    GENERATION,  # how often all workers have met
    STOP,  # 1: come back to Python and end
    ERROR,  # not 0: what a stage complained of
    PARKED,  # workers that sleep, or are about to
    ASLEEP,  # 1: the caller sleeps until the job is done, or is about to
    SPINS,  # looks at a bell before a worker parks or the caller sleeps
    PATIENCE,  # looks with a pause in between; later ones offer the core to other threads
    TAKEN,  # pieces of a phase that workers have taken, and in the next line those of another phase
    _,
    ARRIVED,  # and LINE further on for each worker: the generation that it waits for
) = (LINE * k for k in range(12))
MAX_WORKERS = 256
NUM_WORDS = ARRIVED + LINE * MAX_WORKERS

FOREVER = 2**62  # of SPINS
ENDLESS = -1  # looks of who waits for other workers
# After its pauses a worker that waits for others offers its core (0.4 us each if nobody wants it),
# then naps: only an idle core takes over a thread that waits for another core. With a busy process
# beside 2 workers on 2 cores a job of 0.08 ms took 0.09 ms on average, without naps 1.1 ms.
OFFERS = 1000
MAX_JOBS = 4096  # length of the table of addresses

EAGER = 64  # looks without a pause, of up to 60 ns: what is near is heard at once

# Why compiled code came back to Python.
IDLE, STOPPED, FINISHED = range(3)


@jit
def wait_while(words, index, value, most):
    """Spin while words[index] == value; returns what it is then.

    Gives up, returning ``value``, after a stop, or after words[SPINS] looks or ``most`` of them,
    unless ``most`` is ENDLESS. Only then it naps: who waits for a bell should hear it at once.
    """
    spins, patience, is_patient = 0, words[PATIENCE], most == ENDLESS
    while True:
        found = atomic_load(words, index)
        if found != value or atomic_load(words, STOP) != 0:
            return found
        if not is_patient and (spins >= most or spins >= atomic_load(words, SPINS)):
            return found
        spins += 1
        if spins < EAGER:
            continue
        if spins < patience:
            pause()
        elif spins < patience + OFFERS or not is_patient:
            yield_core()
        else:
            nap()


@jit
def meet(words, ends_job, worker, num_workers):
    """Wait until all workers are here; worker 0 ends job ``ends_job``, if that is not 0.

    Returns IDLE, STOPPED, or FINISHED in worker 0 if it ended a job whose caller sleeps.
    """
    # ns per meeting of 14 threads (of 2) with nothing else to do: this 720 (225); a counter and a
    # word that releases 1,110 (175); all spin on the counter itself 2,130 (115); all read all words
    # 1,030 (116); a tree of fours 780.
    generation = atomic_load(words, GENERATION)  # cannot change before we have arrived
    if worker > 0:
        store_release(words, ARRIVED + LINE * worker, generation + 1)
        is_released = wait_while(words, GENERATION, generation, ENDLESS) != generation
        return IDLE if is_released else STOPPED
    for other in range(1, num_workers):
        if wait_while(words, ARRIVED + LINE * other, generation, ENDLESS) == generation:
            return STOPPED
    if ends_job == 0:
        store_release(words, GENERATION, generation + 1)
        return IDLE
    store_release(words, DOORBELL, 0)
    store_release(words, GENERATION, generation + 1)
    atomic_store(words, DONE_BELL, ends_job)
    return FINISHED if atomic_load(words, ASLEEP) != 0 else IDLE


@jit
def run_job(words, table, number, worker, num_workers):
    """One worker's share of a job. IDLE: the job is done; else as :func:`meet`."""
    job = table[number]
    header = i64_array(job, 2)
    stage, num_phases = header[0], header[1]
    for phase in range(num_phases):
        call_stage(stage, job, phase, worker, num_workers)
        ends_job = number if phase + 1 == num_phases else 0
        reason = meet(words, ends_job, worker, num_workers)
        if reason != IDLE:
            return reason
    return IDLE


@jit
def worker_loop(words, table, worker, num_workers):
    """Run jobs as they are rung, until this thread is needed in Python.

    IDLE: the bell was silent for SPINS; FINISHED: wake the caller; STOPPED.
    """
    flush_denormals()
    while True:
        number = wait_while(words, DOORBELL, 0, FOREVER)
        if number == 0:
            return STOPPED if atomic_load(words, STOP) != 0 else IDLE
        reason = run_job(words, table, number, worker, num_workers)
        if reason != IDLE:
            return reason


@jit
def work_as_caller(words, table, number, num_workers):
    """As :func:`run_job` for worker 0, on the caller's thread; leaves its float modes alone."""
    control = float_control()
    flush_denormals()
    run_job(words, table, number, 0, num_workers)
    set_float_control(control)


@jit
def announce(words, index, value, other):
    """words[index] = value, then, after a full fence, what words[other] is."""
    atomic_store(words, index, value)
    return atomic_load(words, other)


@jit
def ring(words, number):
    """Start a job; returns how many workers are parked and have to be woken."""
    store_release(words, DONE_BELL, 0)
    return announce(words, DOORBELL, number, PARKED)
