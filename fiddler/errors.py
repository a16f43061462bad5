"""Errors meant for the user: one sentence that says what is wrong, one hint that says what to do.

``assert`` is for us; these are for people. The CLI prints them without a traceback.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
_HINT = "hint: "


class FiddlerError(Exception):
    """Base of all errors a user can cause or cure.

    ``hint`` is one more sentence with the next step, or an empty string. A traceback ends with it.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def hint(self) -> str:
        """What to do next."""
        return self._hint

    @hint.setter
    def hint(self, hint: str) -> None:
        self._hint = hint
        others = [note for note in getattr(self, "__notes__", ()) if not note.startswith(_HINT)]
        self.__notes__ = [*others, f"{_HINT}{hint}"] if hint else others


class ConfigError(FiddlerError, ValueError):
    """An argument or a setting that cannot work."""


class CheckpointError(FiddlerError):
    """A model folder that is incomplete, damaged or of an unknown kind."""


class HubError(FiddlerError):
    """The hub refused, did not answer, or does not have what was asked for."""


class TemplateError(FiddlerError):
    """A chat template that failed or tried to leave its sandbox."""


class PromptError(FiddlerError, ValueError):
    """A prompt that cannot be run: empty, or longer than the context."""


class OutOfMemoryError(FiddlerError):
    """A plan that does not fit in VRAM or RAM; raised before anything is allocated."""


class ProfileError(FiddlerError):
    """A routing profile that is damaged or belongs to another model."""


class QuantizeError(FiddlerError):
    """Weights that cannot be quantised as asked, or a result that cannot be written."""


class NumericsError(FiddlerError):
    """NaN or Inf where a finite number is needed."""


class WorkerError(FiddlerError):
    """Worker threads that failed or stopped answering; the engine goes on with new ones."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest valid name, or an empty string.

    Else for the only one that begins so: ``temp`` is half of ``temperature`` and no likeness.
    """
    known = list(valid)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    begun = [one for one in known if one.startswith(name)]
    close = close or (begun if len(begun) == 1 else [])
    return f"; did you mean {close[0]!r}?" if close else ""


# What arguments of vLLM, transformers and llama-cpp-python are called here, or why there are none.
BY_OTHER_NAMES = {
    "gpu_memory_utilization": "vram_gb is the GPU memory to use in all, in GiB",
    "cpu_offload_gb": "vram_gb is the GPU memory to use in all, ram_gb the host's",
    "tensor_parallel_size": "fiddler uses one GPU, and the CPU beside it",
    "trust_remote_code": "fiddler runs no code of a model's repository; leave it out",
    "quantization": "how a model is quantised stands in its config.json; dtype='w4g128' quantises "
    "experts as they are loaded",
    "load_in_4bit": "dtype='w4g128' quantises experts as they are loaded",
    "torch_dtype": "dtype is its name here",
    "device_map": "fiddler places experts itself; device is cpu or cuda",
    "n_gpu_layers": "vram_gb is the GPU memory to use; experts are placed within it one by one",
    "n_ctx": "max_model_len is its name here",
    "tokenizer": "the model's own is used; a prompt may be a list of token ids",
    "stream": "stream() and stream_chat() give one token after the other",
    "do_sample": "temperature=0 takes the likeliest token; else tokens are drawn",
    "add_generation_prompt": "chat() always lets the model answer; leave it out",
}


def reject_unknown(kind: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise :class:`ConfigError` for the first of ``given`` that is not in ``valid``."""
    known = sorted(valid)
    for name in given:
        if name not in known:
            if name in BY_OTHER_NAMES:
                raise ConfigError(f"unknown {kind} {name!r}", hint=BY_OTHER_NAMES[name])
            raise ConfigError(
                f"unknown {kind} {name!r}{nearest(name, known)}",
                hint=f"valid names: {', '.join(known)}",
            )


def named_arguments(kind: str) -> Callable[[type[T]], type[T]]:
    """Class decorator for a keyword-only dataclass: an unknown argument names the nearest one."""

    def decorate(cls: type[T]) -> type[T]:
        plain_init: Callable[..., None] = cls.__init__
        valid = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

        @functools.wraps(plain_init)
        def checked_init(self: T, **values: Any) -> None:
            reject_unknown(kind, values, valid)
            plain_init(self, **values)

        cls.__init__ = checked_init  # type: ignore[assignment]
        return cls

    return decorate
