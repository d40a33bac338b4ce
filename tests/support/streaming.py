"""A client of a stream driver over a recording engine, and the responses to each request."""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from inplace.drivers import StreamDriver
from inplace.drivers.reply import Outputs
from inplace.engines import Finish, StepEngine
from inplace.errors import Code, RequestError
from inplace.protocol import PROMPT_OUTPUTS
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from torch import Tensor

from support.driving import RecordingEngine
from support.models import CAPACITY

ALL_OUTPUTS = frozenset(
    {"tokens", "text_output", "finish_reason", "next_token", "logits", "sum", "values"}
    | {"token_logprobs", "top_logprobs", "top_tokens", *PROMPT_OUTPUTS}
    | {"reused_tokens"}
)


TIMEOUT = 60.0
"""Seconds that a test waits for anything."""


MAX_NEW_TOKENS = CAPACITY - 8
"""Tokens that fit after a prompt of 8."""


class RecordingChannel:
    """The channel of one request: records its responses and violations of a channel's rules.

    Triton ends if it is asked whether a request is cancelled after its final response, or if
    another response is sent then.
    """

    def __init__(self, requested_outputs: frozenset[str] = ALL_OUTPUTS) -> None:
        self.requested_outputs = requested_outputs
        self.responses: list[dict[str, Tensor | str]] = []
        self.error: RequestError | None = None
        self.final_at = 0.0
        self.client_cancelled = False
        self.violations: list[str] = []
        self._final = threading.Event()
        self._changed = threading.Condition()

    def send(self, outputs: Outputs, *, final: bool) -> None:
        self._check_not_final("a response")
        with self._changed:
            self.responses.append(dict(outputs))
            self._changed.notify_all()
        if final:
            self._set_final()

    def send_error(self, error: RequestError) -> None:
        self._check_not_final("an error")
        self.error = error
        self._set_final()

    def is_cancelled(self) -> bool:
        self._check_not_final("is_cancelled")
        return self.client_cancelled

    def wait(self) -> "RecordingChannel":
        """Wait for the final response."""
        assert self._final.wait(TIMEOUT), f"no final response after {self.responses}"
        assert not self.violations
        return self

    def wait_for_tokens(self, num_tokens: int) -> "RecordingChannel":
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens) >= num_tokens, TIMEOUT)
        return self

    @property
    def tokens(self) -> list[int]:
        """All tokens of a generation so far."""
        return [
            token
            for response in self.responses
            if "tokens" in response
            for token in response["tokens"][0].tolist()  # type: ignore[union-attr]
        ]

    @property
    def text(self) -> str:
        """All text of a generation so far."""
        return "".join(str(response.get("text_output", "")) for response in self.responses)

    @property
    def finish_reason(self) -> str:
        """Why a generation finished; only its last response has a reason or no tokens."""
        self.wait()
        assert self.error is None, self.error
        reasons = [str(response["finish_reason"]) for response in self.responses]
        assert not any(reasons[:-1])
        assert all(len(response["tokens"][0]) for response in self.responses[:-1])
        return reasons[-1]

    @property
    def next_token(self) -> int:
        """The token of a step, which has one response."""
        self.wait()
        assert self.error is None, self.error
        [response] = self.responses
        return int(response["next_token"])

    def assert_refused(self, code: Code, message: str = "", *, retryable: bool = False) -> None:
        self.wait()
        assert self.error is not None, self.responses
        assert (self.error.code, self.error.retryable) == (code, retryable), self.error
        assert message in str(self.error)

    def _check_not_final(self, call: str) -> None:
        if self._final.is_set():
            self.violations.append(f"{call} after the final response")

    def _set_final(self) -> None:
        self.final_at = time.monotonic()
        self._final.set()


class FailingChannel(RecordingChannel):
    """A channel that takes no response, or only the final one not."""

    def __init__(self, *, only_final: bool) -> None:
        super().__init__()
        self._only_final = only_final

    def send(self, outputs: Outputs, *, final: bool) -> None:
        if final or not self._only_final:
            raise ValueError("too large")
        super().send(outputs, final=final)


class StreamClient:
    """Sends requests to a stream driver over a `RecordingEngine`."""

    def __init__(self, driver: StreamDriver) -> None:
        self.driver = driver

    @property
    def engine(self) -> RecordingEngine:
        assert isinstance(self.driver.instance.engine, RecordingEngine)
        return self.driver.instance.engine

    def generate(
        self,
        sequence_id: SequenceId,
        prompt: list[int] | str,
        max_tokens: int = 16,
        *,
        start: bool = True,
        end: bool = False,
        stop: tuple[str, ...] = (),
        requested_outputs: frozenset[str] = ALL_OUTPUTS,
        **parameters: bool | int | float | str,
    ) -> RecordingChannel:
        texts = {"stop": tuple(text.encode() for text in stop)} if stop else {}
        inputs: dict[str, Tensor] = {}
        if isinstance(prompt, str):
            texts["text"] = (prompt.encode(),)
        else:
            inputs["input_ids"] = torch.tensor([prompt], dtype=torch.int64)
        parameters = {"max_tokens": max_tokens, **parameters}
        request = Request(sequence_id, start, end, inputs, "r", parameters)
        return self.send(request, texts, requested_outputs)

    def step(
        self,
        sequence_id: SequenceId,
        ids: list[int],
        *,
        start: bool = False,
        end: bool = False,
        **parameters: bool | int | float | str,
    ) -> RecordingChannel:
        inputs = {"input_ids": torch.tensor([ids], dtype=torch.int64)}
        return self.send(Request(sequence_id, start, end, inputs, "r", parameters))

    def end(
        self, sequence_id: SequenceId, **parameters: bool | int | float | str
    ) -> RecordingChannel:
        """Send an END without inputs."""
        return self.send(Request(sequence_id, False, True, {}, "r", parameters))

    def send(
        self,
        request: Request,
        texts: dict[str, tuple[bytes, ...]] | None = None,
        requested_outputs: frozenset[str] = ALL_OUTPUTS,
    ) -> RecordingChannel:
        channel = RecordingChannel(requested_outputs)
        self.driver.submit([(request, texts or {}, channel)])
        return channel

    def num_free_slots(self) -> int:
        return self.driver.instance.table.num_free

    def metrics(self) -> dict[tuple[str, str], float]:
        return self.driver.instance.observer.metrics.snapshot()


OpenStreams = Callable[..., StreamClient]


def wait_until(condition: Callable[[], bool], timeout: float = TIMEOUT) -> float:
    """Seconds until a condition is true."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout
        time.sleep(0.001)
    return time.monotonic() - begin


class _SlowEngine:
    """An engine whose steps take longer."""

    def __init__(self, engine: StepEngine, seconds: float) -> None:
        self.engine, self._seconds, self.overlaps = engine, seconds, engine.overlaps

    def on_stream(self) -> AbstractContextManager[object]:
        return self.engine.on_stream()

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        launched = self.engine.launch(inputs, requested)

        def finish(gil_released: AbstractContextManager[object]) -> dict[str, Tensor]:
            with gil_released:
                time.sleep(self._seconds)
            return launched(gil_released)

        return finish


@contextlib.contextmanager
def slow_steps(client: StreamClient, seconds: float) -> Iterator[None]:
    """Let every step take longer by so many seconds."""
    instance = client.driver.instance
    engine = instance.engine
    instance.engine = _SlowEngine(engine, seconds)
    try:
        yield
    finally:
        instance.engine = engine
