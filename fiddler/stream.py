"""From the engine's tokens to text events: detokenise, match stop strings, count.

Everything here runs right after a step, so that a stop string ends its request before the next one.
"""

from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from fiddler.engine.engine import StepOutput
from fiddler.engine.request import Request
from fiddler.outputs import CompletionOutput, Logprob, TokenEvent
from fiddler.text.stop import StopMatcher
from fiddler.text.tokenizer import Tokenizer

CancelRequest = Callable[[Request, str], None]


class Sample:
    """One sample of one prompt: turns its tokens into events and remembers them."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        cancel: CancelRequest,
        peak_vram: Callable[[], int],
    ) -> None:
        params = request.params
        self.request = request
        self.events: deque[TokenEvent] = deque()
        self.text = ""
        self.logprobs: list[dict[int, Logprob]] = []
        self.error: Exception | None = None  # of the step that ended it
        self._decoder = tokenizer.decode_stream(params.skip_special_tokens) if tokenizer else None
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output)
        self._cancel = cancel
        self._peak_vram = peak_vram
        self._is_closed = False

    @property
    def is_done(self) -> bool:
        """Whether the last event has been made."""
        return self._is_closed

    def push(self, output: StepOutput) -> None:
        """Take one token."""
        if output.logprobs is not None:
            self.logprobs.append(output.logprobs)
        self._emit(self._printable(output.token_id), output.token_id, output.logprobs)

    def close(self) -> None:
        """Make the last event if the stream ended without one, as after a cancellation."""
        if not self._is_closed:
            self._emit(self._rest(), None, None)

    def fail(self, error: Exception) -> None:
        """End without a last event: whoever asks for the next one gets ``error``."""
        self.error = error
        self._is_closed = True

    def progress(self) -> TokenEvent:
        """An event without a token: a step went by, so that a caller can look up and cancel."""
        stats = self.request.stats(self._peak_vram())
        return TokenEvent(text="", token_id=None, index=self.request.index, stats=stats)

    def completion(self) -> CompletionOutput:
        """The finished sample."""
        request = self.request
        assert request.finish_reason is not None
        chosen = zip(request.output_ids, self.logprobs, strict=False)
        return CompletionOutput(
            index=request.index,
            text=self.text,
            token_ids=request.output_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            cumulative_logprob=sum(row[t].logprob for t, row in chosen) if self.logprobs else None,
            logprobs=self.logprobs if request.params.logprobs is not None else None,
            routed_experts=request.routed_experts(),
        )

    def _printable(self, token_id: int) -> str:
        request = self.request
        is_end = request.finish_reason == "stop"
        text = ""
        if self._decoder and not (is_end and not request.params.include_stop_str_in_output):
            text = self._decoder.step(token_id)
        if request.num_outputs >= request.params.min_tokens:
            text = self._match(text)
        return text + self._rest() if request.is_finished else text

    def _match(self, text: str) -> str:
        text, stop = self._matcher.push(text)
        if stop is not None and self.request.stop_reason is None:
            self.request.finish_reason, self.request.stop_reason = "stop", stop
            self._cancel(self.request, "stop")
        return text

    def _rest(self) -> str:
        """What was held back as unfinished UTF-8 or as a possible stop string."""
        held = self._match(self._decoder.flush()) if self._decoder else ""
        return held + self._matcher.flush()

    def _emit(self, text: str, token_id: int | None, logprobs: dict[int, Logprob] | None) -> None:
        request = self.request
        self.text += text
        self.events.append(
            TokenEvent(
                text=text,
                token_id=token_id,
                index=request.index,
                logprobs=logprobs,
                finish_reason=request.finish_reason,
                stop_reason=request.stop_reason,
                stats=request.stats(self._peak_vram()),
            )
        )
        self._is_closed = request.is_finished  # last: other threads read it without a lock


class TokenStream(Iterator[TokenEvent]):
    """The events of one prompt's samples, made as they are asked for.

    ``close`` (or leaving the ``with`` block) cancels what is unfinished and gives back its KV
    pages. A stream that is dropped unfinished is cancelled before the next step.
    """

    def __init__(
        self,
        samples: list[Sample],
        *,
        pump: Callable[[], None],
        cancel: CancelRequest,
        abandon: Callable[[Request], None],
    ) -> None:
        self._samples = samples
        self._pump = pump
        self._cancel = cancel
        self._abandon = abandon

    def __next__(self) -> TokenEvent:
        while True:
            # before the look at the events: another thread's step may add the last ones meanwhile
            is_over = all(sample.is_done for sample in self._samples)
            for sample in self._samples:
                if sample.events:
                    return sample.events.popleft()
            if is_over:
                raise_failure(self._samples)
                raise StopIteration
            self._pump()
            if not is_over and not any(sample.events for sample in self._samples):
                return self._samples[0].progress()

    def close(self) -> None:
        """Cancel what is unfinished. Idempotent; a partial text stays with whoever has it."""
        for sample in self._samples:
            self._cancel(sample.request, "cancelled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # the collector may run this in the middle of a step, which must not lose its requests
        for sample in self._samples:
            if not sample.is_done:
                self._abandon(sample.request)


def raise_failure(samples: list[Sample]) -> None:
    """Raise the error of the step that ended the samples, if one did."""
    for sample in samples:
        if sample.error is not None:
            raise sample.error
