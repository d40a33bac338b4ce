"""The stream driver: requests are checked and queued in the server's call; a thread of its own runs them, others answer them."""

import threading
from collections.abc import Mapping

from inplace.drivers.intake import Intake, Language
from inplace.drivers.reply import Channel, Last, Reply
from inplace.drivers.runner import Runner
from inplace.drivers.senders import Senders
from inplace.errors import Code, RequestError
from inplace.instance import ModelInstance
from inplace.requests import Request


class StreamDriver:
    """Runs a model instance for a server that hands over requests and takes any number of responses for each, at any time.

    Requests of one sequence run one after another, those of different sequences together: each step takes whoever has tokens to feed, a
    generation joins as soon as it has a slot and leaves with its last token.

    Args:
        instance: the model instance; the driver is its only user.
        language: for generations.
        most_waiting: generations that may wait for a slot.
    """

    def __init__(self, instance: ModelInstance, language: Language, most_waiting: int) -> None:
        self.instance = instance
        self._intake = Intake(instance, language)
        self._senders = Senders()
        self._runner = Runner(instance, self._senders, most_waiting)
        self._closed = False
        self._closing = threading.Lock()

    def submit(self, request: Request, texts: Mapping[str, tuple[bytes, ...]], channel: Channel) -> None:
        """Take a request; it is answered through its channel. Requests of one sequence take effect in the order given.

        Args:
            request: what was asked.
            texts: its inputs of BYTES, by name.
            channel: its way back.
        """
        try:
            if self._closed:
                raise _unloading()
            job = self._intake.job(request, texts, channel)
        except RequestError as error:
            self.instance.observer.refused(request.sequence, request.id, error, end=request.end)
            self._senders.tell([], [(Reply(channel), Last(error))])
            return
        self._runner.put(job)

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
