"""Experts with many tokens, by columns: against float64, however the workers share them."""

from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import pytest
from expert_layers import BY_NAME, lossless_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from lesser_levels import LESSER_LEVELS, passes

from cpu_kernels.activation_reference import ACTIVATIONS, Activation
from cpu_kernels.bf16 import f32_to_bf16, widen
from cpu_kernels.column_panels import SUM_BLOCKS, most_blocks
from cpu_kernels.column_tile import TOKENS
from cpu_kernels.expert_layer import ExpertLayer
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Experts, Mlp, dense_experts, packed_experts
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.packed_reference import dense_layer_reference
from cpu_kernels.weight_kind import parse_kind

LEAST = 20
TOLERANCE = 1e-2  # of the largest output: x and act are rounded to bf16
# Hidden and width: several panels of down; of gate and up one of 32 rows beside others. Those of
# bf12 are multiples of nothing.
SIZES = {"bf16": (288, 160), "bf12": (301, 171)}


@pytest.fixture(params=[(1, True), (2, True), (2, False), (3, False)], scope="module")
def pool(request: pytest.FixtureRequest) -> Iterator[ExpertPool]:
    num_threads, caller_works = request.param
    with ExpertPool(num_threads, caller_works=caller_works) as pool:
        yield pool


@pytest.fixture(params=SIZES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Case:
    """A random layer and a step in which experts 1 and 3 of 5 have most of the choices.

    Some weights are far larger or smaller than the others.
    """

    activations: Activations = "bf16"

    def __init__(
        self, kind: str, *, seed: int = 0, activation: Activation = "silu", tokens: int = 61
    ) -> None:
        self.kind = parse_kind(kind)
        hidden, width = SIZES[kind]
        rng = np.random.default_rng(seed)
        experts = 5

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, np.float32)

        def weights(*shape: int) -> Any:
            sizes = rng.choice([1, 0, 2**-30, 16], shape, p=[0.992, 0.005, 0.001, 0.002])
            return f32_to_bf16(normal(*shape) * np.float32(shape[-1] ** -0.5) * sizes)

        self.w13_EFH = weights(experts, 2 * width, hidden)
        self.w2_EHI = weights(experts, hidden, width)
        biases = {"b13_EF": normal(experts, 2 * width), "b2_EH": normal(experts, hidden)}
        self.mlp = Mlp(activation=activation, **(biases if seed % 2 else {}))
        self.x_TH = normal(tokens, hidden)
        shares = [0.03, 0.4, 0.03, 0.5, 0.04]
        self.ids_TS = rng.choice(experts, (tokens, 2), p=shares).astype(np.int32)
        self.ids_TS[rng.random(self.ids_TS.shape) < 0.1] = -1
        self.weights_TS = rng.random(self.ids_TS.shape, np.float32)

    def of_tokens(self, first: int, last: int) -> "Case":
        """The same layer, and some of the step's tokens."""
        part = copy(self)
        part.x_TH, part.ids_TS, part.weights_TS = (
            array[first:last].copy() for array in (self.x_TH, self.ids_TS, self.weights_TS)
        )
        return part

    def experts(self) -> Experts:
        if not self.kind.is_lossless:
            return dense_experts(self.w13_EFH, self.w2_EHI, self.mlp)
        matrices = [
            (*np.split(w13_FH, 2), w2_HI)
            for w13_FH, w2_HI in zip(self.w13_EFH, self.w2_EHI, strict=True)
        ]
        sizes = self.w2_EHI.shape[1:]
        return lossless_weights(BY_NAME["bf12/bf16"], matrices, *sizes, self.mlp).experts

    def run(self, pool: ExpertPool, **options: Any) -> Any:
        """The pool's answer, in a buffer that held NaN before."""
        out_TH = np.full_like(self.x_TH, np.nan)
        layer = pool.add_layer(self.experts(), activations=self.activations, **options)
        try:
            submit(pool, layer, self, out_TH)
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


def submit(pool: ExpertPool, layer: ExpertLayer, case: Case, out_TH: Any) -> None:
    pool.submit(layer, case.x_TH, case.ids_TS, case.weights_TS, out_TH)
    pool.wait()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_some_experts_are_computed_by_columns(
    pool: ExpertPool, kind: str, activation: Activation, seed: int
) -> None:
    case = Case(kind, seed=seed, activation=activation)
    assert case.error(case.run(pool, columns_from=LEAST)) < TOLERANCE


@pytest.mark.parametrize("columns_from", [1, 1000])
def test_all_experts_or_none(pool: ExpertPool, kind: str, columns_from: int) -> None:
    case = Case(kind)
    out_TH = case.run(pool, columns_from=columns_from)
    assert case.error(out_TH) < TOLERANCE
    assert np.array_equal(out_TH, case.run(pool)) == (columns_from == 1000)


def test_the_same_bits_again_and_after_other_steps(pool: ExpertPool, kind: str) -> None:
    case, other = Case(kind), Case(kind, seed=2, tokens=90)
    layer = pool.add_layer(case.experts(), activations="bf16", columns_from=LEAST)
    answers = []
    for step in (case, case, other, case):
        out_TH = np.full_like(step.x_TH, np.nan)
        submit(pool, layer, step, out_TH)
        answers.append(out_TH)
    pool.remove_layer(layer)
    for again in (answers[1], answers[3]):
        assert np.array_equal(answers[0], again)


def test_bits_depend_on_neither_threads_nor_neighbours(pool: ExpertPool, kind: str) -> None:
    case = Case(kind, seed=1, tokens=100)
    out_TH = case.run(pool, columns_from=1)
    with ExpertPool(1) as alone:
        assert np.array_equal(case.run(alone, columns_from=1), out_TH)
    for first, last in ((7, 8), (20, 70)):
        part_TH = case.of_tokens(first, last).run(pool, columns_from=1)
        assert np.array_equal(part_TH, out_TH[first:last])


def test_experts_that_are_elsewhere_are_left_out(pool: ExpertPool, kind: str) -> None:
    case = Case(kind)
    order = np.array([4, 3, 1], np.int32)  # those held; ids 0 and 2 are elsewhere
    place_of = np.full(5, -1, np.int32)
    place_of[order] = np.arange(3)
    held_TS = np.where(np.isin(case.ids_TS, order), case.ids_TS, -1)
    held = Case(kind)
    held.w13_EFH, held.w2_EHI = case.w13_EFH[order], case.w2_EHI[order]
    out_TH = held.run(pool, columns_from=LEAST, place_of=place_of)
    assert case.error(out_TH, held_TS) < TOLERANCE


def test_an_unknown_id_is_found_and_the_pool_goes_on(pool: ExpertPool, kind: str) -> None:
    case = Case(kind)
    layer = pool.add_layer(case.experts(), activations="bf16", columns_from=LEAST)
    bad_TS, out_TH = case.ids_TS.copy(), np.full_like(case.x_TH, np.nan)
    for unknown in (5, -2):
        bad_TS[7, 1] = unknown
        pool.submit(layer, case.x_TH, bad_TS, case.weights_TS, out_TH)
        with pytest.raises(ValueError, match="out of range"):
            pool.wait()
        assert (out_TH == 0).all()
    pool.remove_layer(layer)
    assert case.error(case.run(pool, columns_from=LEAST)) < TOLERANCE


@pytest.mark.parametrize(
    "count", [TOKENS, 3 * TOKENS - 1, 20 * TOKENS, (SUM_BLOCKS + 3) * TOKENS - 5]
)
def test_experts_of_many_tokens(pool: ExpertPool, kind: str, count: int) -> None:
    """More than the sums of which wait for their activation at a time, too."""
    case = Case(kind, seed=1, tokens=count)
    case.ids_TS = np.tile(np.array([3, 1], np.int32), (count, 1))
    assert case.error(case.run(pool, columns_from=1)) < TOLERANCE


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(SIZES)),
    counts=st.lists(st.integers(0, 70), min_size=5, max_size=5).filter(any),
    least=st.integers(1, 40),
)
def test_any_counts_of_tokens(kind: str, counts: list[int], least: int) -> None:
    case = Case(kind, seed=1, tokens=sum(counts))
    case.ids_TS = np.repeat(np.arange(5, dtype=np.int32), counts)[:, None]
    case.weights_TS = case.weights_TS[:, :1].copy()
    with ExpertPool(2, caller_works=False) as pool:
        assert case.error(case.run(pool, columns_from=least)) < TOLERANCE


@given(
    counts=st.lists(st.integers(0, 100), min_size=1, max_size=9).filter(any),
    least=st.integers(1, 50),
)
def test_there_is_room_for_all_blocks(counts: list[int], least: int) -> None:
    blocks = sum(-(-count // TOKENS) for count in counts if count >= least)
    assert blocks <= most_blocks(sum(counts), len(counts), least)


def test_layers_share_scratch_that_grows(pool: ExpertPool, kind: str) -> None:
    """A layer that was bound to smaller scratch goes on with its own, until it needs more."""
    cases = [Case(kind, tokens=20), Case(kind, seed=2, tokens=500)]
    layers = [pool.add_layer(each.experts(), activations="bf16", columns_from=1) for each in cases]
    outs = [np.full_like(each.x_TH, np.nan) for each in cases]
    for n in (0, 1, 0, 1):  # the same arrays again: they stay bound
        outs[n][:] = np.nan
        submit(pool, layers[n], cases[n], outs[n])
        assert cases[n].error(outs[n]) < TOLERANCE
    more = Case(kind, tokens=700)
    out_TH = np.full_like(more.x_TH, np.nan)
    submit(pool, layers[0], more, out_TH)
    assert more.error(out_TH) < TOLERANCE
    for layer in layers:
        pool.remove_layer(layer)


@pytest.mark.parametrize("level", LESSER_LEVELS)
def test_lesser_levels_pass_these_tests_too(level: str) -> None:
    passes(level, __file__, "some_experts or neighbours")


def test_what_cannot_be_computed_by_columns_is_refused(pool: ExpertPool) -> None:
    packed = PackedShape(parse_kind("w4g32"), 64, 64)
    blob_EB = np.zeros((1, packed.expert_bytes), np.uint8)
    with pytest.raises(ValueError, match="w4g32/int8 experts of 64 x 64 cannot be computed by"):
        pool.add_layer(packed_experts(blob_EB, packed), activations="int8", columns_from=LEAST)
    with pytest.raises(ValueError, match="bf16/f32 experts of 288 x 160 cannot"):
        pool.add_layer(Case("bf16").experts(), activations="f32", columns_from=LEAST)
    odd = Case("bf16")
    odd.w13_EFH, odd.w2_EHI = odd.w13_EFH[:, : 2 * 150].copy(), odd.w2_EHI[:, :, :150].copy()
    with pytest.raises(ValueError, match="288 x 150 cannot be computed by columns"):
        pool.add_layer(odd.experts(), activations="bf16", columns_from=LEAST)
    with pytest.raises(ValueError, match="at least 1"):
        pool.add_layer(Case("bf16").experts(), activations="bf16", columns_from=0)
    layer = pool.add_layer(Case("bf16").experts(), activations="bf16", columns_from=LEAST)
    kept_N, case = np.zeros(6, np.int32), Case("bf16")
    with pytest.raises(ValueError, match="computed whole"):
        out_TH = np.empty_like(case.x_TH)
        pool.bind(layer, case.x_TH, case.ids_TS, case.weights_TS, out_TH, kept_N)
    pool.remove_layer(layer)
