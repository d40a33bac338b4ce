"""The step that is under way."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from inplace.batcher import Work
from inplace.drivers.job import Job
from inplace.drivers.scheduler import Scheduler
from inplace.flight import Flight
from inplace.instance import ModelInstance


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that has been computed.

    Attributes:
        jobs: of each row.
        running: how many of them, the first, brought one token each.
        rows: the work of each.
        outputs: see `ModelInstance.wait`.
    """

    jobs: list[Job]
    running: int
    rows: list[Work]
    outputs: dict[str, Tensor]


class Flights:
    """Launches steps, and waits for them.

    Where the engine goes on by itself and the next step has the same rows, it is launched with what the last one said before anybody looks
    at that: the device waits for one small copy instead of all that is done for each token. A row whose generation turns out to be over all
    the same (an end token, a stop text, a cancellation) is dropped.

    Args:
        instance: what runs.
        scheduler: says which rows.
        calm: whether nothing has arrived that would change the next step.
    """

    def __init__(self, instance: ModelInstance, scheduler: Scheduler, calm: Callable[[], bool]) -> None:
        self._instance, self._scheduler, self._calm = instance, scheduler, calm
        self._under_way: tuple[list[Job], int, Flight] | None = None

    def __bool__(self) -> bool:
        return self._under_way is not None

    def next(self) -> Landed:
        """Wait for the step that is under way, or for a new one; afterwards the one behind it may be under way."""
        jobs, running, flight = self._under_way or self._launch()
        self._under_way = None
        follows = self._repeats(jobs, flight.batch.rows)  # while the device computes
        outputs = self._instance.wait(flight)
        if follows and not flight.failed and self._calm():
            self._under_way = jobs, len(jobs), self._instance.follow(flight, outputs)
        self._instance.settle(flight, outputs)
        return Landed(jobs, running, flight.batch.rows, outputs)

    def land(self) -> None:
        """Wait for a step that nobody wants any more."""
        if self._under_way is not None:
            _, _, flight = self._under_way
            self._under_way = None
            self._instance.settle(flight, self._instance.wait(flight))

    def _launch(self) -> tuple[list[Job], int, Flight]:
        jobs, running, budget = self._scheduler.next()
        return jobs, running, self._instance.launch([job.work for job in jobs if job.work is not None], budget)

    def _repeats(self, jobs: list[Job], rows: list[Work]) -> bool:
        """Whether the next step has the same rows, as far as anybody can know."""
        if not self._instance.ahead or not self._scheduler.repeats(jobs):
            return False
        return all(job.generation is not None and job.generation.goes_on for job in jobs) and not any(work.over for work in rows)
