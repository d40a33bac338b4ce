"""What comes of jobs, until it is handed to the senders once a step."""

from time import monotonic

from inplace.drivers.generation import Generation, Reason
from inplace.drivers.job import Job
from inplace.drivers.reply import Last, Outputs, Reply
from inplace.drivers.senders import Senders
from inplace.errors import RequestError
from inplace.observer import Observer


class Outcomes:
    """Tells the observer at once, and the senders when `tell` is called.

    Args:
        senders: answer.
        observer: counts and logs.
    """

    def __init__(self, senders: Senders, observer: Observer) -> None:
        self._senders, self._observer = senders, observer
        self._said: list[tuple[Reply, int, str | None]] = []
        self._finished: list[tuple[Reply, Last]] = []

    def say(self, job: Job, generation: Generation, text: str | None) -> None:
        """A generation said its `Generation.token`; ``text`` as in `Reply.say`."""
        assert generation.token is not None
        if generation.said == 1:
            self._observer.spoke(monotonic() - job.checked.request.received)
        self._said.append((job.reply, generation.token, text))

    def answer(self, job: Job, outputs: Outputs) -> None:
        """A step was computed."""
        self._finished.append((job.reply, Last(outputs)))

    def finish(self, job: Job, generation: Generation, reason: Reason) -> None:
        """A generation has finished."""
        self._observer.generated(job.sequence, job.checked.request.id, reason, generation.said)
        self._finished.append((job.reply, Last(reason, generation.rest())))

    def refuse(self, job: Job, error: RequestError) -> None:
        """A request is answered with an error."""
        request = job.checked.request
        self._observer.refused(request.sequence, request.id, error, end=request.end)
        self._finished.append((job.reply, Last(error)))

    def tell(self) -> None:
        """Hand over what has come since the last time."""
        if self._said or self._finished:
            self._senders.tell(self._said, self._finished)
            self._said, self._finished = [], []
