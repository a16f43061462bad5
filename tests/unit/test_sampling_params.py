"""Sampling parameters: what is accepted, what is refused and how, and which default wins."""

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest

from fiddler.errors import ConfigError
from fiddler.sampling_params import SamplingParams

NUMBERS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
)
WHOLE = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "routed_experts")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("max_new_tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("stops", "stop"),
        ("repetition_penality", "repetition_penalty"),
        ("num_logprobs", "logprobs"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{wrong: 1})
    assert caught.value.message == (
        f"unknown sampling parameter {wrong!r}; did you mean {meant!r}?"
    )
    assert all(field.name in caught.value.hint for field in fields(SamplingParams))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1025),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 101),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logprobs", -1),
        ("prompt_logprobs", 101),
        ("stop", ("",)),
        ("stop", ("a", 3)),
        ("stop", 3),
        ("stop", {"a": 1}),
        ("stop_token_ids", ("a",)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", 5),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", [5]),
        *((name, float("nan")) for name in NUMBERS),
        *((name, "1") for name in NUMBERS),
        *((name, True) for name in NUMBERS),
        *((name, 1.5) for name in WHOLE),
        *((name, float("inf")) for name in NUMBERS),
        *((name, "no") for name in SWITCHES),
        *((name, None) for name in (*SWITCHES, "n", "min_tokens", "min_p", "logit_bias")),
    ],
)
def test_a_value_that_cannot_work_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.message.startswith(f"{name} must be ")
    assert caught.value.message.endswith(f", not {value!r}")


def test_more_tokens_at_least_than_at_most_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"min_tokens must be at most max_tokens \(3\), not 4"):
        SamplingParams(min_tokens=4, max_tokens=3)
    assert SamplingParams(min_tokens=4, max_tokens=None).min_tokens == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0),
        ("top_k", -1),
        ("top_p", 1),
        ("temperature", 0),
        ("seed", -5),
        ("seed", np.int64(7)),
        ("temperature", np.float32(0.5)),
        ("logprobs", 0),
        ("logit_bias", {np.int64(3): 100}),
    ],
)
def test_the_ends_of_the_ranges_and_numpy_numbers_are_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_one_stop_string_a_list_and_none_become_tuples() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)


def test_parameters_are_frozen_and_replace_checks_again() -> None:
    params = SamplingParams(temperature=0.5)
    with pytest.raises(FrozenInstanceError):
        params.temperature = 0.7  # type: ignore[misc]
    assert replace(params, top_k=3) == SamplingParams(temperature=0.5, top_k=3)
    with pytest.raises(ConfigError, match="top_p"):
        replace(params, top_p=7)


def test_what_was_set_wins_over_the_model_and_the_model_over_the_house() -> None:
    model = {"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 3, "do_sample": True}
    filled = SamplingParams(top_k=0).with_defaults(model)
    assert (filled.temperature, filled.top_k, filled.top_p) == (0.6, 0, 1.0)
    assert filled.repetition_penalty == 1.0
    assert SamplingParams(temperature=1.5).with_defaults(model).temperature == 1.5


def test_a_model_that_says_not_to_sample_is_greedy_unless_told_otherwise() -> None:
    model = {"do_sample": False, "temperature": 0.6}
    assert SamplingParams().with_defaults(model).temperature == 0.0
    assert SamplingParams(temperature=0.3).with_defaults(model).temperature == 0.3


def test_a_bad_value_of_the_model_names_the_file_unless_it_is_not_needed() -> None:
    model = {"temperature": "hot", "top_p": 0}
    with pytest.raises(ConfigError) as caught:
        SamplingParams(top_p=0.5).with_defaults(model)
    assert caught.value.message == (
        "in the model's generation_config.json, temperature must be a number, not 'hot'"
    )
    filled = SamplingParams(temperature=0.5, top_p=0.5).with_defaults(model)
    assert (filled.temperature, filled.top_p) == (0.5, 0.5)


def test_filling_in_changes_nothing_else() -> None:
    params = SamplingParams(
        n=2, stop="x", stop_token_ids=[4], logit_bias={1: 2.0}, seed=3, ignore_eos=True
    )
    filled = params.with_defaults({})
    untouched = {f.name for f in fields(params)} - {
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
    }
    assert {n: getattr(filled, n) for n in untouched} == {n: getattr(params, n) for n in untouched}
