"""Groups a layer's (expert, token, weight) pairs by expert, in an order that the ids decide."""

import numpy as np

from cpu_kernels.intrinsics import jit

OUT_OF_RANGE = -1


@jit
def key_starts(key_P, num_keys):
    """First place of each key in sorted order, [num_keys + 1]; empty if a key is out of range."""
    starts = np.zeros(num_keys + 1, np.int64)
    for key in key_P:
        if not 0 <= key < num_keys:
            return np.empty(0, np.int64)
        starts[key + 1] += 1
    for k in range(num_keys):
        starts[k + 1] += starts[k]
    return starts


@jit
def sort_pairs(expert_P, token_P, weight_P, num_experts, num_tokens, expert, start, token, weight):
    """Sort pairs by expert, then token, then as given; returns the number N of experts with a pair.

    Writes their ids to ``expert[:N]``, their first pairs and the end to ``start[:N+1]``, and the
    sorted ``token`` and ``weight``. OUT_OF_RANGE if an id is negative or not below
    ``num_experts`` or ``num_tokens``.
    """
    token_at = key_starts(token_P, num_tokens)
    expert_at = key_starts(expert_P, num_experts)
    if len(token_at) == 0 or len(expert_at) == 0:
        return OUT_OF_RANGE
    num_routed = 0
    for e in range(num_experts):
        if expert_at[e + 1] > expert_at[e]:
            expert[num_routed] = e
            start[num_routed] = expert_at[e]
            num_routed += 1
    start[num_routed] = len(expert_P)
    by_token = np.empty(len(expert_P), np.int64)
    for p in range(len(expert_P)):
        by_token[token_at[token_P[p]]] = p
        token_at[token_P[p]] += 1
    for pair in by_token:
        at = expert_at[expert_P[pair]]
        token[at], weight[at] = token_P[pair], weight_P[pair]
        expert_at[expert_P[pair]] += 1
    return num_routed
