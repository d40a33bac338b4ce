"""The stream driver: requests are parsed and queued in the server's call and answered later."""

import logging
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

from inplace.drivers.engine_loop import EngineLoop
from inplace.drivers.parsing import RequestParser, TokenizerConfig
from inplace.drivers.queues import StreamRequest
from inplace.drivers.reply import Channel, FinalResponse, Reply
from inplace.drivers.senders import Senders
from inplace.drivers.shutdown import unloading
from inplace.errors import RequestError, backend_failure
from inplace.protocol import TEXT
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request

Arrival = tuple[Request, Mapping[str, tuple[bytes, ...]], Channel]
"""A request, its inputs of BYTES by name, and the channel that sends its responses."""


log = logging.getLogger("inplace")


def engine_thread() -> Executor:
    """An executor of one thread, to load an engine on and then to step it in a stream driver.

    On the CPU it should be one thread: OpenMP keeps worker threads for every thread that has
    computed something large, and with more workers than processors they sleep between two operators
    instead of spinning (libgomp).
    """
    return ThreadPoolExecutor(1, "inplace-engine")


class StreamDriver:
    """Runs a model instance for a server that accepts any number of responses at any time.

    Requests of one sequence run one after another, those of different sequences together
    (continuous batching): a generation joins the next step once it has a slot, and leaves with its
    last token.

    Args:
        instance: the model instance; nothing else uses it.
        tokenizer_config: for generations.
        max_waiting: requests that may wait for a slot.
        thread: steps the engine from now on; of one thread. None for a new one.
    """

    def __init__(
        self,
        instance: ModelInstance,
        tokenizer_config: TokenizerConfig,
        max_waiting: int,
        thread: Executor | None = None,
    ) -> None:
        self.instance = instance
        self._parser = RequestParser(instance, tokenizer_config)
        self._senders = Senders()
        self._engine_loop = EngineLoop(
            instance, self._senders, max_waiting, thread or engine_thread()
        )
        self._closed = False
        self._closing = threading.Lock()

    def submit(self, arrivals: Iterable[Arrival]) -> None:
        """Queue requests that came together; each is answered through its channel.

        Those of one sequence take effect in the order given. All begin in one step, if there is
        room; but requests are passed on before a text is tokenized, so that they do not wait for
        it.
        """
        requests: list[StreamRequest] = []
        for request, texts, channel in arrivals:
            if TEXT in texts and requests:
                self._engine_loop.submit(requests)
                requests = []
            try:
                if self._closed:
                    raise unloading()
                requests.append(self._parser.parse(request, texts, channel))
            except RequestError as error:
                self.instance.observer.request_refused(
                    request.sequence_id, request.request_id, error, end=request.end
                )
                self._send_error(channel, error)
            except Exception as error:  # a defect: the other requests must not suffer
                log.exception("a request could not be taken")
                self._send_error(channel, backend_failure(error))
        if requests:
            self._engine_loop.submit(requests)

    def end_idle(self, seconds: float) -> None:
        """End the sequences that have had no request for so many seconds, soon."""
        self._engine_loop.call(partial(self._engine_loop.end_idle, seconds))

    def stop_running(self, error: RequestError) -> None:
        """Answer every request with this error and end all sequences, soon."""
        self._engine_loop.call(partial(self._engine_loop.stop_running, error))

    def close(self) -> None:
        """Answer every request that is queued or running with SHUTDOWN, and stop the threads."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._engine_loop.close(unloading())
        self._senders.close()

    def _send_error(self, channel: Channel, error: RequestError) -> None:
        self._senders.publish([], [(Reply(channel), FinalResponse(error))])
