"""How ``--think`` asks a chat template for reasoning, in the name that templates share."""

from typing import Any

ENABLE_THINKING: dict[str, dict[str, Any]] = {
    "auto": {},
    "on": {"enable_thinking": True},
    "off": {"enable_thinking": False},
}
