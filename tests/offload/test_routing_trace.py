"""Routing traces: what is recorded comes back, and what is no trace is one sentence."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiddler.errors import ProfileError
from offload.demand import Demand
from offload.routing_trace import RoutingTrace, TraceRecorder, load_trace, save_trace
from tests.offload.planner_cases import model

SIZES = model(num_layers=3, moe_layers=(0, 2))
DEMAND = Demand(
    on_gpu=True,
    num_layers=3,
    layers=(),
    top_k=2,
    hidden=64,
    codes="int4",
    activations="f32",
    few="int8",
    expert_bytes=1000,
    expert_numel=2000,
    layer_bytes=500.0,
    shared_bytes=0.0,
    layer_numel=250.0,
    head_bytes=100,
    vocab=50,
    kv_bytes=16,
    attention_width=64,
    staging_slots=0,
    disk_share=0.0,
    disk_bytes=1000,
    step_tokens=0,
)


def recorded() -> RoutingTrace:
    recorder = TraceRecorder(SIZES, DEMAND)
    rng = np.random.default_rng(0)
    for length in (3, 5):
        routes_TLK = rng.integers(0, 8, (length, 3, 2)).astype(np.int16)
        routes_TLK[:, 1] = -1  # no experts there
        recorder(list(range(length)), routes_TLK)
    return recorder.trace("org/name", "abc", "hash")


def test_a_recorded_trace_comes_back(tmp_path: Path) -> None:
    trace, path = recorded(), tmp_path / "trace.npz"
    assert trace.experts_TMK.shape == (8, 2, 2) and trace.starts_W.tolist() == [0, 3]
    save_trace(trace, path)
    loaded = load_trace(path)
    assert (loaded.model, loaded.revision, loaded.corpus_sha256) == ("org/name", "abc", "hash")
    assert loaded.footprint == SIZES and loaded.demand == DEMAND
    for name in ("experts_TMK", "tokens_T", "starts_W"):
        assert np.array_equal(getattr(loaded, name), getattr(trace, name))
        assert getattr(loaded, name).dtype == getattr(trace, name).dtype
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]


def test_a_trace_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Which knew neither ``host_bytes`` nor a ``demand``."""
    path = tmp_path / "trace.npz"
    save_trace(recorded(), path)
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays}
    about = json.loads(kept["about"].tobytes())
    del about["footprint"]["host_bytes"], about["demand"]
    kept["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(path, **kept)
    loaded = load_trace(path)
    assert loaded.footprint == SIZES and loaded.demand is None


def stored(path: Path, **changes: Any) -> Path:
    """A trace with some of its arrays, or entries of its description, replaced."""
    save_trace(recorded(), path)
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays}
    about = json.loads(kept["about"].tobytes())
    about |= {name: value for name, value in changes.items() if name in about}
    about["footprint"] |= {n: v for n, v in changes.items() if n in about["footprint"]}
    kept |= {name: value for name, value in changes.items() if name in kept}
    if "about" not in changes:
        kept["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(path, **kept)
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 2}, "its version is 2, this fiddler reads 1"),
        ({"model": 3}, "has no name"),
        ({"about": np.frombuffer(b"{", np.uint8)}, "of its model cannot be read"),
        ({"num_experts": "8"}, "of its model cannot be read"),
        ({"num_experts": 4}, "experts that its model does not have"),
        ({"demand": {"codes": "int4"}}, "of its model cannot be read"),
        *(
            ({"demand": asdict(DEMAND) | change}, "of its model cannot be read")
            for change in (
                *({"codes": "int3"}, {"few": "int4"}, {"few": []}, {"vocab": "50"}, {"more": 1}),
                *({"kv_bytes": -1}, {"layer_bytes": float("nan")}, {"expert_bytes": 0}),
            )
        ),
        ({"top_k": 3}, "its routes are"),
        ({"top_k": 9}, "of its model cannot be read"),
        ({"moe_layers": []}, "of its model cannot be read"),
        ({"experts": np.zeros((8, 2, 2))}, "no whole numbers"),
        ({"experts": np.zeros((7, 2, 2), int)}, "its routes are"),
        ({"experts": np.full((8, 2, 2), -1)}, "experts that its model does not have"),
        ({"tokens": np.zeros((2, 4), int)}, "its routes are"),
        ({"starts": np.array([0, 9])}, "not in order"),
        ({"starts": np.array([1])}, "not in order"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ProfileError, match=sentence) as caught:
        load_trace(stored(tmp_path / "trace.npz", **changes))
    assert "\n" not in caught.value.message and "--trace" in caught.value.hint


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        load_trace(path)
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        load_trace(tmp_path)
    save_trace(recorded(), path)
    whole, other = path.read_bytes(), io.BytesIO()
    np.savez(other, counts=np.zeros(3))
    for content in (b"", b"{}", whole[: len(whole) // 2], whole[:40], other.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ProfileError, match="is not a usable trace"):
            load_trace(path)


def test_every_cut_and_flipped_byte_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    save_trace(recorded(), path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        path.write_bytes(bytes(broken))
        try:
            load_trace(path)
        except ProfileError as error:
            assert "\n" not in error.message


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be written: No such file"):
        save_trace(recorded(), tmp_path / "none" / "trace.npz")
