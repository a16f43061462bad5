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
