"""The engine's thread of a stream model: it gives jobs their sequences, runs steps, and says what came of them."""

import logging
import queue
import sys
from collections import deque
from concurrent.futures import Executor
from time import monotonic

from inplace.drivers.generation import FinishReason, GenerationState
from inplace.drivers.reply import BufferedReply
from inplace.drivers.scheduler import Scheduler, StepPipeline
from inplace.drivers.senders import CancellationWatcher, ResponseBuffer, Senders
from inplace.drivers.sequence_queues import SequenceQueues, StreamRequest, find_buffered_reply
from inplace.drivers.step import LONGEST_PAUSE, answered
from inplace.errors import Code, RequestError, failed
from inplace.runtime.instance import ModelInstance
from inplace.runtime.slots import EndReason, SequenceId

GATHERING, MOST_GATHERING = 0.0001, 0.005
"""Seconds between two looks whether senders are still behind, and for which a step waits for them at most."""


LOOK = 0.05
"""Seconds between two looks at the idle sequences, at least."""


SWITCH = 0.0005
"""Seconds for which a thread may keep the interpreter while the engine's wants it; Python's own 5 ms are several steps of a fast engine."""


Message = list[StreamRequest] | StreamRequest | None
"""Jobs that arrived together; one whose client has gone; or that the driver is closed."""


log = logging.getLogger("inplace")


class EngineLoop:
    """Runs jobs: those of one sequence one after another, those of different sequences together.

    Args:
        instance: the model instance; nobody else uses it.
        senders: answer from threads of their own.
        most_waiting: generations that may wait for a slot.
        thread: of one thread, which is the engine's until it is closed.
    """

    def __init__(
        self, instance: ModelInstance, senders: Senders, most_waiting: int, thread: Executor
    ) -> None:
        self._instance, self._senders, self._most_waiting = instance, senders, most_waiting
        self._said_by = (
            instance.program.decoder_io[1] if instance.program.decoder_io is not None else None
        )
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lanes = SequenceQueues(instance.table)
        self._waiting: deque[StreamRequest] = deque()
        self._scheduler = Scheduler(instance.program)
        self._flights = StepPipeline(instance, self._scheduler, self._inbox.empty)
        self._outcomes = ResponseBuffer(senders, instance.observer)
        self._watch: CancellationWatcher[StreamRequest] = CancellationWatcher(
            self._inbox.put, senders.turn
        )
        self._next_look = 0.0
        instance.observer.watch_waiting(self._waiting)
        self._turn = instance.gil_released = senders.turn
        sys.setswitchinterval(SWITCH)
        self._thread = thread
        thread.submit(self._run)

    def put(self, jobs: list[StreamRequest]) -> None:
        """Take jobs, which begin together; those of one sequence take effect in the order given. From any thread."""
        self._inbox.put(jobs)

    def close(self, error: RequestError) -> None:
        """Answer everything that has not been with this error, and stop."""
        self._inbox.put(None)
        self._thread.shutdown()
        self._watch.close()
        self._drop(error, EndReason.SHUTDOWN)
        while not self._inbox.empty():
            message = self._inbox.get()
            for job in message if isinstance(message, list) else ():
                self._refuse(job, error)
        self._outcomes.tell()

    def _run(self) -> None:
        self._turn.take()
        try:
            with self._instance.engine.on_stream():
                self._serve()
        except BaseException:
            log.exception("the engine's thread has ended")
            raise
        finally:
            self._turn.give()

    def _serve(self) -> None:
        serving = True
        while serving:
            try:
                serving = self._receive()
                if monotonic() >= self._next_look:
                    self._next_look = monotonic() + LOOK
                    self._instance.table.reclaim_idle()
                self._admit()
                if serving and (self._scheduler or self._flights):
                    self._step()
                    self._admit()
            except (
                Exception
            ) as error:  # a defect: whoever waits must be told, and the others served
                log.exception("the stream driver failed")
                self._drop(failed(error), EndReason.ENGINE_FAILED)
            self._outcomes.tell()
        self._flights.land()

    def _receive(self) -> bool:
        """Take what has arrived; wait for it where there is nothing to run yet. False: the driver is closed."""
        serving = self._take(0.0 if self._scheduler or self._flights else self._pause())
        until = monotonic() + MOST_GATHERING
        while serving and self._gathers() and monotonic() < until:
            serving = self._take(GATHERING)
        return serving

    def _take(self, seconds: float) -> bool:
        """Take all that has arrived, and wait for the first of it, if for anything. False: the driver is closed."""
        while True:
            try:
                message = self._waited(seconds) if seconds else self._inbox.get_nowait()
            except queue.Empty:
                return True
            seconds = 0.0
            if message is None:
                return False
            if isinstance(message, list):
                self._arrived_together(message)
            else:
                self._cancelled(message)

    def _waited(self, seconds: float) -> Message:
        self._outcomes.tell()
        with self._turn:
            return self._inbox.get(timeout=seconds)

    def _pause(self) -> float:
        return min(max(LOOK, self._instance.table.next_expiry()), LONGEST_PAUSE)

    def _gathers(self) -> bool:
        """Whether to wait for more steps, while many are being answered: they come again, and each would make a step alone."""
        if self._flights or not self._scheduler or not self._senders.behind:
            return False
        return not (self._scheduler.full or self._scheduler.generates)

    # Requests of one sequence follow one another

    def _arrived_together(self, jobs: list[StreamRequest]) -> None:
        for place, job in enumerate(jobs):
            try:
                self._arrived(job)
            except Exception as error:
                for other in jobs[place:]:
                    if other not in self._lanes:  # the others are told by who catches it
                        self._refuse(other, failed(error))
                raise

    def _arrived(self, job: StreamRequest) -> None:
        if job.fetches:
            self._fetch(job)
            return
        if (
            job.generation is not None
        ):  # not before: a cancellation that came here ahead of its job would be of nobody
            self._watch.add(job, job.reply)
        for other in self._lanes.taken_by(job):
            assert other.generation is not None
            self._conclude(other, other.generation, FinishReason.ENDED)
        try:
            first = self._lanes.add(job)
        except RequestError as error:
            self._refuse(job, error)
            return
        if first:
            self._next(job.sequence)

    def _fetch(self, job: StreamRequest) -> None:
        """Have a request answered with what the sequence's generation says, or has said."""
        try:
            mailbox = find_buffered_reply(
                job, self._lanes.of(job.sequence), self._instance.table.get(job.sequence)
            )
            if mailbox.fetch(job.reply.channel):
                self._senders.queue(mailbox)
        except RequestError as error:
            self._refuse(job, error)

    def _next(self, sequence: SequenceId) -> None:
        """Begin the first request of a sequence that can be begun."""
        while lane := self._lanes.of(sequence):
            job = lane[0]
            if self._must_wait(job):
                if len(self._waiting) < self._most_waiting:
                    self._waiting.append(job)
                    return
                text = f"{len(self._waiting)} generations wait for a slot; send it again later"
                self._refuse(job, RequestError(Code.QUEUE_FULL, text, retryable=True))
            elif self._enter(job):
                return
            self._lanes.remove(job)

    def _over(self, job: StreamRequest) -> None:
        """A request has been answered: it is the turn of its sequence's next one."""
        self._watch.remove(job)
        if self._lanes.remove(job):
            self._next(job.sequence)

    # Slots

    def _needs_slot(self, job: StreamRequest) -> bool:
        return (
            job.checked.request.start
            and not job.only_ends
            and self._instance.table.get(job.sequence) is None
        )

    def _must_wait(self, job: StreamRequest) -> bool:
        """Whether it is a generation that needs a slot and there is none for it."""
        if job.generation is None or not self._needs_slot(job):
            return False
        if not self._instance.table.num_free:
            self._instance.table.reclaim_idle()
        return bool(self._waiting) or not self._instance.table.num_free

    def _enter(self, job: StreamRequest) -> bool:
        """Give a job its sequence. False: it has been answered instead."""
        try:
            if job.only_ends:
                self._instance.end_sequence(job.checked)
                self._outcomes.answer(job, {})
                return False
            if self._waiting and job.generation is None and self._needs_slot(job):
                text = "every slot is owned, and generations wait for the next; send it again later"
                raise RequestError(Code.NO_FREE_SLOT, text, retryable=True)
            job.work = self._instance.admit_validated(job.checked)
        except RequestError as error:
            self._refuse(job, error)
            return False
        if job.generation is not None:
            capacity, sequence = self._instance.manifest.capacity, job.work.sequence
            job.generation.begin(
                None if capacity is None else capacity - sequence.length - job.work.num_tokens
            )
        self._scheduler.add(job)
        return True

    def _admit(self) -> None:
        """Give free slots to the generations that wait for one."""
        while self._waiting and self._instance.table.num_free:
            job = self._waiting.popleft()
            if not self._enter(job):
                self._over(job)

    def _cancelled(self, job: StreamRequest) -> None:
        if job not in self._lanes or job.generation is None:
            return  # it has finished
        if job.work is not None:
            self._instance.table.end(job.work.sequence, EndReason.CANCELLED)
        self._conclude(job, job.generation, FinishReason.CANCELLED)

    # Steps

    def _step(self) -> None:
        landed = self._flights.next()
        outputs = landed.outputs
        said = outputs[self._said_by].numpy().ravel().tolist() if self._said_by in outputs else []
        steps = any(job.generation is None for job in landed.jobs)
        answers = answered(landed.rows, outputs) if steps else []
        say = self._outcomes.say
        for row, (job, work) in enumerate(zip(landed.jobs, landed.rows, strict=True)):
            generation = job.generation
            if work.dropped:
                continue
            if work.error is not None:
                self._scheduler.remove(job)
                self._instance.finish(work)
                self._refuse(job, work.error)
                self._over(job)
            elif work.num_computed_tokens < work.num_tokens:
                continue
            elif generation is None:
                self._scheduler.remove(job)
                self._instance.finish(work)
                answer = answers[row]
                assert isinstance(answer, dict)
                self._outcomes.answer(job, answer)
                self._over(job)
            else:
                text, reason = generation.add(token := said[row])
                say(job, generation, text)
                if reason is not None:
                    self._conclude(job, generation, reason)
                    continue
                work.feed(token)
                if row >= landed.running:
                    self._scheduler.goes_on(job)

    def _conclude(
        self, job: StreamRequest, generation: GenerationState, reason: FinishReason
    ) -> None:
        """A generation has finished: what it said is the sequence's, the last of it not fed yet."""
        work = job.work
        if work is not None:
            work.dropped = True
            self._scheduler.remove(job)
            work.sequence.pending_token = (
                generation.token if generation.said else work.pending_token
            )
            work.sequence.driver_state = job.reply if isinstance(job.reply, BufferedReply) else None
            self._instance.finish(work)
        elif job in self._waiting:
            self._waiting.remove(job)
        self._outcomes.finish(job, generation, reason)
        self._over(job)

    def _refuse(self, job: StreamRequest, error: RequestError) -> None:
        self._watch.remove(job)
        self._outcomes.refuse(job, error)

    def _drop(self, error: RequestError, why: EndReason) -> None:
        """Answer everything with an error; sequences that were being worked on end."""
        self._flights.land()
        jobs = self._lanes.clear()
        self._waiting.clear()
        self._scheduler.clear()
        for job in jobs:
            self._refuse(job, error)
            if job.work is not None and self._instance.table.get(job.sequence) is job.work.sequence:
                self._instance.table.end(job.work.sequence, why)
