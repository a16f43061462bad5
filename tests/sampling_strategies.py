"""Small vocabularies' logits, and settings of every kind, for property tests of sampling."""

from hypothesis import strategies as st

from fiddler.sampling_params import SamplingParams

some_logits = st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=10, unique=True)
some_params = st.builds(
    SamplingParams,
    temperature=st.floats(0.2, 3),
    top_k=st.integers(-1, 12),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    repetition_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 5), st.floats(-5, 5), max_size=3),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(st.integers(0, 2), max_size=2),
)
some_tokens = st.lists(st.integers(0, 5), min_size=1, max_size=6)
