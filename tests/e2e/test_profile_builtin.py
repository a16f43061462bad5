"""Profiling the real engine: what requests report is what the executor counted."""

import numpy as np

from fiddler import LLM
from fiddler.corpus import Corpus
from fiddler.profiling import profile_corpus

TEXT = "Mira is a baker. She lives in Toll. Who bakes the bread of the town? It is Mira. " * 12


def test_the_parts_add_up_to_the_executors_own_counts() -> None:
    with LLM("builtin", vram_gb=0.05, max_model_len=256) as llm:
        result = profile_corpus(llm, Corpus((TEXT,), "h"))
        counted = np.array(llm.expert_counts())
        num_tokens = len(llm.tokenizer.encode(TEXT))
    assert np.array_equal(result.profile.popularity.counts_LE + result.held_out_LE, counted)
    assert result.profile.num_tokens + result.held_out_tokens == num_tokens
    assert (counted.sum(axis=1) == num_tokens * llm.model_config.top_k).all()
    assert 0 < result.present.num_resident < 64
    assert result.present.profile > result.present.uniform  # its routing is uneven
