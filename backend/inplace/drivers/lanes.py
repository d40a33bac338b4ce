"""Requests of one sequence follow one another."""

from collections import deque
from collections.abc import Sequence

from inplace.drivers.job import Job
from inplace.errors import Code, RequestError
from inplace.sequences import SequenceId, SlotTable

MOST_BEHIND = 64
"""Requests of one sequence that may wait behind one another; twice as many where they are STARTs and ENDs."""


class Lanes:
    """What is under way of each sequence, in order; the first of a lane runs or waits for a slot.

    Args:
        table: the live sequences.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._lanes: dict[SequenceId, deque[Job]] = {}

    def __contains__(self, job: Job) -> bool:
        return job in self.of(job.sequence)

    def of(self, sequence: SequenceId) -> Sequence[Job]:
        """What is under way of one sequence."""
        return self._lanes.get(sequence, ())

    def taken_by(self, job: Job) -> list[Job]:
        """The generations, last first, that a START or END takes the sequence from."""
        lane = self.of(job.sequence)
        if not lane or not self._takes(job, lane[0]):
            return []
        # a new owner's stays
        return [other for other in reversed(lane) if other.generation is not None and other.checked.key in (None, job.checked.key)]

    def add(self, job: Job) -> bool:
        """Put a job behind the others of its sequence. True: it is the first.

        Raises:
            RequestError: QUEUE_FULL.
        """
        lane = self._lanes.setdefault(job.sequence, deque())
        if len(lane) >= MOST_BEHIND * (1 + (job.checked.request.start or job.checked.request.end)):
            text = f"{len(lane)} requests of the sequence are waiting; nothing was changed, send it again later"
            raise RequestError(Code.QUEUE_FULL, text, retryable=True)
        lane.append(job)
        return len(lane) == 1

    def remove(self, job: Job) -> bool:
        """A job is no longer under way. True: it was the first."""
        lane = self._lanes[job.sequence]
        first = lane[0] is job
        lane.remove(job)
        if not lane:
            del self._lanes[job.sequence]
        return first

    def clear(self) -> list[Job]:
        """Nothing is under way any more; what was."""
        jobs = [job for lane in self._lanes.values() for job in lane]
        self._lanes.clear()
        return jobs

    def _takes(self, job: Job, first: Job) -> bool:
        request = job.checked.request
        if not (request.start or request.end):
            return False
        live = self._table.get(job.sequence)
        if live is None:
            return first.checked.key is None or first.checked.key == job.checked.key
        try:
            live.check_key(job.checked.key, start=request.start)
        except RequestError:
            return False
        return request.end or live.key is None or not request.goes_on
