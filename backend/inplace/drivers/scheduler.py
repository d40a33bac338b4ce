"""Which rows the next step has.

The step that is under way.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from inplace.drivers.sequence_queues import StreamRequest
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.instance import InFlightStep, ModelInstance
from inplace.schema.served import Program


class Scheduler:
    """Rows that bring one token, in turn, and rows that bring more, first come, first served.

    A step has as many of the first as fit, and beside them one chunk of the others together: sequences that are being generated wait
    for at most one chunk of somebody's prompt. Without such rows prompts fill the whole step.

    Args:
        program: what runs.
    """

    def __init__(self, program: Program) -> None:
        self._rows, self._chunk, self._budget = (
            program.max_rows,
            program.chunk,
            program.token_budget,
        )
        self._running: deque[StreamRequest] = deque()
        self._prompts: deque[StreamRequest] = deque()
        self._prompt_last = False

    def __bool__(self) -> bool:
        return bool(self._running or self._prompts)

    def add(self, job: StreamRequest) -> None:
        """A job has work."""
        (self._running if _waiting(job) == 1 else self._prompts).append(job)

    def goes_on(self, job: StreamRequest) -> None:
        """A job's prompt has been consumed, and it brings one token after the other from now on."""
        self._prompts.remove(job)
        self._running.append(job)

    def remove(self, job: StreamRequest) -> None:
        """A job has no work any more."""
        for jobs in (self._running, self._prompts):
            if job in jobs:
                jobs.remove(job)
                return

    @property
    def generates(self) -> bool:
        """Whether a generation has work."""
        return any(job.generation is not None for job in (*self._running, *self._prompts))

    @property
    def full(self) -> bool:
        """Whether there is work for every row of a step."""
        return len(self._running) + len(self._prompts) >= self._rows

    def clear(self) -> None:
        """No job has work any more."""
        self._running.clear()
        self._prompts.clear()

    def repeats(self, rows: list[StreamRequest]) -> bool:
        """Whether the next step has the same rows as the last, none of which has more than one token."""
        return not self._prompts and len(rows) <= self._rows and rows == list(self._running)

    def next(self) -> tuple[list[StreamRequest], int, int]:
        """The rows of the next step; how many of them, the first, bring one token each; and how many tokens it may have."""
        most = self._rows - bool(self._prompts)
        if self._rows == 1 and self._running and self._prompts:  # they take turns
            self._prompt_last = not self._prompt_last
            most = int(not self._prompt_last)
        if len(self._running) <= most:
            rows = list(self._running)
        else:
            rows = list(islice(self._running, most))
            self._running.rotate(-most)
        if not self._prompts:
            return rows, len(rows), len(rows)
        running = len(rows)
        prompts = left = self._chunk if rows else self._budget
        for job in self._prompts:
            if left <= 0 or len(rows) == self._rows:
                break
            rows.append(job)
            left -= min(_waiting(job), self._chunk)
        return rows, running, min(running + prompts, self._budget)


def _waiting(job: StreamRequest) -> int:
    assert job.work is not None
    return job.work.num_tokens - job.work.num_computed_tokens


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step that has been computed.

    Attributes:
        jobs: of each row.
        running: how many of them, the first, brought one token each.
        rows: the work of each.
        outputs: see `ModelInstance.wait`.
    """

    jobs: list[StreamRequest]
    running: int
    rows: list[ActiveRequest]
    outputs: dict[str, Tensor]


class StepPipeline:
    """Launches steps, and waits for them.

    Where the engine goes on by itself and the next step has the same rows, it is launched with what the last one said before anybody looks
    at that: the device waits for one small copy instead of all that is done for each token. A row whose generation turns out to be over all
    the same (an end token, a stop text, a cancellation) is dropped.

    Args:
        instance: what runs.
        scheduler: says which rows.
        calm: whether nothing has arrived that would change the next step.
    """

    def __init__(
        self, instance: ModelInstance, scheduler: Scheduler, calm: Callable[[], bool]
    ) -> None:
        self._instance, self._scheduler, self._calm = instance, scheduler, calm
        self._under_way: tuple[list[StreamRequest], int, InFlightStep] | None = None

    def __bool__(self) -> bool:
        return self._under_way is not None

    def next(self) -> StepResult:
        """Wait for the step that is under way, or for a new one; afterwards the one behind it may be under way."""
        jobs, running, flight = self._under_way or self._launch()
        self._under_way = None
        follows = self._repeats(jobs, flight.batch.rows)  # while the device computes
        outputs = self._instance.wait(flight)
        if follows and not flight.failed and self._calm():
            self._under_way = jobs, len(jobs), self._instance.launch_next(flight, outputs)
        self._instance.advance(flight, outputs)
        return StepResult(jobs, running, flight.batch.rows, outputs)

    def land(self) -> None:
        """Wait for a step that nobody wants any more."""
        if self._under_way is not None:
            _, _, flight = self._under_way
            self._under_way = None
            self._instance.advance(flight, self._instance.wait(flight))

    def _launch(self) -> tuple[list[StreamRequest], int, InFlightStep]:
        jobs, running, budget = self._scheduler.next()
        return (
            jobs,
            running,
            self._instance.launch([job.work for job in jobs if job.work is not None], budget),
        )

    def _repeats(self, jobs: list[StreamRequest], rows: list[ActiveRequest]) -> bool:
        """Whether the next step has the same rows, as far as anybody can know."""
        if not self._instance.overlaps or not self._scheduler.repeats(jobs):
            return False
        return all(
            job.generation is not None and job.generation.goes_on for job in jobs
        ) and not any(work.dropped for work in rows)
