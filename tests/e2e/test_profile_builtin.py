"""Profiling the real engine: what requests report is what the executor counted."""

import numpy as np

from fiddler import LLM
from fiddler.cli.profile import _sizes
from fiddler.corpus import Corpus
from fiddler.profiling import profile_corpus
from offload.routing_trace import TraceRecorder
from offload.simulation import counts

TEXT = "Mira is a baker. She lives in Toll. Who bakes the bread of the town? It is Mira. " * 12


def test_the_parts_add_up_to_the_executors_own_counts() -> None:
    with LLM("builtin", vram_gb=0.05, max_model_len=256) as llm:
        recorder = TraceRecorder(*_sizes(llm))
        result = profile_corpus(llm, Corpus((TEXT,), "h"), on_window=recorder)
        counted = np.array(llm.expert_counts())
        num_tokens = len(llm.tokenizer.encode(TEXT))
    assert np.array_equal(result.profile.popularity.counts_LE + result.held_out_LE, counted)
    assert result.profile.num_tokens + result.held_out_tokens == num_tokens
    assert (counted.sum(axis=1) == num_tokens * llm.model_config.top_k).all()
    trace = recorder.trace(llm.model_name, None, "h")
    assert trace.experts_TMK.shape == (num_tokens, 4, 4)
    in_trace = counts(trace.experts_TMK, llm.model_config.num_experts)
    assert np.array_equal(in_trace, counted)
    assert 0 < result.present.num_resident < 64
    assert result.present.profile > result.present.uniform  # its routing is uneven
