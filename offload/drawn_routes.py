"""Experts drawn by a law instead of a router, so that a benchmark's routing is known.

What a token draws depends on the seed, the layer, its request and its position alone: not on how
a prompt was cut, on what else runs, or on the order of calls.

Shapes: P positions, L layers, E experts, K top-k.
"""

import numpy as np
import numpy.typing as npt

from offload.routing_law import Law

Ids = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class DrawnRoutes:
    """Expert ids of requests, drawn when they are first asked for and then remembered.

    A position takes 0.4 ms for 48 layers of 128 experts: ask before the clock runs.
    """

    def __init__(
        self, law: Law, *, seed: int, num_layers: int, num_experts: int, top_k: int
    ) -> None:
        self._law = law
        self._seed = _mixed(np.array([seed & _MASK], np.uint64))
        self._layers_L = np.arange(num_layers, dtype=np.uint64)
        self._top_k = top_k
        self._num_experts = num_experts
        self._handicap_LE: dict[int, Floats] = {}  # by how often the ranks have changed
        self._drawn: dict[int, Ids] = {}  # of each request, [L, P, K], where P may be room to come
        self._num_drawn: dict[int, int] = {}

    def ids(self, request: int, start: int, stop: int) -> Ids:
        """The choices of a request's tokens at ``start`` to ``stop``: a view ``[P, L, K]``.

        Its layers are contiguous: a prompt's step takes 2 ms of the clock less than by positions.
        """
        drawn_LPK = self._room(request, stop)
        for position in range(self._num_drawn.get(request, 0), stop):
            before_LK = drawn_LPK[:, position - 1] if position else None
            drawn_LPK[:, position] = self._draw(request, position, before_LK)
            self._num_drawn[request] = position + 1
        return drawn_LPK[:, start:stop].swapaxes(0, 1)

    def _room(self, request: int, stop: int) -> Ids:
        """For positions up to ``stop``; what was drawn stays."""
        found = self._drawn.get(request)
        if found is None or found.shape[1] < stop:
            count = self._num_drawn.get(request, 0)
            room = np.empty((len(self._layers_L), max(stop, 2 * count), self._top_k), np.int16)
            if found is not None:
                room[:, :count] = found[:, :count]
            self._drawn[request] = found = room
        return found

    def _draw(self, request: int, position: int, before_LK: Ids | None) -> Ids:
        """Race all experts, with exponential clocks: the first K have drawn themselves.

        That is drawing one after the other in proportion to the weights. Who stays is ahead.
        """
        num_experts = self._num_experts
        chances_LX = self._chances(request, position, num_experts + self._top_k)
        arrival_LE = np.log(-np.log(chances_LX[:, :num_experts])) + self._handicaps(position)
        if before_LK is not None and self._law.stay > 0:
            layer_S, slot_S = np.nonzero(chances_LX[:, num_experts:] < self._law.stay)
            arrival_LE[layer_S, before_LK[layer_S, slot_S]] = -np.inf
        first_LK = np.argpartition(arrival_LE, self._top_k - 1, axis=1)[:, : self._top_k]
        return first_LK.astype(np.int16)

    def _chances(self, request: int, position: int, count: int) -> Floats:
        """Independent uniform numbers in (0, 1), ``count`` of them for each layer."""
        key_1 = _mixed(self._seed + np.uint64(request & _MASK))
        key_L = _mixed(_mixed(key_1 + np.uint64(position)) + self._layers_L)
        return _uniform(key_L[:, None], count)

    def _handicaps(self, position: int) -> Floats:
        """Logarithms of what each expert's clock is slowed by, ``[L, E]``: skew * log(rank)."""
        era = position // self._law.drift if self._law.drift else 0
        if era not in self._handicap_LE:
            key_L = _mixed(~self._seed + self._layers_L)
            if era:
                key_L = _mixed(key_L + np.uint64(era))
            order_LE = np.argsort(_uniform(key_L[:, None], self._num_experts), axis=1)
            slowed_E = self._law.skew * np.log(np.arange(1, self._num_experts + 1))
            handicap_LE = np.empty(order_LE.shape)
            np.put_along_axis(handicap_LE, order_LE, slowed_E[None], axis=1)
            self._handicap_LE[era] = handicap_LE
        return self._handicap_LE[era]


def _uniform(keys: Words, count: int) -> Floats:
    """``count`` numbers in (0, 1) for each key, along a new last axis of size one."""
    bits = _mixed(keys + np.arange(1, count + 1, dtype=np.uint64) * _STEP)
    chances: Floats = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return chances


def _mixed(words: Words) -> Words:
    """The output function of SplitMix64: each bit of the result depends on all of the word's."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
