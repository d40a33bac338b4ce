"""Which rows the next step has."""

from collections import deque

from inplace.batcher import Work
from inplace.drivers.job import Job
from inplace.manifest import Program


class Scheduler:
    """Rows that bring one token, in turn, and rows that bring more, first come, first served.

    A step has as many of the first as fit, and beside them one chunk of the others together: sequences that are being generated wait
    for at most one chunk of somebody's prompt. Without such rows prompts fill the whole step.

    Args:
        program: what runs.
    """

    def __init__(self, program: Program) -> None:
        self._rows, self._chunk, self._budget = program.max_rows, program.chunk, program.token_budget
        self._running: deque[Job] = deque()
        self._prompts: deque[Job] = deque()
        self._prompt_last = False

    def __bool__(self) -> bool:
        return bool(self._running or self._prompts)

    def add(self, job: Job) -> None:
        """A job has work, or more work."""
        (self._running if _waiting(job) == 1 else self._prompts).append(job)

    def again(self, jobs: list[Job]) -> None:
        """Prompts of the last step, of which tokens are left: they are still the first."""
        self._prompts.extendleft(reversed(jobs))

    def remove(self, job: Job) -> None:
        """A job has no work any more."""
        for jobs in (self._running, self._prompts):
            if job in jobs:
                jobs.remove(job)

    def next(self) -> tuple[list[Job], int]:
        """Take out the rows of the next step, and how many tokens it may have."""
        running = min(len(self._running), self._rows - bool(self._prompts))
        if self._rows == 1 and self._running and self._prompts:  # they take turns
            self._prompt_last = not self._prompt_last
            running = int(not self._prompt_last)
        rows = [self._running.popleft() for _ in range(running)]
        prompts = left = self._chunk if rows else self._budget
        while self._prompts and left > 0 and len(rows) < self._rows:
            rows.append(self._prompts.popleft())
            left -= min(_waiting(rows[-1]), self._chunk)
        return rows, min(running + prompts, self._budget)


def _waiting(job: Job) -> int:
    work: Work | None = job.work
    assert work is not None
    return work.tokens - work.done
