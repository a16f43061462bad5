"""Profiling against a model whose routing is known: counts, held-out part, hit rates."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.corpus import Corpus, is_held_out
from fiddler.errors import ConfigError, ProfileError
from fiddler.held_out import judge
from fiddler.profiling import count_routes, profile_corpus
from offload.popularity import Popularity, Profile
from tests.profiling_fakes import DENSE_LAYER, NUM_EXPERTS, NUM_LAYERS, FakeLLM, experts_of

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 20


def test_every_token_is_counted_once_in_its_part() -> None:
    llm = FakeLLM()
    result = profile_corpus(llm, Corpus((TEXT,), "hash"), held_out=0.25)
    assert [token for window in llm.windows for token in window] == list(TEXT.encode())
    expected = [Counter(), Counter()]  # type: list[Counter[tuple[int, int]]]
    for index, window in enumerate(llm.windows):
        for token in window:
            for layer in (0, 2):
                expected[is_held_out(index, 0.25)].update(
                    (layer, expert) for expert in experts_of(token, layer)
                )
    for counted, counter in zip(
        (result.profile.popularity.counts_LE, result.held_out_LE), expected, strict=True
    ):
        assert {place: counted[place] for place in np.ndindex(counted.shape) if counted[place]} == (
            dict(counter)
        )
    assert result.profile.num_tokens + result.held_out_tokens == len(TEXT)
    assert result.moe_layers == (0, 2)
    assert (result.profile.model, result.profile.revision) == ("org/fake", "r1")
    assert result.profile.corpus_sha256 == "hash"


def test_conversations_go_through_the_chat_template() -> None:
    llm = FakeLLM()
    chat = [{"role": "user", "content": "x" * 50}, {"role": "assistant", "content": "y" * 50}]
    profile_corpus(llm, Corpus((chat, chat, chat, chat), "hash"))
    text = "".join(f"<{message['role']}>{message['content']}" for message in chat)
    assert [t for window in llm.windows for t in window] == list(text.encode()) * 4


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    profile_corpus(
        FakeLLM(), Corpus((TEXT,), "h"), on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (len(TEXT), len(TEXT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=8, max_size=8), min_size=3, max_size=3),
    st.lists(st.lists(st.integers(0, 50), min_size=8, max_size=8), min_size=3, max_size=3),
    st.integers(0, 16),
)
def test_rates_are_ordered(
    train: list[list[int]], held_out: list[list[int]], num_resident: int
) -> None:
    held_out_LE = np.array(held_out)
    held_out_LE[DENSE_LAYER] = 0
    profile = Profile(
        model="m",
        architecture=None,
        revision=None,
        corpus_sha256="h",
        num_tokens=1,
        popularity=Popularity(np.array(train)),
        created="now",
    )
    result = judge(
        profile, held_out_LE[None], moe_layers=(0, 2), num_resident=num_resident, held_out_tokens=1
    )
    for rates in (result.present, *result.by_share):
        assert 0.0 <= rates.profile <= 1.0
        assert 0.0 <= rates.uniform <= 1.0
        assert rates.best <= 1.0
        if held_out_LE[0].sum() == held_out_LE[2].sum():  # as in a model: layers weigh the same
            assert rates.best >= max(rates.profile, rates.uniform) - 1e-12
    assert result.placement.num_resident == num_resident
    if num_resident == 16 and held_out_LE.any():
        assert result.present.profile == result.present.uniform == 1.0


def test_a_skewed_text_is_placed_better_than_without_a_profile() -> None:
    text = "aaaaaaab" * 100  # tokens 97 and 98: few experts carry nearly everything
    result = profile_corpus(FakeLLM(num_resident=4), Corpus((text,), "h"))
    assert result.present.profile > 0.8
    assert result.present.profile == pytest.approx(result.present.best)
    assert result.present.profile > result.present.uniform


@given(st.data())
def test_routes_are_counted_like_by_hand(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, 6))
    size = tokens * NUM_LAYERS * 2
    ids = data.draw(st.lists(st.integers(-1, NUM_EXPERTS - 1), min_size=size, max_size=size))
    routes_TLK = np.array(ids, dtype=np.int16).reshape(tokens, NUM_LAYERS, 2)
    counts_LE = count_routes([routes_TLK], NUM_LAYERS, NUM_EXPERTS)
    for layer, expert in np.ndindex(NUM_LAYERS, NUM_EXPERTS):
        assert counts_LE[layer, expert] == (routes_TLK[:, layer] == expert).sum()


def test_a_short_corpus_is_refused_before_the_model_runs() -> None:
    llm = FakeLLM()
    with pytest.raises(ProfileError, match="has 5 tokens, too few") as caught:
        profile_corpus(llm, Corpus(("hello",), "h"))
    assert "at least 160" in caught.value.hint
    assert not llm.windows


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.2, 0.6, float("nan")])
def test_a_senseless_held_out_share_is_refused(held_out: float) -> None:
    with pytest.raises(ConfigError, match=r"between 0\.05 and 0\.5"):
        profile_corpus(FakeLLM(), Corpus((TEXT,), "h"), held_out=held_out)
