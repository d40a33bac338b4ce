"""Requests of one sequence follow one another.

One request on its way through a stream driver.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inplace.drivers.generation import GenerationState
from inplace.drivers.reply import BufferedReply, Reply, _nothing_to_fetch
from inplace.errors import Code, RequestError
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.requests import ValidatedRequest
from inplace.runtime.slots import SequenceId, SlotTable
from inplace.runtime.slots import SequenceState as LiveSequence


@dataclass(slots=True, eq=False)
class StreamRequest:
    """A request of a stream model.

    Attributes:
        checked: what was asked.
        reply: its way back.
        generation: what it says; None for a step.
        work: its tokens on their way through the engine; None until it was given its sequence.
        fetches: it wants what a generation of its sequence has said since, and nothing else.
    """

    checked: ValidatedRequest
    reply: Reply
    generation: GenerationState | None = None
    work: ActiveRequest | None = None
    fetches: bool = False

    @property
    def sequence(self) -> SequenceId:
        """The correlation id."""
        return self.checked.request.sequence_id

    @property
    def only_ends(self) -> bool:
        """It is an END that brings nothing to compute."""
        return self.checked.num_tokens == 0 and self.checked.refusal is None


MAX_QUEUED_PER_SEQUENCE = 64
"""Requests of one sequence that may wait behind one another; twice as many where they are STARTs and ENDs."""


class SequenceQueues:
    """What is under way of each sequence, in order; the first of a lane runs or waits for a slot.

    Args:
        table: the live sequences.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._lanes: dict[SequenceId, deque[StreamRequest]] = {}

    def __contains__(self, job: StreamRequest) -> bool:
        return job in self.of(job.sequence)

    def of(self, sequence: SequenceId) -> Sequence[StreamRequest]:
        """What is under way of one sequence."""
        return self._lanes.get(sequence, ())

    def taken_by(self, job: StreamRequest) -> list[StreamRequest]:
        """The generations, last first, that a START or END takes the sequence from."""
        lane = self.of(job.sequence)
        if not lane or not self._takes(job, lane[0]):
            return []
        # a new owner's stays
        return [
            other
            for other in reversed(lane)
            if other.generation is not None
            and other.checked.key_digest in (None, job.checked.key_digest)
        ]

    def add(self, job: StreamRequest) -> bool:
        """Put a job behind the others of its sequence. True: it is the first.

        Raises:
            RequestError: QUEUE_FULL.
        """
        lane = self._lanes.setdefault(job.sequence, deque())
        if len(lane) >= MAX_QUEUED_PER_SEQUENCE * (
            1 + (job.checked.request.start or job.checked.request.end)
        ):
            text = f"{len(lane)} requests of the sequence are waiting; nothing was changed, send it again later"
            raise RequestError(Code.QUEUE_FULL, text, retryable=True)
        lane.append(job)
        return len(lane) == 1

    def remove(self, job: StreamRequest) -> bool:
        """A job is no longer under way. True: it was the first."""
        lane = self._lanes[job.sequence]
        first = lane[0] is job
        lane.remove(job)
        if not lane:
            del self._lanes[job.sequence]
        return first

    def clear(self) -> list[StreamRequest]:
        """Nothing is under way any more; what was."""
        jobs = [job for lane in self._lanes.values() for job in lane]
        self._lanes.clear()
        return jobs

    def _takes(self, job: StreamRequest, first: StreamRequest) -> bool:
        request = job.checked.request
        if not (request.start or request.end):
            return False
        live = self._table.get(job.sequence)
        if live is None:
            return (
                first.checked.key_digest is None
                or first.checked.key_digest == job.checked.key_digest
            )
        try:
            live.check_key(job.checked.key_digest, start=request.start)
        except RequestError:
            return False
        return request.end or live.key_digest is None or not request.continues_sequence


def find_buffered_reply(
    job: StreamRequest, under_way: Iterable[StreamRequest], live: LiveSequence | None
) -> BufferedReply:
    """The mailbox that a request may fetch from: of a generation that is under way, or of the last one.

    Args:
        job: the request.
        under_way: what is under way of its sequence.
        live: the sequence, where it has a slot.

    Raises:
        RequestError: SEQUENCE_KEY or UNKNOWN_SEQUENCE.
    """
    generation = next(
        (other for other in under_way if isinstance(other.reply, BufferedReply)), None
    )
    if live is not None:
        live.check_key(job.checked.key_digest, start=False)
    elif (
        generation is None or generation.checked.key_digest != job.checked.key_digest
    ):  # it waits for a slot: others do not learn of it
        raise _nothing_to_fetch()
    found = (
        generation.reply
        if generation is not None
        else live.driver_state
        if live is not None
        else None
    )
    if not isinstance(found, BufferedReply):
        raise _nothing_to_fetch()
    return found
