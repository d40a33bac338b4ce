"""The stream driver: requests are checked and queued in the server's call; a thread of its own runs them, others answer them."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import monotonic

from tokenizers import Tokenizer

from inplace.drivers.generation import MAX_TOKENS, TEXT, Generation, Limits, Reason, tokenized
from inplace.drivers.job import Job
from inplace.drivers.reply import TEXT_OUTPUT, Channel, Outputs, Reply
from inplace.drivers.scheduler import Scheduler
from inplace.drivers.senders import CancelWatch, Senders
from inplace.drivers.step import LONGEST_PAUSE, answered
from inplace.errors import Code, RequestError
from inplace.instance import ModelInstance
from inplace.requests import Checked, Request
from inplace.sequences import Ended, SequenceId
from inplace.text import Detokenizer

MOST_BEHIND = 64
"""Requests of one sequence that may wait behind one another."""
LOOK = 0.05
"""Seconds between two looks at the idle sequences, at least."""
UNLOADED = "the model is being unloaded; START again when it is back"

log = logging.getLogger("inplace")


@dataclass(frozen=True)
class Language:
    """What turns a model's tokens into generations.

    Attributes:
        tokenizer: for text; None serves token ids alone.
        eos: end tokens.
    """

    tokenizer: Tokenizer | None = None
    eos: frozenset[int] = frozenset()


class StreamDriver:
    """Runs a model instance for a server that hands over requests and takes any number of responses for each, at any time.

    Requests of one sequence run one after another, those of different sequences together: each step takes whoever has tokens to feed, a
    generation joins as soon as it has a slot and leaves with its last token.

    Args:
        instance: the model instance; the driver is its only user.
        language: for generations.
        most_waiting: generations that may wait for a slot.
    """

    def __init__(self, instance: ModelInstance, language: Language, most_waiting: int) -> None:
        self.instance = instance
        self._language = language
        self._names = instance.program.language
        self._most_waiting = most_waiting
        self._inbox: queue.SimpleQueue[Job | tuple[Job, Reason] | None] = queue.SimpleQueue()
        self._lanes: dict[SequenceId, deque[Job]] = {}
        self._waiting: deque[Job] = deque()
        self._scheduler = Scheduler(instance.program)
        self._senders = Senders()
        self._watch: CancelWatch[Job] = CancelWatch(lambda job: self._inbox.put((job, Reason.CANCELLED)))
        self._next_look, self._closed = 0.0, False
        instance.observer.queue(self._waiting)
        self._thread = threading.Thread(target=self._run, name="inplace-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, texts: Mapping[str, tuple[bytes, ...]], channel: Channel) -> None:
        """Take a request; it is answered through its channel. Requests of one sequence take effect in the order given.

        Args:
            request: what was asked.
            texts: its inputs of BYTES, by name.
            channel: its way back.
        """
        try:
            job = self._job(request, texts, channel)
        except RequestError as error:
            self._refuse(Job(Checked(request), Reply(channel)), error)
            return
        if self._closed:
            self._refuse(job, RequestError(Code.SHUTDOWN, UNLOADED, retryable=True))
            return
        if job.generation is not None:
            self._watch.add(job, job.reply)
        self._inbox.put(job)

    def close(self) -> None:
        """Answer everything that has not been, and stop."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()
        self._watch.close()
        self._senders.close()

    # In the server's thread

    def _job(self, request: Request, texts: Mapping[str, tuple[bytes, ...]], channel: Channel) -> Job:
        key = request.key()
        generates = MAX_TOKENS in request.parameters
        if request.end and not request.start and not generates and not request.inputs and not texts:
            return Job(Checked(request, key), Reply(channel))
        try:
            if generates and self._names is None:
                raise RequestError(Code.BAD_PARAMETER, f"this model is no language model and generates nothing: leave {MAX_TOKENS!r} out")
            request = self._with_ids(request, texts)
            limits = Limits.parse(request, texts) if generates else None
            if limits is not None and limits.stops and self._language.tokenizer is None:
                raise RequestError(Code.BAD_PARAMETER, "this model was built without a tokenizer: it knows no stop texts")
        except RequestError as error:
            return Job(Checked(request, key, refusal=error), Reply(channel))
        checked = self.instance.check(request)
        if limits is None or checked.refusal is not None:
            return Job(checked, Reply(channel))
        assert self._names is not None
        detokenizer = stopper = None
        tokenizer = self._language.tokenizer
        if tokenizer is not None and (limits.stops or TEXT_OUTPUT in channel.wanted):
            made = Detokenizer(tokenizer, checked.inputs[self._names[0]][-16:].tolist())
            detokenizer, stopper = (None, made) if limits.stops else (made, None)
        checked = replace(checked, said=1, wanted=frozenset((self._names[1],)))
        return Job(checked, Reply(channel, limits.interval, detokenizer), Generation(limits, self._language.eos, stopper))

    def _with_ids(self, request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> Request:
        """The request with the token ids of its text."""
        if self._names is None or TEXT not in texts:
            return request
        if self._names[0] in request.inputs:
            raise RequestError(Code.BAD_PARAMETER, f"inputs {self._names[0]!r} and {TEXT!r} are both given; send one of them")
        ids = tokenized(self._language.tokenizer, texts[TEXT], self.instance.manifest.capacity, start=request.start)
        return replace(request, inputs={self._names[0]: ids})

    # In the engine's thread

    def _run(self) -> None:
        serving = True
        while serving:
            try:
                serving = self._receive()
                if monotonic() >= self._next_look:
                    self._next_look = monotonic() + LOOK
                    self.instance.table.reclaim()
                self._admit()
                if serving and self._scheduler:
                    self._step()
                    self._admit()
            except Exception as error:  # a defect: whoever waits must be told, and the others served
                log.exception("the stream driver failed")
                self._drop(RequestError(Code.ENGINE_FAILED, f"the backend failed ({type(error).__name__}: {error}); START again"))
        self._close()

    def _receive(self) -> bool:
        """Take what has arrived; wait for it where there is nothing to run. False: the driver is closed."""
        idle = not self._scheduler
        while True:
            try:
                message = self._inbox.get(idle, self._pause() if idle else None)
            except queue.Empty:
                return True
            idle = False
            if message is None:
                return False
            if isinstance(message, Job):
                self._arrived(message)
            else:
                self._cancelled(message[0])

    def _pause(self) -> float:
        return min(max(LOOK, self.instance.table.next_expiry()), LONGEST_PAUSE)

    def _arrived(self, job: Job) -> None:
        lane = self._lanes.setdefault(job.sequence, deque())
        if lane and self._takes(job):
            for other in [other for other in reversed(lane) if other.generation is not None]:
                self._conclude(other, Reason.ENDED)
            lane = self._lanes.setdefault(job.sequence, deque())
        if len(lane) >= MOST_BEHIND and not (job.checked.request.start or job.checked.request.end):
            self._refuse(
                job, RequestError(Code.QUEUE_FULL, f"{len(lane)} requests of the sequence are waiting; send it again later", retryable=True)
            )
            return
        lane.append(job)
        if len(lane) == 1:
            self._next(job.sequence)

    def _takes(self, job: Job) -> bool:
        """Whether the job is an END or START that takes the sequence from the generations before it."""
        request = job.checked.request
        live = self.instance.table.get(job.sequence)
        if not (request.start or request.end):
            return False
        if live is None:
            key = self._lanes[job.sequence][0].checked.key
            return key is None or key == job.checked.key
        try:
            live.check_key(job.checked.key, start=request.start)
        except RequestError:
            return False
        return request.end or live.key is None or not request.goes_on

    def _next(self, sequence: SequenceId) -> None:
        """Begin the first request of a sequence that can be begun."""
        lane = self._lanes[sequence]
        while lane:
            job = lane[0]
            if self._must_wait(job):
                if len(self._waiting) < self._most_waiting:
                    self._waiting.append(job)
                    return
                error = RequestError(
                    Code.QUEUE_FULL, f"{len(self._waiting)} generations wait for a slot; send it again later", retryable=True
                )
                self._refuse(job, error)
            elif self._enter(job):
                return
            lane.popleft()
        del self._lanes[sequence]

    def _must_wait(self, job: Job) -> bool:
        """Whether it is a generation that needs a slot and there is none for it."""
        table, checked = self.instance.table, job.checked
        if job.generation is None or not checked.request.start or table.get(job.sequence) is not None:
            return False
        if not table.free:
            table.reclaim()
        return bool(self._waiting) or not table.free

    def _enter(self, job: Job) -> bool:
        """Give a job its sequence. False: it has been answered instead."""
        try:
            if job.only_ends:
                self.instance.end(job.checked)
                self._answer(job, {})
                return False
            if self._waiting and job.generation is None and job.checked.request.start and self.instance.table.get(job.sequence) is None:
                raise RequestError(
                    Code.NO_FREE_SLOT, "every slot is owned, and generations wait for the next; send it again later", retryable=True
                )
            job.work = self.instance.enter(job.checked)
        except RequestError as error:
            self._refuse(job, error)
            return False
        if job.generation is not None:
            capacity, sequence = self.instance.manifest.capacity, job.work.sequence
            job.generation.begin(None if capacity is None else capacity - sequence.length - job.work.tokens)
        self._scheduler.add(job)
        return True

    def _admit(self) -> None:
        """Give free slots to the generations that wait for one."""
        while self._waiting and self.instance.table.free:
            job = self._waiting.popleft()
            if not self._enter(job):
                self._over(job)

    def _cancelled(self, job: Job) -> None:
        lane = self._lanes.get(job.sequence)
        if lane is None or job not in lane:
            return  # it has finished
        sequence = job.work.sequence if job.work is not None else None
        if sequence is not None:
            self._scheduler.remove(job)
            self.instance.table.end(sequence, Ended.CANCELLED)
        self._conclude(job, Reason.CANCELLED)

    def _step(self) -> None:
        jobs, budget = self._scheduler.next()
        rows = [job.work for job in jobs if job.work is not None]
        outputs = self.instance.step(rows, budget)
        said = outputs[self._names[1]].flatten().tolist() if self._names is not None and self._names[1] in outputs else []
        answers = answered(rows, outputs) if any(job.generation is None for job in jobs) else []
        unfinished: list[Job] = []
        for row, (job, work) in enumerate(zip(jobs, rows, strict=True)):
            if work.error is not None:
                self.instance.finish(work)
                self._refuse(job, work.error)
                self._over(job)
            elif not work.finished:
                unfinished.append(job)
            elif job.generation is not None:
                self._say(job, job.generation, said[row])
            else:
                answer = answers[row]
                assert isinstance(answer, dict)
                self.instance.finish(work)
                self._answer(job, answer)
                self._over(job)
        self._scheduler.again(unfinished)

    def _say(self, job: Job, generation: Generation, token: int) -> None:
        text, reason = generation.add(token)
        if generation.said == 1:
            self.instance.observer.spoke(monotonic() - job.checked.request.received)
        if reason is not None:
            self._conclude(job, reason, (token, text))
            return
        if job.reply.say(token, text):
            self._senders.put(job.reply)
        assert job.work is not None
        job.work.feed(token)
        self._scheduler.add(job)

    def _conclude(self, job: Job, reason: Reason, token: tuple[int, str | None] | None = None) -> None:
        """A generation has finished: what it said is the sequence's, the last of it not fed yet."""
        generation, work = job.generation, job.work
        assert generation is not None
        if work is not None:
            self._scheduler.remove(job)
            work.sequence.pending = generation.token if generation.said else work.pending
            self.instance.finish(work)
        elif job in self._waiting:
            self._waiting.remove(job)
        self.instance.observer.generated(job.sequence, job.checked.request.id, reason, generation.said)
        if job.reply.finish(reason, token, generation.rest()):
            self._senders.put(job.reply)
        self._over(job)

    def _answer(self, job: Job, outputs: Outputs) -> None:
        if job.reply.finish(outputs):
            self._senders.put(job.reply)

    def _refuse(self, job: Job, error: RequestError) -> None:
        request = job.checked.request
        self._watch.remove(job)
        self.instance.observer.refused(request.sequence, request.id, error, end=request.end)
        if job.reply.finish(error):
            self._senders.put(job.reply)

    def _over(self, job: Job) -> None:
        """A request has been answered: it is the turn of its sequence's next one."""
        self._watch.remove(job)
        lane = self._lanes[job.sequence]
        first = lane[0] is job
        lane.remove(job)
        if first:
            self._next(job.sequence)

    def _drop(self, error: RequestError) -> None:
        """Answer everything with an error; sequences that were being worked on end."""
        jobs = [job for lane in self._lanes.values() for job in lane]
        self._lanes.clear()
        self._waiting.clear()
        self._scheduler = Scheduler(self.instance.program)
        for job in jobs:
            self._refuse(job, error)
            if job.work is not None and self.instance.table.get(job.sequence) is job.work.sequence:
                self.instance.table.end(job.work.sequence, Ended.ENGINE_FAILED)

    def _close(self) -> None:
        error = RequestError(Code.SHUTDOWN, UNLOADED, retryable=True)
        self._drop(error)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Job):
                self._refuse(message, error)
