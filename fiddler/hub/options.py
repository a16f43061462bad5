"""How the hub is asked: who asks, where, and into which cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called with what is pulled, the bytes that are here and the bytes there will be.

Calls come from several threads, one at a time.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """Settings of one visit to the hub; None means what ``huggingface_hub`` would take.

    ``token`` defaults to ``HF_TOKEN`` or the stored login, ``endpoint`` to ``HF_ENDPOINT``,
    ``cache_dir`` to ``HF_HUB_CACHE`` or ``HF_HOME``.
    """

    token: str | None = None
    offline: bool = False
    progress: Progress | None = None
    endpoint: str | None = None
    cache_dir: Path | None = None

    @property
    def is_offline(self) -> bool:
        """Whether nothing may be sent: asked for here, or by ``HF_HUB_OFFLINE``."""
        from huggingface_hub import constants

        return self.offline or constants.is_offline_mode()

    @property
    def site(self) -> str:
        """The hub's address, for requests and for messages."""
        from huggingface_hub import constants

        return (self.endpoint or constants.ENDPOINT).rstrip("/")

    @property
    def cache(self) -> Path:
        """The folder of all cached repositories."""
        from huggingface_hub import constants

        return (self.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser().absolute()
