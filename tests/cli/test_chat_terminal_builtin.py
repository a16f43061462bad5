"""``fiddler chat`` in a pseudo-terminal with the built-in model, from key to screen."""

import json
import sys
from pathlib import Path

import pytest
from terminal import CTRL_C, CTRL_D, PROMPT, terminal

pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")

FIDDLER = [sys.executable, "-m", "fiddler"]


def test_a_chat_with_the_builtin_model(tmp_path: Path) -> None:
    saved = tmp_path / "chat.json"
    with terminal([*FIDDLER, "chat", "--temperature", "0"], tmp_path) as chat:
        chat.expect(PROMPT)
        chat.enter("What is 3 + 4?")
        chat.expect("3 + 4 = 7")
        chat.expect("tok/s")
        chat.enter("What is 12 + 5?")
        chat.expect("12 + 5 = 17")
        assert "cached" in chat.expect("TTFT"), "the second turn computed the first one again"
        chat.enter("/set ignore_eos=on")
        chat.enter("Tell me a story.")
        chat.expect("nce upon")
        chat.type(CTRL_C)
        chat.expect("stopped; what was written is kept")
        chat.enter("/set ignore_eos=off")
        chat.enter("What is 1 + 1?")
        chat.expect("1 + 1 = 2")
        chat.enter(f"/save {saved}")
        chat.expect("saved 4 turns")
        chat.type(CTRL_D)
        assert chat.exit_code() == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m.get("finish_reason") for m in messages[1::2]] == ["stop", "stop", "cancelled", "stop"]
