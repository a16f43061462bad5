"""``/set``: every settable field takes its own type, and errors are sentences."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cli.params_edit import SETTABLE, edit_params
from fiddler.errors import ConfigError
from fiddler.sampling_params import SamplingParams

DEFAULTS = SamplingParams().with_defaults({"temperature": 0.6, "top_k": 20})

VALUES: dict[str, st.SearchStrategy[object]] = {
    "max_tokens": st.none() | st.integers(1, 10**6),
    "min_tokens": st.integers(0, 10**6),
    "temperature": st.floats(0, 100),
    "top_k": st.integers(-1, 10**6),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 10),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "seed": st.none() | st.integers(),
    "stop": st.lists(st.text(min_size=1), max_size=3).map(tuple),
    "stop_token_ids": st.lists(st.integers(0, 9), max_size=3).map(tuple),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(0, 9), st.floats(-9, 9), max_size=3),
    "skip_special_tokens": st.booleans(),
}


def test_every_settable_field_is_tested() -> None:
    assert set(VALUES) == set(SETTABLE)


@given(data=st.data(), name=st.sampled_from(SETTABLE))
def test_a_value_written_as_json_is_set(data: st.DataObject, name: str) -> None:
    value = data.draw(VALUES[name])
    unlimited = dataclasses.replace(DEFAULTS, max_tokens=None)  # allows any min_tokens
    for between in (" = ", "=", " ", "  "):
        edited = edit_params(unlimited, f"{name}{between}{json.dumps(value)}", DEFAULTS)
        assert edited == dataclasses.replace(unlimited, **{name: value})


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("stop=END", "stop", ("END",)),
        ("stop=a=b", "stop", ("a=b",)),
        ("stop a=b", "stop", ("a=b",)),
        ("temperature 0.3", "temperature", 0.3),
        ("stop_token_ids=1, 2", "stop_token_ids", (1, 2)),
        ("ignore_eos=on", "ignore_eos", True),
        ("max_tokens=none", "max_tokens", None),
        ("temperature=default", "temperature", 0.6),
    ],
)
def test_short_forms(text: str, name: str, value: object) -> None:
    changed = dataclasses.replace(DEFAULTS, temperature=0.1)
    assert getattr(edit_params(changed, text, DEFAULTS), name) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temperature", "name=value"),
        ("=1", "name=value"),
        ("temprature=1", "did you mean 'temperature'"),
        ("n=2", "unknown parameter 'n'"),
        ("temperature=hot", "temperature must be a number, not 'hot'"),
        ("max_tokens=1.5", "max_tokens must be a whole number"),
        ("max_tokens=0", "max_tokens must be at least 1"),
        ("min_p=none", "min_p must be a number"),
        ("ignore_eos=maybe", "on or off"),
        ("logit_bias=[1]", "JSON object"),
        ("stop=[1]", "JSON list"),
        ("stop=[", "JSON list"),
    ],
)
def test_errors_say_what_is_expected(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        edit_params(DEFAULTS, text, DEFAULTS)


@given(text=st.text(max_size=30))
def test_no_text_is_a_crash(text: str) -> None:
    for candidate in (text, *(f"{name}={text}" for name in SETTABLE)):
        try:
            edit_params(DEFAULTS, candidate, DEFAULTS)
        except ConfigError as error:
            assert "\n" not in error.message or "\n" in text
