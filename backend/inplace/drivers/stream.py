"""The stream driver: requests are checked and queued in the server's call; a thread of its own runs them, others answer them."""

import logging
import threading
from collections.abc import Iterable, Mapping

from inplace.drivers.intake import Intake, Language
from inplace.drivers.job import Job
from inplace.drivers.reply import Channel, Last, Reply
from inplace.drivers.runner import Runner
from inplace.drivers.senders import Senders
from inplace.drivers.worker import Worker
from inplace.errors import Code, RequestError, failed
from inplace.instance import ModelInstance
from inplace.requests import Request
from inplace.wire import TEXT

Arrived = tuple[Request, Mapping[str, tuple[bytes, ...]], Channel]
"""A request, its inputs of BYTES by name, and its way back."""

log = logging.getLogger("inplace")


class StreamDriver:
    """Runs a model instance for a server that hands over requests and takes any number of responses for each, at any time.

    Requests of one sequence run one after another, those of different sequences together: each step takes whoever has tokens to feed, a
    generation joins as soon as it has a slot and leaves with its last token.

    Args:
        instance: the model instance; the driver is its only user.
        language: for generations.
        most_waiting: generations that may wait for a slot.
        worker: its thread steps the engine; a new one if None.
    """

    def __init__(self, instance: ModelInstance, language: Language, most_waiting: int, worker: Worker | None = None) -> None:
        self.instance = instance
        self._intake = Intake(instance, language)
        self._senders = Senders()
        self._runner = Runner(instance, self._senders, most_waiting, worker or Worker())
        self._closed = False
        self._closing = threading.Lock()

    def submit(self, arrived: Iterable[Arrived]) -> None:
        """Take requests that came together; each is answered through its channel. Those of one sequence take effect in the order given.

        They begin in one step, where there is room; but nobody waits for the texts of those behind to become tokens.
        """
        jobs: list[Job] = []
        for request, texts, channel in arrived:
            if TEXT in texts and jobs:
                self._runner.put(jobs)
                jobs = []
            try:
                if self._closed:
                    raise _unloading()
                jobs.append(self._intake.job(request, texts, channel))
            except RequestError as error:
                self.instance.observer.refused(request.sequence, request.id, error, end=request.end)
                self._senders.tell([], [(Reply(channel), Last(error))])
            except Exception as error:  # a defect: its client must hear of it, and the others must not
                log.exception("a request could not be taken")
                self._senders.tell([], [(Reply(channel), Last(failed(error)))])
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
    return RequestError(Code.SHUTDOWN, "the model is being unloaded; START again when it is back", retryable=True)
