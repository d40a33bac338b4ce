"""Requests to a stream driver, and what was heard of each."""

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
from inplace.runtime.requests import Request
from inplace.runtime.slots import SequenceId
from torch import Tensor

from support.driving import Watched
from support.models import CAPACITY

OUTPUTS = frozenset(
    {"tokens", "text_output", "finish_reason", "next_token", "logits", "sum", "values"}
)
PATIENCE = 60.0
FREE = CAPACITY - 8
"""Tokens that fit behind a prompt of 8."""


class Heard:
    """One request's channel: keeps what is sent, and whether the rules of a server's channel were broken.

    A server's ends when it is asked whether a request is cancelled after the final response of that request, or when one more is sent.
    """

    def __init__(self, wanted: frozenset[str] = OUTPUTS) -> None:
        self.requested_outputs = wanted
        self.responses: list[dict[str, Tensor | str]] = []
        self.error: RequestError | None = None
        self.final_at = 0.0
        self.gone = False
        self.broken: list[str] = []
        self._final = threading.Event()
        self._news = threading.Condition()

    def send(self, outputs: Outputs, *, final: bool) -> None:
        self._hear("a response")
        with self._news:
            self.responses.append(dict(outputs))
            self._news.notify_all()
        if final:
            self._end()

    def send_error(self, error: RequestError) -> None:
        self._hear("an error")
        self.error = error
        self._end()

    def is_cancelled(self) -> bool:
        if self._final.is_set():
            self.broken.append("asked after the final response")
        return self.gone

    def wait(self) -> "Heard":
        assert self._final.wait(PATIENCE), f"no final response; heard {self.responses}"
        assert not self.broken
        return self

    def said(self, tokens: int) -> "Heard":
        """Wait for so many tokens."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.tokens) >= tokens, PATIENCE)
        return self

    @property
    def tokens(self) -> list[int]:
        return [
            token
            for response in self.responses
            if "tokens" in response
            for token in response["tokens"][0].tolist()  # type: ignore[union-attr]
        ]

    @property
    def text(self) -> str:
        return "".join(str(response.get("text_output", "")) for response in self.responses)

    @property
    def reason(self) -> str:
        """The finish reason: the last response's, and nobody else's."""
        self.wait()
        assert self.error is None, self.error
        reasons = [str(response["finish_reason"]) for response in self.responses]
        assert not any(reasons[:-1])
        assert all(len(response["tokens"][0]) for response in self.responses[:-1])
        return reasons[-1]

    @property
    def next_token(self) -> int:
        self.wait()
        assert self.error is None, self.error
        [response] = self.responses
        return int(response["next_token"])

    def refused(self, code: Code, says: str = "", *, retryable: bool = False) -> None:
        self.wait()
        assert self.error is not None, self.responses
        assert (self.error.code, self.error.retryable) == (code, retryable), self.error
        assert says in str(self.error)

    def _hear(self, what: str) -> None:
        if self._final.is_set():
            self.broken.append(f"{what} after the final response")

    def _end(self) -> None:
        self.final_at = time.monotonic()
        self._final.set()


class Deaf(Heard):
    """A channel that takes no response, or not the last one."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self._last = last

    def send(self, outputs: Outputs, *, final: bool) -> None:
        if final or not self._last:
            raise ValueError("too large")
        super().send(outputs, final=final)


class Streams:
    """A stream driver over a `Watched` engine, and how tests talk to it."""

    def __init__(self, driver: StreamDriver) -> None:
        self.driver = driver

    @property
    def engine(self) -> Watched:
        assert isinstance(self.driver.instance.engine, Watched)
        return self.driver.instance.engine

    def generate(
        self,
        sequence: SequenceId,
        prompt: list[int] | str,
        max_tokens: int = 16,
        *,
        start: bool = True,
        end: bool = False,
        stop: tuple[str, ...] = (),
        wanted: frozenset[str] = OUTPUTS,
        **parameters: bool | int | float | str,
    ) -> Heard:
        texts = {"stop": tuple(text.encode() for text in stop)} if stop else {}
        inputs: dict[str, Tensor] = {}
        if isinstance(prompt, str):
            texts["text"] = (prompt.encode(),)
        else:
            inputs["input_ids"] = torch.tensor([prompt])
        return self.send(
            Request(sequence, start, end, inputs, "r", {"max_tokens": max_tokens, **parameters}),
            texts,
            wanted,
        )

    def ask(
        self,
        sequence: SequenceId,
        ids: list[int],
        *,
        start: bool = False,
        end: bool = False,
        **parameters: bool | int | float | str,
    ) -> Heard:
        """A step."""
        return self.send(
            Request(sequence, start, end, {"input_ids": torch.tensor([ids])}, "r", parameters)
        )

    def end(self, sequence: SequenceId, **parameters: bool | int | float | str) -> Heard:
        """An END that brings nothing else."""
        return self.send(Request(sequence, False, True, {}, "r", parameters))

    def send(
        self,
        request: Request,
        texts: dict[str, tuple[bytes, ...]] | None = None,
        wanted: frozenset[str] = OUTPUTS,
    ) -> Heard:
        heard = Heard(wanted)
        self.driver.submit([(request, texts or {}, heard)])
        return heard

    def free(self) -> int:
        return self.driver.instance.table.num_free


OpenStreams = Callable[..., Streams]


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> float:
    """Seconds until something is true."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < seconds
        time.sleep(0.001)
    return time.monotonic() - begin


class _Slow:
    """An engine whose steps take longer."""

    def __init__(self, engine: StepEngine, seconds: float) -> None:
        self.engine, self._seconds, self.overlaps = engine, seconds, engine.overlaps

    def on_stream(self) -> AbstractContextManager[object]:
        return self.engine.on_stream()

    def launch(self, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> Finish:
        launched = self.engine.launch(inputs, wanted)

        def finish(waiting: AbstractContextManager[object]) -> dict[str, Tensor]:
            with waiting:
                time.sleep(self._seconds)
            return launched(waiting)

        return finish


@contextlib.contextmanager
def slowed(streams: Streams, seconds: float) -> Iterator[None]:
    """Every step takes so many seconds more."""
    instance = streams.driver.instance
    watched = instance.engine
    instance.engine = _Slow(watched, seconds)
    try:
        yield
    finally:
        instance.engine = watched
