"""The one place where a command gets its model."""

import gc
import weakref
from typing import Any

from fiddler.cli.session import open_llm


def test_a_closed_model_is_freed_from_a_frozen_heap() -> None:
    llm: Any = open_llm(model="builtin")
    assert gc.get_freeze_count() > 100_000
    store = weakref.ref(llm._running.experts.store)
    llm.close()
    del llm
    assert store() is None and gc.get_freeze_count() == 0
