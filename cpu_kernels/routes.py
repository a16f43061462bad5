"""Which tokens each expert has: a step's choices grouped by expert, in an order the ids decide.

Every worker makes its own copy before its first phase: it costs less than one wait for another
worker would (8 choices of 128 experts: 0.3 us).
"""

import numpy as np

from cpu_kernels.addresses import f32_array, i32_array, i64_array
from cpu_kernels.expert_job import ROOM
from cpu_kernels.intrinsics import jit

ROOM_BYTES = ROOM.itemsize
COUNTS = 8  # int64 in front: number of experts that have a token, and room up to a cache line


@jit
def routes_address(job, worker):
    return job.workers + worker * job.worker_stride + ROOM_BYTES


@jit
def make_routes(job, worker):
    """Group the job's choices by expert, then token, then as given.

    False if an id or the place of one is out of range. Choices of -1 and of experts that are not
    held here are left out.
    """
    num_pairs = job.num_tokens * job.top_k
    base = routes_address(job, worker)
    words = i64_array(base, COUNTS + 2 * job.num_experts + 1 + num_pairs)
    expert = words[COUNTS : COUNTS + job.num_experts]
    start = words[COUNTS + job.num_experts : COUNTS + 2 * job.num_experts + 1]
    token = words[COUNTS + 2 * job.num_experts + 1 :]
    weight = f32_array(base + 8 * len(words), num_pairs)
    ids, weights = i32_array(job.ids, num_pairs), f32_array(job.weights, num_pairs)
    place_of = i32_array(job.place_of, job.num_ids)
    words[0] = 0
    start[:] = 0
    for p in range(num_pairs):
        if ids[p] < -1 or ids[p] >= job.num_ids:
            return False
        place = place_at(job, place_of, ids[p])
        if place >= job.num_experts:
            return False
        if place >= 0:
            start[place + 1] += 1
    num_routed = 0
    for e in range(job.num_experts):
        if start[e + 1] > 0:
            expert[num_routed] = e
            num_routed += 1
        start[e + 1] += start[e]
    for p in range(num_pairs):
        place = place_at(job, place_of, ids[p])
        if place >= 0:
            at = start[place]
            start[place] += 1
            token[at], weight[at] = p // job.top_k, weights[p]
    first = 0  # start[e] is now where e ends: make it the starts of those that have a token
    for n in range(num_routed):
        end = start[expert[n]]
        start[n] = first
        first = end
    start[num_routed] = first
    words[0] = num_routed
    return True


@jit
def place_at(job, place_of, expert):
    return expert if expert < 0 or job.place_of == 0 else place_of[expert]


@jit
def routed_experts(job, worker):
    """(places [N], starts [N + 1]) of the experts that have a token."""
    base = routes_address(job, worker)
    num_routed = i64_array(base, 1)[0]
    expert = i64_array(base + 8 * COUNTS, num_routed)
    return expert, i64_array(base + 8 * (COUNTS + job.num_experts), num_routed + 1)


@jit
def kept_rows(job, worker):
    """Rows of gate and up that are computed, where the routed experts lie end to end."""
    num_routed = i64_array(routes_address(job, worker), 1)[0]
    if job.kept == 0:
        return num_routed * job.width
    return np.int64(i32_array(job.kept, job.num_experts + 1)[num_routed])


@jit
def kept_width(kept, n, width):
    """Of these the n-th expert's, of ``width``; as many columns of its w2 are computed."""
    return min(max(kept - n * width, 0), width)


@jit
def routed_pairs(job, worker):
    """(tokens, weights), [P] both, in the order of the starts."""
    num_pairs = job.num_tokens * job.top_k
    at = routes_address(job, worker) + 8 * (COUNTS + 2 * job.num_experts + 1)
    return i64_array(at, num_pairs), f32_array(at + 8 * num_pairs, num_pairs)


# What reading a tile of weights costs, in units of multiplying it with one token (measured: eight
# tokens take 1.4 to 1.5 times as long as one).
READ_COST = 16


@jit
def share_of(cost, tiles, before, begin, end):
    """Tiles [first, last) of an expert, at ``cost`` each, whose cost lies in [begin, end).

    ``before`` is the cost of the experts before it; returns its end too. So the workers' shares
    are equal in cost, each in one piece, and no tile is in two of them.
    """
    first = min(max((begin - before + cost - 1) // cost, 0), tiles)
    last = min(max((end - before + cost - 1) // cost, 0), tiles)
    return first, last, before + cost * tiles
