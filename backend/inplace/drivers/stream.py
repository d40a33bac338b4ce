"""The stream driver: requests are checked and queued in the server's call; a thread of its own runs them, others answer them."""

import logging
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

from inplace.drivers.engine_loop import EngineLoop
from inplace.drivers.parsing import RequestParser, TokenizerConfig
from inplace.drivers.reply import Channel, FinalResponse, Reply
from inplace.drivers.senders import Senders
from inplace.drivers.sequence_queues import StreamRequest
from inplace.errors import Code, RequestError, failed
from inplace.protocol import TEXT
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request

Arrived = tuple[Request, Mapping[str, tuple[bytes, ...]], Channel]
"""A request, its inputs of BYTES by name, and its way back."""


log = logging.getLogger("inplace")


def engine_thread() -> Executor:
    """A thread to load an engine on that a stream driver is to step.

    On the CPU the two should be one: OpenMP keeps threads for each thread that has ever computed something large, and where it keeps more
    than there are processors they no longer wait for work but sleep between two operators (libgomp).
    """
    return ThreadPoolExecutor(1, "inplace-engine")


class StreamDriver:
    """Runs a model instance for a server that hands over requests and takes any number of responses for each, at any time.

    Requests of one sequence run one after another, those of different sequences together: each step takes whoever has tokens to feed, a
    generation joins as soon as it has a slot and leaves with its last token.

    Args:
        instance: the model instance; the driver is its only user.
        language: for generations.
        most_waiting: generations that may wait for a slot.
        thread: of one thread, which steps the engine from now on; a new one if None.
    """

    def __init__(
        self,
        instance: ModelInstance,
        language: TokenizerConfig,
        most_waiting: int,
        thread: Executor | None = None,
    ) -> None:
        self.instance = instance
        self._intake = RequestParser(instance, language)
        self._senders = Senders()
        self._runner = EngineLoop(instance, self._senders, most_waiting, thread or engine_thread())
        self._closed = False
        self._closing = threading.Lock()

    def submit(self, arrived: Iterable[Arrived]) -> None:
        """Take requests that came together; each is answered through its channel. Those of one sequence take effect in the order given.

        They begin in one step, where there is room; but nobody waits for the texts of those behind to become tokens.
        """
        jobs: list[StreamRequest] = []
        for request, texts, channel in arrived:
            if TEXT in texts and jobs:
                self._runner.put(jobs)
                jobs = []
            try:
                if self._closed:
                    raise _unloading()
                jobs.append(self._intake.job(request, texts, channel))
            except RequestError as error:
                self.instance.observer.request_refused(
                    request.sequence_id, request.request_id, error, end=request.end
                )
                self._senders.tell([], [(Reply(channel), FinalResponse(error))])
            except (
                Exception
            ) as error:  # a defect: its client must hear of it, and the others must not
                log.exception("a request could not be taken")
                self._senders.tell([], [(Reply(channel), FinalResponse(failed(error)))])
        if jobs:
            self._runner.put(jobs)

    def close(self) -> None:
        """Answer everything that has not been, and stop."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._runner.close(_unloading())
        self._senders.close()


def _unloading() -> RequestError:
    return RequestError(
        Code.SHUTDOWN, "the model is being unloaded; START again when it is back", retryable=True
    )
