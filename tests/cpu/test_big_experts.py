"""Experts with many tokens, by tiles and by torch: against float64, however they are shared."""

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.activation_reference import ACTIVATIONS, Activation
from cpu_kernels.bf16 import f32_to_bf16, widen
from cpu_kernels.big_expert_columns import ColumnProducts
from cpu_kernels.big_experts import LEAST_ROWS, ROUNDS, padded_rows, share_rows, take_big
from cpu_kernels.column_tile import HAS_TILES
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Experts, Mlp, dense_experts, packed_experts
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.packed_reference import dense_layer_reference
from cpu_kernels.weight_kind import parse_kind

LEAST = 20
# Of the largest output. bf16: x, gate, up, act and down are each rounded to 8 bits.
TOLERANCE = {"f32": 2e-6, "bf16": 1.5e-2, "tiles": 1e-2}  # tiles leave gate and up as they are
SIZES = {"f32": (100, 70), "bf16": (100, 70), "tiles": (96, 64)}  # torch takes what is no tile
kinds = pytest.mark.parametrize("kind", list(SIZES))


@pytest.fixture(params=[(1, True), (2, True), (2, False), (3, False)], scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[ExpertPool]:
    num_threads, caller_works = request.param
    with ExpertPool(num_threads, caller_works=caller_works) as pool:
        yield pool


class Case:
    """A random layer and a step in which experts 1 and 3 of 5 have most of the choices."""

    def __init__(self, kind: str, *, seed: int = 0, activation: Activation = "silu") -> None:
        rng = np.random.default_rng(seed)
        experts, tokens, (hidden, width) = 5, 61, SIZES[kind]

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, np.float32)

        cast: Callable[[Any], Any] = np.asarray if kind == "f32" else f32_to_bf16
        self.activations: Activations = "f32" if kind == "f32" else "bf16"
        self.w13_EFH = cast(normal(experts, 2 * width, hidden) / np.float32(hidden**0.5))
        self.w2_EHI = cast(normal(experts, hidden, width) / np.float32(width**0.5))
        biases = {"b13_EF": normal(experts, 2 * width), "b2_EH": normal(experts, hidden)}
        self.mlp = Mlp(activation=activation, **(biases if seed % 2 else {}))
        self.x_TH = normal(tokens, hidden)
        shares = [0.03, 0.4, 0.03, 0.5, 0.04]
        self.ids_TS = rng.choice(experts, (tokens, 2), p=shares).astype(np.int32)
        self.ids_TS[rng.random(self.ids_TS.shape) < 0.1] = -1
        self.weights_TS = rng.random(self.ids_TS.shape, np.float32)

    def experts(self) -> Experts:
        return dense_experts(self.w13_EFH, self.w2_EHI, self.mlp)

    def run(self, pool: ExpertPool, **options: Any) -> Any:
        """The pool's answer, in a buffer that held NaN before."""
        out_TH = np.full_like(self.x_TH, np.nan)
        layer = pool.add_layer(self.experts(), activations=self.activations, **options)
        try:
            pool.submit(layer, self.x_TH, self.ids_TS, self.weights_TS, out_TH)
            pool.wait()
        finally:
            pool.remove_layer(layer)
        return out_TH

    def error(self, out_TH: Any, ids_TS: Any = None) -> float:
        """Largest error in units of the largest reference value."""
        biases = {
            name: None if bias is None else bias.astype(np.float64)
            for name, bias in (("b13_EF", self.mlp.b13_EF), ("b2_EH", self.mlp.b2_EH))
        }
        expected_TH = dense_layer_reference(
            widen(self.w13_EFH),
            widen(self.w2_EHI),
            self.x_TH,
            self.ids_TS if ids_TS is None else ids_TS,
            self.weights_TS,
            activation=self.mlp.activation,
            **biases,
        )
        return float(np.abs(out_TH - expected_TH).max() / np.abs(expected_TH).max())


@kinds
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_some_experts_are_handed_over(
    pool: ExpertPool, kind: str, activation: Activation, seed: int
) -> None:
    case = Case(kind, seed=seed, activation=activation)
    assert case.error(case.run(pool, hand_over=LEAST)) < TOLERANCE[kind]


@kinds
@pytest.mark.parametrize("hand_over", [1, 1000])
def test_all_experts_or_none(pool: ExpertPool, kind: str, hand_over: int) -> None:
    case = Case(kind)
    out_TH = case.run(pool, hand_over=hand_over)
    assert case.error(out_TH) < TOLERANCE[kind]
    assert np.array_equal(out_TH, case.run(pool)) == (hand_over == 1000)


@kinds
def test_the_same_bits_again_and_after_other_steps(pool: ExpertPool, kind: str) -> None:
    case, other = Case(kind), Case(kind, seed=2)
    layer = pool.add_layer(case.experts(), activations=case.activations, hand_over=LEAST)
    answers = []
    for step in (case, case, other, case):
        out_TH = np.full_like(step.x_TH, np.nan)
        pool.submit(layer, step.x_TH, step.ids_TS, step.weights_TS, out_TH)
        pool.wait()
        answers.append(out_TH)
    pool.remove_layer(layer)
    for again in (answers[1], answers[3]):
        assert np.array_equal(answers[0], again)


@kinds
def test_in_and_out_of_inference_mode(pool: ExpertPool, kind: str) -> None:
    case = Case(kind)
    outside = case.run(pool, hand_over=LEAST)
    with torch.inference_mode():  # the mode of the thread that submits, not of the workers
        inside = case.run(pool, hand_over=LEAST)
    assert np.array_equal(inside, outside)
    assert np.array_equal(case.run(pool, hand_over=LEAST), outside)


@kinds
def test_experts_that_are_elsewhere_are_left_out(pool: ExpertPool, kind: str) -> None:
    case = Case(kind)
    order = np.array([4, 3, 1], np.int32)  # those held; ids 0 and 2 are elsewhere
    place_of = np.full(5, -1, np.int32)
    place_of[order] = np.arange(3)
    held_TS = np.where(np.isin(case.ids_TS, order), case.ids_TS, -1)
    held = Case(kind)
    held.w13_EFH, held.w2_EHI = case.w13_EFH[order], case.w2_EHI[order]
    out_TH = held.run(pool, hand_over=LEAST, place_of=place_of)
    assert case.error(out_TH, held_TS) < TOLERANCE[kind]


def test_an_unknown_id_is_found_and_the_pool_goes_on(pool: ExpertPool) -> None:
    case = Case("f32")
    layer = pool.add_layer(case.experts(), hand_over=LEAST)
    bad_TS, out_TH = case.ids_TS.copy(), np.full_like(case.x_TH, np.nan)
    for unknown in (5, -2):
        bad_TS[7, 1] = unknown
        pool.submit(layer, case.x_TH, bad_TS, case.weights_TS, out_TH)
        with pytest.raises(ValueError, match="out of range"):
            pool.wait()
        assert (out_TH == 0).all()
    pool.remove_layer(layer)
    assert case.error(case.run(pool, hand_over=LEAST)) < TOLERANCE["f32"]


@pytest.mark.skipif(HAS_TILES, reason="AMX tiles are not measured")
@pytest.mark.parametrize(
    ("kind", "is_by_tiles"), [("f32", False), ("bf16", False), ("tiles", True)]
)
def test_whole_tiles_need_no_torch(pool: ExpertPool, kind: str, is_by_tiles: bool) -> None:
    case = Case(kind)
    layer = pool.add_layer(case.experts(), activations=case.activations, hand_over=LEAST)
    assert layer.hand_over is not None
    assert isinstance(layer.hand_over._products, ColumnProducts) == is_by_tiles
    pool.remove_layer(layer)


@pytest.mark.parametrize("count", [LEAST_ROWS, 3 * LEAST_ROWS - 1, 20 * LEAST_ROWS, 300])
def test_tiles_of_many_tokens(pool: ExpertPool, count: int) -> None:
    """More than the sums of which wait for their activation at a time."""
    case = Case("tiles", seed=1)
    rng = np.random.default_rng(count)
    case.x_TH = rng.standard_normal((count, 96), np.float32)
    case.ids_TS = np.tile(np.array([3, 1], np.int32), (count, 1))
    case.weights_TS = rng.random(case.ids_TS.shape, np.float32)
    out_TH = case.run(pool, hand_over=1)
    assert case.error(out_TH) < TOLERANCE["tiles"]
    case.x_TH, case.ids_TS, case.weights_TS = (
        array[7:8].copy() for array in (case.x_TH, case.ids_TS, case.weights_TS)
    )
    assert np.array_equal(case.run(pool, hand_over=1), out_TH[7:8])  # to the bit


def test_what_cannot_be_handed_over_is_refused(pool: ExpertPool) -> None:
    packed = PackedShape(parse_kind("w4g32"), 64, 64)
    blob_EB = np.zeros((1, packed.expert_bytes), np.uint8)
    with pytest.raises(ValueError, match="w4g32/int8 experts cannot be handed over"):
        pool.add_layer(packed_experts(blob_EB, packed), activations="int8", hand_over=LEAST)
    with pytest.raises(ValueError, match="bf16/f32 experts cannot be handed over"):
        pool.add_layer(Case("bf16").experts(), activations="f32", hand_over=LEAST)
    with pytest.raises(ValueError, match="at least 1"):
        pool.add_layer(Case("f32").experts(), hand_over=0)


def test_torch_keeps_its_threads_elsewhere(pool: ExpertPool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen: list[int] = []
    try:
        Case("f32").run(pool, hand_over=LEAST)
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert (torch.get_num_threads(), seen) == (3, [3])
    finally:
        torch.set_num_threads(before)


def test_a_pool_that_is_dropped_ends_its_threads() -> None:
    before = threading.active_count()
    pool = ExpertPool(2, caller_works=False)
    pool.add_layer(Case("f32").experts(), hand_over=LEAST)
    assert threading.active_count() == before + 2
    del pool
    gc.collect()
    assert threading.active_count() == before


# --- which experts are taken, and by whom ---

ids = st.lists(st.lists(st.integers(-2, 6), min_size=2, max_size=2), min_size=1, max_size=40)


@given(ids=ids, least=st.integers(1, 12), held=st.none() | st.permutations(range(5)))
def test_big_experts_are_those_with_enough_choices(
    ids: list[list[int]], least: int, held: list[int] | None
) -> None:
    """Five ids; ``held``: their places, the last two of which do not exist."""
    ids_TS = np.array(ids, np.int32)
    place_of = None
    if held is not None:
        place_of = np.array([place if place < 3 else -1 for place in held], np.int32)
    num_experts = 5 if held is None else 3
    weights_TS = np.arange(1, ids_TS.size + 1, dtype=np.float32).reshape(ids_TS.shape)

    def place(expert: int) -> int:
        if not 0 <= expert < 5:
            return -1
        return expert if place_of is None else int(place_of[expert])

    counts = Counter(place(expert) for expert in ids_TS.flat)
    places = sorted(p for p, count in counts.items() if p >= 0 and count >= least)
    big = take_big(ids_TS, weights_TS, place_of, num_experts, least, padded_rows)
    if big is None:
        assert not places
        return
    assert (big.places, big.counts) == (places, [counts[p] for p in places])
    rest = [[-1 if place(e) in places else e for e in row] for row in ids]
    assert big.rest_TS.tolist() == rest
    for n, p in enumerate(places):
        pairs = [k for k, expert in enumerate(ids_TS.flat) if place(expert) == p]
        start, end = big.starts[n], big.starts[n + 1]
        padding = [-1] * (end - start - len(pairs))
        assert big.token_Q[start:end].tolist() == [k // 2 for k in pairs] + padding
        assert big.weight_Q[start : start + len(pairs)].tolist() == [k + 1 for k in pairs]
        assert end - start == padded_rows(len(pairs))


@given(st.integers(1, 100_000))
def test_padding_is_small_and_sizes_are_few(count: int) -> None:
    rows = padded_rows(count)
    assert rows % LEAST_ROWS == 0
    assert 0 <= rows - count < max(LEAST_ROWS, count / 8)
    assert len({padded_rows(n) for n in range(512, 1024)}) <= 9


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 1000), st.integers(1, 16)
)
def test_every_row_is_in_one_piece(tiles: list[int], num_rows: int, num_workers: int) -> None:
    starts = [0, *np.cumsum([16 * n for n in tiles]).tolist()]
    shares = share_rows(starts, num_rows, num_workers)
    assert len(shares) == num_workers * (ROUNDS + 1)
    pieces = [piece for share in shares for piece in share]
    assert len(pieces) <= len(tiles) + len(shares) - 1
    rows = [(n, row) for n, first, last in pieces for row in range(first, last)]
    assert rows == [(n, row) for n in range(len(tiles)) for row in range(num_rows)]


def test_workers_get_equal_shares_each_time() -> None:
    starts = [0, 64, 128, 640]
    costs = [
        sum((32 + starts[n + 1] - starts[n]) * (last - first) for n, first, last in share)
        for share in share_rows(starts, 14336, 14)
    ]
    for turn, part in enumerate((1 / 2, 1 / 4, 1 / 4)):
        dealt = costs[14 * turn : 14 * (turn + 1)]
        assert sum(dealt) == pytest.approx(part * sum(costs), rel=0.03)
        assert max(dealt) < 1.1 * sum(dealt) / 14
