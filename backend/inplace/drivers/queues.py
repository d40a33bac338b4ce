"""Queues of requests: of each sequence, and of those that wait for a slot."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from time import monotonic

from inplace.drivers.generation import GenerationState
from inplace.drivers.reply import BufferedReply, Reply, nothing_to_fetch
from inplace.errors import Code, RequestError
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.requests import Request, ValidatedRequest
from inplace.runtime.slots import SequenceId, SequenceState, SlotTable

MAX_QUEUED_PER_SEQUENCE = 64
"""Requests of one sequence that may be queued; STARTs and ENDs may fill twice as many places."""


FAILED_KEPT = 10.0
"""Seconds for which the error of a generation is kept for the request that fetches next."""


@dataclass(slots=True, eq=False)
class StreamRequest:
    """A request of a stream model.

    Attributes:
        validated: the request as it was parsed.
        reply: its responses.
        generation: its generated tokens; None for a step.
        active: the request as steps see it; None until it is admitted.
        is_fetch: it fetches tokens of its sequence's generation and does nothing else.
    """

    validated: ValidatedRequest
    reply: Reply
    generation: GenerationState | None = None
    active: ActiveRequest | None = None
    is_fetch: bool = False

    @property
    def request(self) -> Request:
        """The client's request."""
        return self.validated.request

    @property
    def sequence_id(self) -> SequenceId:
        """The correlation id."""
        return self.validated.request.sequence_id

    @property
    def key_digest(self) -> bytes | None:
        """Digest of its ``sequence_key``."""
        return self.validated.key_digest

    @property
    def only_ends(self) -> bool:
        """Whether it is an END without anything to compute."""
        return self.validated.only_ends or (
            self.validated.num_tokens == 0
            and self.validated.refusal is None
            and self.generation is None
        )


class SequenceQueues:
    """A queue of requests for each sequence. The first one runs, or waits for a slot.

    Args:
        table: the live sequences.
    """

    def __init__(self, table: SlotTable) -> None:
        self._table = table
        self._queues: dict[SequenceId, deque[StreamRequest]] = {}

    def __contains__(self, request: StreamRequest) -> bool:
        return request in self.get(request.sequence_id)

    def get(self, sequence_id: SequenceId) -> Sequence[StreamRequest]:
        """The requests of one sequence, in order."""
        return self._queues.get(sequence_id, ())

    def generations_ended_by(self, request: StreamRequest) -> list[StreamRequest]:
        """The queued generations, last first, that a START or END of their sequence ends."""
        queue = self.get(request.sequence_id)
        if not queue or not self._takes_effect_at_once(request, queue[0]):
            return []
        # A generation with another key belongs to a later owner of the id and stays.
        return [
            other
            for other in reversed(queue)
            if other.generation is not None and other.key_digest in (None, request.key_digest)
        ]

    def add(self, request: StreamRequest) -> bool:
        """Append a request to the queue of its sequence.

        Returns:
            Whether it is the first.

        Raises:
            RequestError: QUEUE_FULL.
        """
        queue = self._queues.setdefault(request.sequence_id, deque())
        has_flags = request.request.start or request.request.end
        if len(queue) >= MAX_QUEUED_PER_SEQUENCE * (1 + has_flags):
            raise RequestError(
                Code.QUEUE_FULL,
                f"{len(queue)} requests of the sequence are waiting; nothing was changed, send it"
                f" again later",
                retryable=True,
            )
        queue.append(request)
        return len(queue) == 1

    def remove(self, request: StreamRequest) -> bool:
        """Remove a request from the queue of its sequence.

        Returns:
            Whether it was the first.
        """
        queue = self._queues[request.sequence_id]
        was_first = queue[0] is request
        queue.remove(request)
        if not queue:
            del self._queues[request.sequence_id]
        return was_first

    def all(self) -> list[StreamRequest]:
        """All requests, those of each sequence in order."""
        return [request for queue in self._queues.values() for request in queue]

    def clear(self) -> list[StreamRequest]:
        """Remove all requests and return them."""
        requests = self.all()
        self._queues.clear()
        return requests

    def _takes_effect_at_once(self, request: StreamRequest, first: StreamRequest) -> bool:
        """Whether it is a START or END that may end the sequence, so its generations end now.

        Args:
            request: the request.
            first: the first request in the queue of its sequence.
        """
        start, end = request.request.start, request.request.end
        if not (start or end):
            return False
        live = self._table.get(request.sequence_id)
        if live is None:
            return first.key_digest in (None, request.key_digest)
        try:
            live.check_key(request.key_digest, start=start)
        except RequestError:
            return False
        return end or live.key_digest is None or not request.request.continues_sequence


class WaitingQueue:
    """Requests in the order in which they get slots: round-robin over groups.

    Within a group the first to come is the first to get a slot. `Request.fairness_group` says which
    group a request belongs to. A group that fills the queue neither delays nor excludes others: its
    newest request makes room for a group that has fewer.

    Args:
        max_waiting: requests that may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._groups: OrderedDict[bytes, deque[StreamRequest]] = OrderedDict()  # next group first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, request: StreamRequest) -> bool:
        return any(request in group for group in self._groups.copy().values())

    def append(self, request: StreamRequest) -> StreamRequest | None:
        """Add a request.

        Returns:
            None, or the request that has no place: this one, or the newest of the largest group,
            which was removed.
        """
        name = request.request.fairness_group()
        size = len(self._groups.get(name, ()))
        rejected = None
        if self._length >= self._max_waiting:
            largest = max(self._groups.values(), key=len, default=None)
            if largest is None or len(largest) <= size + 1:
                return request
            rejected = largest[-1]
            self.remove(rejected)
        self._groups.setdefault(name, deque()).append(request)
        self._length += 1
        return rejected

    def popleft(self) -> StreamRequest:
        """Remove the request that is next, and return it."""
        name, group = next(iter(self._groups.items()))
        request = group.popleft()
        self._length -= 1
        if group:
            self._groups.move_to_end(name)
        else:
            del self._groups[name]
        return request

    def remove(self, request: StreamRequest) -> None:
        """Remove a request that is in the queue."""
        name = request.request.fairness_group()
        self._groups[name].remove(request)
        self._length -= 1
        if not self._groups[name]:
            del self._groups[name]

    def clear(self) -> list[StreamRequest]:
        """Remove all requests and return them."""
        requests = list(chain.from_iterable(self._groups.values()))
        self._groups.clear()
        self._length = 0
        return requests


class FailedGenerations:
    """Generations with a `BufferedReply` that failed, perhaps while no request was fetching.

    Their sequences have ended, and their clients learn the reason from the next fetch.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failed: dict[SequenceId, tuple[StreamRequest, float]] = {}

    def add(self, request: StreamRequest) -> None:
        """Keep a request if its reply is a buffered one."""
        if isinstance(request.reply, BufferedReply):
            self._failed[request.sequence_id] = request, self._clock() + FAILED_KEPT

    def get(self, sequence_id: SequenceId) -> Sequence[StreamRequest]:
        """The failed generation of a sequence, if it has one."""
        failed = self._failed.get(sequence_id)
        return () if failed is None else (failed[0],)

    def discard(self, sequence_id: SequenceId) -> None:
        """Forget that of a sequence, which starts anew."""
        self._failed.pop(sequence_id, None)

    def discard_old(self) -> None:
        """Forget what has been kept for `FAILED_KEPT`."""
        now = self._clock()
        for sequence_id in [key for key, (_, until) in self._failed.items() if now >= until]:
            del self._failed[sequence_id]


def find_buffered_reply(
    request: StreamRequest, queued: Iterable[StreamRequest], live: SequenceState | None
) -> BufferedReply:
    """The reply that a request may fetch from: of a queued generation, or of the last finished one.

    Args:
        request: the request that fetches.
        queued: the requests of its sequence, and a generation of it that has failed.
        live: its sequence; None if it has no slot.

    Raises:
        RequestError: SEQUENCE_KEY or UNKNOWN_SEQUENCE.
    """
    generation = next((each for each in queued if isinstance(each.reply, BufferedReply)), None)
    if live is not None:
        live.check_key(request.key_digest, start=False)
    elif generation is None or generation.key_digest != request.key_digest:
        # A generation that waits for a slot is not shown to requests with another key.
        raise nothing_to_fetch()
    reply: object = None
    if generation is not None:
        reply = generation.reply
    elif live is not None:
        reply = live.driver_state
    if not isinstance(reply, BufferedReply):
        raise nothing_to_fetch()
    return reply
