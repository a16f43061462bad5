"""Errors for people: unknown names, engine options out of range, and what all errors share."""

import pickle
import re
import traceback
from dataclasses import dataclass, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler import errors
from fiddler.config import EngineConfig
from fiddler.dtype_names import DTYPES
from fiddler.errors import (
    BY_OTHER_NAMES,
    ConfigError,
    FiddlerError,
    named_arguments,
    nearest,
    reject_unknown,
)
from fiddler.sampling_params import SamplingParams


def test_every_error_is_a_fiddler_error_with_message_and_hint() -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) == 11
    for kind in kinds:
        error = kind("it broke", hint="mend it")
        assert isinstance(error, FiddlerError)
        assert (str(error), error.message, error.hint) == ("it broke", "it broke", "mend it")
        assert kind("it broke").hint == ""


def test_a_traceback_ends_with_message_and_hint() -> None:
    error = ConfigError("it broke", hint="mend it")
    error.add_note("at noon")
    for hint, told in (("mend it", ["at noon", "hint: mend it"]), ("", ["at noon"])):
        error.hint = hint  # a caller may know better
        for one in (error, pickle.loads(pickle.dumps(error))):
            lines = "".join(traceback.format_exception_only(one)).splitlines()
            assert lines[0] == "fiddler.errors.ConfigError: it broke"
            assert sorted(lines[1:]) == told


def test_errors_of_arguments_are_value_errors_too() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.PromptError, ValueError)


def test_nearest_names_the_closest_or_nothing() -> None:
    assert nearest("dtyp", ["dtype", "device"]) == "; did you mean 'dtype'?"
    assert nearest("zzz", ["dtype", "device"]) == ""
    assert nearest("max_new_tokens", ["max_tokens", "min_tokens"]) == "; did you mean 'max_tokens'?"
    assert nearest("temp", ["temperature", "top_k"]) == "; did you mean 'temperature'?"
    assert nearest("to", ["top_k", "top_p"]) == ""  # either
    assert nearest("best_of", ["stop", "top_k"]) == ""  # half the letters are no likeness


def test_the_first_unknown_name_is_reported_with_all_valid_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        reject_unknown("colour", ["red", "blau", "grun"], ["red", "blue"])
    assert caught.value.message == "unknown colour 'blau'; did you mean 'blue'?"
    assert caught.value.hint == "valid names: blue, red"


def test_a_decorated_dataclass_still_takes_its_defaults() -> None:
    @named_arguments("knob")
    @dataclass(kw_only=True)
    class Knobs:
        size: int = 3

    assert Knobs().size == 3 and Knobs(size=4).size == 4
    with pytest.raises(ConfigError, match="unknown knob 'sise'; did you mean 'size'"):
        Knobs(sise=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("vram", "vram_gb"),
        ("max_context", "max_model_len"),
        ("max_length", "max_model_len"),
        ("threads", "cpu_threads"),
        ("load_fromat", "load_format"),
    ],
)
def test_an_unknown_engine_option_names_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{wrong: 1})
    message = caught.value.message
    assert message.startswith(f"unknown engine option {wrong!r}")
    if wrong != "max_context":  # nothing is near enough to guess
        assert message.endswith(f"did you mean {meant!r}?")
    assert meant in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("vram_gb", -1, "0 or more GiB"),
        ("vram_gb", "8", "0 or more GiB"),
        ("ram_gb", float("nan"), "0 or more GiB"),
        ("ram_gb", float("inf"), "0 or more GiB"),
        ("ram_gb", 1e300, "0 or more GiB"),  # infinitely many bytes
        ("vram_gb", 10**400, "0 or more GiB"),
        ("vram_gb", True, "0 or more GiB"),
        ("max_model_len", 0, "a whole number of at least 1"),
        ("max_model_len", "512", "a whole number of at least 1"),
        ("max_num_seqs", 2.5, "a whole number of at least 1"),
        ("objective", 5, "a word such as decode"),
        ("max_batched_tokens", 0, "a whole number of at least 1"),
        ("cpu_threads", 0, "a whole number of at least 1"),
        ("device", "gpu", "auto, cuda, cpu"),
        ("load_format", "gguf", "auto, dummy"),
    ],
)
def test_an_engine_option_out_of_range_names_itself_and_what_is_valid(
    name: str, value: Any, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{name: value})
    message = caught.value.message
    assert name in message and expected in message and message.endswith(f"not {value!r}")


@given(st.none() | st.integers() | st.text() | st.sampled_from(["half", "float16", "w4g12", "q8"]))
def test_what_is_no_type_of_weights_brings_a_few_that_are(asked: Any) -> None:
    with pytest.raises(ConfigError, match="is no type of weights") as caught:
        EngineConfig(dtype=asked)
    message = caught.value.message
    named = re.findall(r"'([\w-]+)'", message.removeprefix(repr(asked)))
    assert message.startswith(repr(asked)) and 1 <= len(named) <= 3 and set(named) <= set(DTYPES)
    assert "float32, bfloat16" in caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ("gpu_memory_utilization", "vram_gb"),
        ("tensor_parallel_size", "one GPU"),
        ("quantization", "config.json"),
        ("device_map", "places experts itself"),
        ("n_ctx", "max_model_len"),
        ("n_gpu_layers", "vram_gb"),
    ],
)
def test_names_of_other_libraries_are_known(wrong: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown engine option '{wrong}'") as caught:
        EngineConfig(**{wrong: 1})
    assert advice in caught.value.hint


def test_advice_names_nothing_that_is_an_option() -> None:
    own = {field.name for cls in (EngineConfig, SamplingParams) for field in fields(cls)}
    assert not own & set(BY_OTHER_NAMES)
