"""The requests of each sequence in their queue, and generations that failed unnoticed."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from time import monotonic

from inplace.drivers.generation import GenerationState
from inplace.drivers.reply import BufferedReply, Reply, nothing_to_fetch
from inplace.errors import Code, RequestError
from inplace.grammars import CompiledGrammar, GrammarMatcher
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.requests import Request, ValidatedRequest
from inplace.runtime.slots import SequenceId, SequenceState, SlotTable
from inplace.snapshots import Restored, SnapshotError

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
        grammar: what its text must be; None if it may be anything.
        matcher: follows it through its grammar, from when it is admitted.
        restored: the sequence that it goes on with, which is read from the store; None where it
            asks for none, or the sequence is live.
    """

    validated: ValidatedRequest
    reply: Reply
    generation: GenerationState | None = None
    active: ActiveRequest | None = None
    is_fetch: bool = False
    grammar: Future[CompiledGrammar] | None = None
    matcher: GrammarMatcher | None = None
    restored: Future[Restored] | None = None

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
    def group(self) -> bytes:
        """What it shares its place in the queue for slots with; only of one that is not refused."""
        return self.validated.request.fairness_group()

    @property
    def is_preparing(self) -> bool:
        """Whether its grammar is still being compiled, or its sequence read from the store."""
        return any(each is not None and not each.done() for each in (self.grammar, self.restored))

    def take_restored(self) -> None:
        """Take the sequence that was read for it; or make it a request that is refused."""
        if self.restored is None:
            return
        request = self.validated.request
        # The future's callback has this request: without the cycle it is freed with its answer,
        # which a server that stops waits for.
        future, self.restored = self.restored, None
        try:
            request = replace(request, restored=future.result())
            self.validated = replace(self.validated, request=request)
        except SnapshotError as error:
            self.validated = replace(self.validated, refusal=error.as_refusal())

    def start_matching(self) -> None:
        """Make its matcher, if it has a compiled grammar; or make it a request that is refused."""
        if self.grammar is None or self.matcher is not None or self.validated.refusal is not None:
            return
        assert self.generation is not None
        try:
            self.matcher = self.grammar.result().matcher(self.generation.end_token_ids)
        except RequestError as error:
            self.validated = replace(self.validated, refusal=error)
        except (OSError, CancelledError) as error:
            refusal = RequestError(
                Code.ENGINE_FAILED,
                f"the process of the grammar has ended ({error}); send it again",
                retryable=True,
            )
            self.validated = replace(self.validated, refusal=refusal)

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
