"""The expert pool against float64 on random layers, and what it promises about order and layout."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from expert_layers import DTYPES, Layer, normal, random_layer, relative_error, run_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.expert_mlp import ExpertPool
from cpu_kernels.expert_reference import bf16_to_f32, f32_to_bf16


@pytest.fixture(scope="module")
def pool() -> Iterator[ExpertPool]:
    with ExpertPool(2) as pool:
        yield pool


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_experts=st.integers(1, 12),
    hidden=st.integers(1, 150),
    width=st.integers(1, 150),
    num_tokens=st.integers(1, 70),
    num_pairs=st.integers(0, 160),
    dtype=st.sampled_from(DTYPES),
    index_type=st.sampled_from([np.int32, np.int64]),
)
def test_agrees_with_float64_for_any_shape(pool: ExpertPool, seed: int, **shape: object) -> None:
    layer = random_layer(np.random.default_rng(seed), **shape)  # type: ignore[arg-type]
    assert relative_error(run_layer(pool, layer), layer) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 33, 512])
def test_agrees_with_float64_on_wide_experts(
    pool: ExpertPool, rng: np.random.Generator, num_tokens: int, dtype: str
) -> None:
    layer = random_layer(
        rng,
        num_experts=2,
        hidden=1027,
        width=514,
        num_tokens=num_tokens,
        num_pairs=num_tokens,
        dtype=dtype,
    )
    one_expert = replace(layer, expert_P=np.ones(num_tokens, np.int64))
    assert relative_error(run_layer(pool, one_expert), one_expert) < 1e-5


def test_long_sums_keep_their_accuracy(pool: ExpertPool, rng: np.random.Generator) -> None:
    layer = random_layer(
        rng, num_experts=2, hidden=64, width=14336, num_tokens=3, num_pairs=6, dtype="bf16"
    )
    assert relative_error(run_layer(pool, layer), layer) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(rng: np.random.Generator, dtype: str) -> None:
    layer = random_layer(
        rng, num_experts=5, hidden=203, width=131, num_tokens=37, num_pairs=90, dtype=dtype
    )
    results = []
    for num_threads in (1, 2, 3, 7):
        with ExpertPool(num_threads) as pool:
            results += [run_layer(pool, layer) for _ in range(3)]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_token_do_not_depend_on_its_batch(
    pool: ExpertPool, rng: np.random.Generator, dtype: str
) -> None:
    layer = random_layer(
        rng, num_experts=3, hidden=150, width=70, num_tokens=41, num_pairs=120, dtype=dtype
    )
    together_TH = run_layer(pool, layer)
    for token in range(41):
        mine = layer.token_P == token
        alone = replace(
            layer,
            x_TH=layer.x_TH[token : token + 1],
            expert_P=layer.expert_P[mine],
            token_P=np.zeros(mine.sum(), np.int64),
            weight_P=layer.weight_P[mine],
        )
        assert np.array_equal(run_layer(pool, alone)[0], together_TH[token])


def test_bits_do_not_depend_on_the_order_of_pairs(
    pool: ExpertPool, rng: np.random.Generator
) -> None:
    layer = random_layer(
        rng, num_experts=6, hidden=64, width=32, num_tokens=20, num_pairs=0, dtype="bf16"
    )
    expert_P, token_P = (ids.ravel() for ids in np.mgrid[0:6, 0:20])
    weight_P = rng.random(120, np.float32)
    orders = [np.arange(120), rng.permutation(120), rng.permutation(120)]
    results = [
        run_layer(
            pool,
            replace(layer, expert_P=expert_P[o], token_P=token_P[o], weight_P=weight_P[o]),
        )
        for o in orders
    ]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_no_pairs_and_no_tokens(pool: ExpertPool, rng: np.random.Generator) -> None:
    layer = random_layer(
        rng, num_experts=2, hidden=9, width=4, num_tokens=3, num_pairs=0, dtype="f32"
    )
    assert np.array_equal(run_layer(pool, layer), np.zeros((3, 9), np.float32))
    assert run_layer(pool, replace(layer, x_TH=layer.x_TH[:0])).shape == (0, 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x_TH", "w13_EFH", "w2_EHI", "weight_P"])
def test_nan_and_inf_come_out(
    pool: ExpertPool, rng: np.random.Generator, place: str, bad: float, dtype: str
) -> None:
    layer = random_layer(
        rng, num_experts=2, hidden=45, width=37, num_tokens=6, num_pairs=6, dtype=dtype
    )
    layer = replace(layer, token_P=np.arange(6), expert_P=np.arange(6) % 2)
    spoilt = getattr(layer, place).copy()
    values = np.array([bad], np.float32)
    spoilt.flat[1] = f32_to_bf16(values)[0] if spoilt.dtype == np.uint16 else bad
    out_TH = run_layer(pool, replace(layer, **{place: spoilt}))
    is_finite_T = np.isfinite(out_TH).all(axis=1)
    hit_T = {"x_TH": [0], "weight_P": [1]}.get(place, [0, 2, 4])
    assert not is_finite_T[hit_T].any()
    assert np.delete(is_finite_T, hit_T).all()


def test_denormals_count_as_zero(pool: ExpertPool, rng: np.random.Generator) -> None:
    layer = random_layer(
        rng, num_experts=1, hidden=40, width=8, num_tokens=1, num_pairs=1, dtype="f32"
    )
    tiny = replace(layer, w2_EHI=np.full_like(layer.w2_EHI, 1e-40))
    huge = replace(tiny, weight_P=np.full_like(layer.weight_P, 1e38))
    assert np.array_equal(run_layer(pool, huge), np.zeros((1, 40), np.float32))


def test_weights_may_be_views_at_odd_addresses(pool: ExpertPool, rng: np.random.Generator) -> None:
    layer = random_layer(
        rng, num_experts=2, hidden=33, width=20, num_tokens=4, num_pairs=8, dtype="bf16"
    )
    expected_TH = run_layer(pool, layer)

    def shifted(array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        raw = b"x" + array.tobytes()
        return np.frombuffer(raw, array.dtype, offset=1).reshape(array.shape)

    moved = replace(layer, w13_EFH=shifted(layer.w13_EFH), w2_EHI=shifted(layer.w2_EHI))
    assert np.array_equal(run_layer(pool, moved), expected_TH)


def test_bf16_weights_are_read_exactly(pool: ExpertPool, rng: np.random.Generator) -> None:
    layer = random_layer(
        rng, num_experts=3, hidden=70, width=30, num_tokens=9, num_pairs=20, dtype="bf16"
    )
    as_f32 = replace(layer, w13_EFH=bf16_to_f32(layer.w13_EFH), w2_EHI=bf16_to_f32(layer.w2_EHI))
    assert np.array_equal(run_layer(pool, layer), run_layer(pool, as_f32))


def test_a_thousand_layers(pool: ExpertPool, rng: np.random.Generator) -> None:
    layers = [
        random_layer(
            rng,
            num_experts=4,
            hidden=24,
            width=17,
            num_tokens=int(tokens),
            num_pairs=int(tokens) * 2,
            dtype="bf16",
        )
        for tokens in rng.integers(1, 40, 20)
    ]
    expected = [run_layer(pool, layer) for layer in layers]
    for number in rng.integers(0, len(layers), 1000):
        assert np.array_equal(run_layer(pool, layers[number]), expected[number])


BROKEN = {
    "w2 of another dtype": lambda a: a | {"w2_EHI": a["w2_EHI"].astype(np.float32)},
    "w13 without up rows": lambda a: a | {"w13_EFH": a["w13_EFH"][:, :5].copy()},
    "w13 not contiguous": lambda a: a | {"w13_EFH": a["w13_EFH"][:, ::-1]},
    "weights in float64": lambda a: a | {k: a[k].astype(float) for k in ("w13_EFH", "w2_EHI")},
    "x in float64": lambda a: a | {"x_TH": a["x_TH"].astype(float)},
    "x too narrow": lambda a: a | {"x_TH": a["x_TH"][:, :3].copy()},
    "expert out of range": lambda a: a | {"expert_P": a["expert_P"] + 2},
    "negative expert": lambda a: a | {"expert_P": a["expert_P"] - 2},
    "token out of range": lambda a: a | {"token_P": a["token_P"] + 3},
    "negative token": lambda a: a | {"token_P": a["token_P"] - 3},
    "too few tokens ids": lambda a: a | {"token_P": a["token_P"][1:]},
    "ids that are no integers": lambda a: a | {"token_P": a["token_P"].astype(float)},
    "routing weights in float64": lambda a: a | {"weight_P": a["weight_P"].astype(float)},
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_fit_is_refused_before_it_runs(
    pool: ExpertPool, rng: np.random.Generator, what: str
) -> None:
    layer = random_layer(
        rng, num_experts=2, hidden=8, width=5, num_tokens=3, num_pairs=4, dtype="bf16"
    )
    good = {name: getattr(layer, name) for name in Layer.__slots__}
    broken = Layer(**BROKEN[what](dict(good)))
    with pytest.raises(ValueError):
        run_layer(pool, broken)
    assert relative_error(run_layer(pool, layer), layer) < 1e-5  # the pool goes on


def test_out_must_fit(pool: ExpertPool, rng: np.random.Generator) -> None:
    layer = random_layer(
        rng, num_experts=2, hidden=8, width=5, num_tokens=3, num_pairs=4, dtype="f32"
    )
    read_only = normal(rng, (3, 8))
    read_only.flags.writeable = False
    for out in (np.empty((3, 7), np.float32), np.empty((3, 8)), read_only):
        with pytest.raises(ValueError, match="out"):
            pool.submit(*layer.arrays(), out)
