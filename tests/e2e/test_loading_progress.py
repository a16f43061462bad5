"""What a start reports to whoever waits for it, in order."""

import pytest

from fiddler.loading import workers
from tests.e2e.conftest import open_folder
from tests.tiny_models import shared_tiny

COMPILING = "compiling CPU kernels, once"


@pytest.mark.parametrize("needs_compile", [True, False])
def test_kernels_are_compiled_before_experts_are_loaded(
    monkeypatch: pytest.MonkeyPatch, needs_compile: bool
) -> None:
    monkeypatch.setattr(workers, "needs_compile", lambda: False)
    monkeypatch.setattr(workers, "needs_warm_up", lambda kind, activations: needs_compile)
    seen: list[tuple[str, int, int]] = []
    open_folder(shared_tiny("mixtral"), on_progress=lambda *at: seen.append(at)).close()
    if needs_compile:
        assert [seen.pop(0), seen.pop(0)] == [(COMPILING, 0, 1), (COMPILING, 1, 1)]
    assert {what for what, _, _ in seen} == {"experts"}


@pytest.mark.parametrize("needs_compile", [True, False])
def test_who_does_not_watch_is_told_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, needs_compile: bool
) -> None:
    monkeypatch.setattr(workers, "needs_compile", lambda: needs_compile)
    monkeypatch.setattr(workers, "needs_warm_up", lambda kind, activations: False)
    open_folder(shared_tiny("mixtral")).close()
    said = [r.message for r in caplog.records if "compiling CPU kernels" in r.message]
    assert len(said) == needs_compile


@pytest.mark.parametrize("missing", [[], ["workers"], ["workers", "f32/f32"]])
def test_kernels_are_compiled_side_by_side(
    monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    asked: list[str] = []
    compiled: list[list[str]] = []
    monkeypatch.setattr(workers, "uncached", lambda names: asked.extend(names) or missing)
    monkeypatch.setattr(workers, "precompile", compiled.append)
    open_folder(shared_tiny("mixtral")).close()
    assert set(asked) == {"workers", "f32/f32"}
    assert compiled == [missing] * (len(missing) > 1)
