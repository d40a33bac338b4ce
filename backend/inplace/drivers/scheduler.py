"""The scheduler, which chooses the rows of the next step; and the pipeline of steps in flight."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from inplace.drivers.queues import StreamRequest
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.instance import InFlightStep, ModelInstance
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.programs import Program


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The rows of a step.

    Attributes:
        requests: the request of each row; decode rows first.
        num_decodes: how many rows have one token and no prompt.
        token_budget: most tokens of the step.
    """

    requests: list[StreamRequest]
    num_decodes: int
    token_budget: int


class Scheduler:
    """Chooses rows: requests with one token (decode) round-robin, longer ones (prefill) in order.

    A step has as many decode rows as fit, and beside them at most one chunk of prefill tokens in
    all, so that running generations wait for at most one chunk of other prompts. A step without
    decode rows is filled with prefill. With lookahead, a prompt is in a step as a whole or not at
    all.

    Args:
        program: the program that runs.
        tokens_per_decode: `Manifest.tokens_per_decode`: a decode row may have so many tokens, each
            of which takes a row of the program.
    """

    def __init__(self, program: Program, tokens_per_decode: int = 1) -> None:
        self._max_rows, self._chunk = program.max_rows // tokens_per_decode, program.chunk
        self._tokens_per_decode = tokens_per_decode
        self._is_divisible = not program.lookahead
        self._token_budget = program.token_budget
        self._decodes: deque[StreamRequest] = deque()
        self._prefills: deque[StreamRequest] = deque()
        self._prefilled_last = False

    def __bool__(self) -> bool:
        """Whether any request has tokens to compute."""
        return bool(self._decodes or self._prefills)

    def add(self, request: StreamRequest) -> None:
        """Add an admitted request."""
        (self._decodes if _num_waiting_tokens(request) == 1 else self._prefills).append(request)

    def start_decoding(self, request: StreamRequest) -> None:
        """Move a generation whose prompt is consumed to the decode rows."""
        self._prefills.remove(request)
        self._decodes.append(request)

    def remove(self, request: StreamRequest) -> None:
        """Remove a request, if it is there."""
        for requests in (self._decodes, self._prefills):
            if request in requests:
                requests.remove(request)
                return

    def clear(self) -> None:
        """Remove all requests."""
        self._decodes.clear()
        self._prefills.clear()

    @property
    def has_generations(self) -> bool:
        """Whether a request is a generation."""
        return any(each.generation is not None for each in (*self._decodes, *self._prefills))

    @property
    def fills_a_step(self) -> bool:
        """Whether there are requests for every row of a step."""
        return len(self._decodes) + len(self._prefills) >= self._max_rows

    def following(self, requests: list[StreamRequest]) -> list[StreamRequest] | None:
        """The requests of the next step, if those of the last go on in it, all with one token.

        Args:
            requests: of the last step, without those that have left the scheduler.

        Returns:
            The same, and then generations with a grammar; None if they do not all go on, or if
            others begin.
        """
        decodes, count = list(self._decodes), len(requests)
        if self._prefills or len(decodes) > self._max_rows or decodes[:count] != requests:
            return None
        return decodes if all(each.matcher is not None for each in decodes[count:]) else None

    def schedule(self) -> ScheduledStep:
        """Choose the rows of the next step."""
        max_decodes = self._max_rows - bool(self._prefills)
        if self._max_rows == 1 and self._decodes and self._prefills:  # alternate
            self._prefilled_last = not self._prefilled_last
            max_decodes = int(not self._prefilled_last)
        if len(self._decodes) <= max_decodes:
            rows = list(self._decodes)
        else:
            rows = list(islice(self._decodes, max_decodes))
            self._decodes.rotate(-max_decodes)
        num_decodes = len(rows)
        decode_tokens = num_decodes * self._tokens_per_decode
        if not self._prefills:
            return ScheduledStep(rows, num_decodes, decode_tokens)
        prefill_budget = left = self._chunk if rows else self._token_budget
        for request in self._prefills:
            tokens = min(_num_waiting_tokens(request), self._chunk)
            if left < (1 if self._is_divisible else tokens) or len(rows) == self._max_rows:
                break
            rows.append(request)
            left -= tokens
        return ScheduledStep(
            rows, num_decodes, min(decode_tokens + prefill_budget, self._token_budget)
        )


class CallQueue(Scheduler):
    """Requests that run a schedule, the longest waiting first.

    Args:
        instance: chooses the rows of each call.
    """

    def __init__(self, instance: ScheduledInstance) -> None:
        super().__init__(instance.program)
        self._instance = instance
        self._requests: dict[ActiveRequest, StreamRequest] = {}  # in their order
        self._finished: list[StreamRequest] = []

    def __bool__(self) -> bool:
        """Whether any request waits for a call."""
        return bool(self._requests)

    def add(self, request: StreamRequest) -> None:
        """Add an admitted request; one that has nothing to call is returned by the next call."""
        assert request.active is not None
        self._requests[request.active] = request
        if request.active.finished:
            self._finished.append(request)

    def remove(self, request: StreamRequest) -> None:
        """Remove a request, if it is there."""
        if request.active is not None:
            self._requests.pop(request.active, None)
        if request in self._finished:
            self._finished.remove(request)

    def clear(self) -> None:
        """Remove all requests."""
        self._requests.clear()
        self._finished.clear()

    @property
    def has_generations(self) -> bool:
        """Whether any request waits: like generations, calls do not wait for more requests."""
        return bool(self._requests)

    def call(self) -> list[StreamRequest]:
        """Call a program; its rows go to the back.

        Returns:
            The requests that were called.
        """
        if self._finished:
            finished, self._finished = self._finished, []
            return finished
        rows = self._instance.next_rows(list(self._requests))
        requests = [self._requests.pop(active) for active in rows]
        self._requests.update(zip(rows, requests, strict=True))
        self._instance.step(rows)
        return requests


def _num_waiting_tokens(request: StreamRequest) -> int:
    assert request.active is not None
    return request.active.num_waiting_tokens


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step that was waited for.

    Attributes:
        requests: the request of each row; decode rows first.
        num_decodes: how many rows are decode rows.
        rows: the active request of each row.
        outputs: as `ModelInstance.wait` returns them.
    """

    requests: list[StreamRequest]
    num_decodes: int
    rows: list[ActiveRequest]
    outputs: dict[str, Tensor]


class StepPipeline:
    """Launches steps and waits for them; overlaps the device with the work for each token.

    If the engine can overlap steps and the next step has the same rows, it is launched with the
    sampled tokens of the last one before anything else is done with them. The device then waits for
    one small copy instead of the work for every token. A row whose generation turns out to have
    finished (end token, stop text, cancellation) is dropped.

    A generation with a grammar needs the mask for its next token first. Its rows leave after each
    token, and join a later step when the mask is there; the other rows do not wait for it.

    Args:
        instance: runs the steps.
        scheduler: chooses the rows.
        no_arrivals: whether nothing has arrived that would change the next step.
        receive_masks: lets generations with a grammar go on whose masks have arrived.
    """

    def __init__(
        self,
        instance: ModelInstance,
        scheduler: Scheduler,
        no_arrivals: Callable[[], bool],
        receive_masks: Callable[[], None],
    ) -> None:
        self._instance, self._scheduler, self._no_arrivals = instance, scheduler, no_arrivals
        self._receive_masks = receive_masks
        self._in_flight: tuple[ScheduledStep, InFlightStep] | None = None

    def __bool__(self) -> bool:
        """Whether a step is in flight."""
        return self._in_flight is not None

    def step(self) -> StepResult:
        """Wait for the step in flight, or for a new one.

        The step after it may be in flight when this returns.
        """
        scheduled, step = self._in_flight or self._launch()
        self._in_flight = None
        plain = self._overlapping(scheduled, step)  # computed while the device works
        outputs = self._instance.wait(step)
        if plain and not step.failed and self._no_arrivals():
            self._in_flight = self._launch_next(scheduled, step, outputs, plain)
        self._instance.advance(step, outputs)
        return StepResult(scheduled.requests, scheduled.num_decodes, step.batch.rows, outputs)

    def drain(self) -> None:
        """Wait for the step in flight and ignore its outputs."""
        if self._in_flight is not None:
            _, step = self._in_flight
            self._in_flight = None
            self._instance.advance(step, self._instance.wait(step))

    def _launch(self) -> tuple[ScheduledStep, InFlightStep]:
        scheduled = self._scheduler.schedule()
        self._leave(scheduled)
        rows = [each.active for each in scheduled.requests if each.active is not None]
        return scheduled, self._instance.launch(rows, scheduled.token_budget)

    def _leave(self, scheduled: ScheduledStep) -> None:
        """Let the generations of a step leave that need a mask after it."""
        for request in scheduled.requests[: scheduled.num_decodes]:
            if request.matcher is not None:
                self._scheduler.remove(request)

    def _launch_next(
        self,
        scheduled: ScheduledStep,
        step: InFlightStep,
        outputs: dict[str, Tensor],
        plain: list[StreamRequest],
    ) -> tuple[ScheduledStep, InFlightStep] | None:
        """Launch the step after ``step``: these requests of it, and those that have their mask."""
        self._receive_masks()
        requests = self._scheduler.following(plain)
        if requests is None:
            return None
        if requests == scheduled.requests:
            return scheduled, self._instance.launch_next(step, outputs)
        kept = [row for row, each in enumerate(scheduled.requests) if each.matcher is None]
        joined = [each.active for each in requests[len(plain) :] if each.active is not None]
        following = ScheduledStep(requests, len(requests), len(requests))
        self._leave(following)
        return following, self._instance.launch_next(step, outputs, kept, joined)

    def _overlapping(self, scheduled: ScheduledStep, step: InFlightStep) -> list[StreamRequest]:
        """The requests of a step that go on in the next one, as far as is known now.

        None of them if that step cannot be launched yet.
        """
        if not self._instance.overlaps or step.scored:
            return []
        plain = [request for request in scheduled.requests if request.matcher is None]
        if self._scheduler.following(plain) is None:
            return []
        for request in plain:
            generation, active = request.generation, request.active
            if generation is None or not generation.expects_two_more:
                return []
            if active is None or active.dropped:
                return []
        return plain
