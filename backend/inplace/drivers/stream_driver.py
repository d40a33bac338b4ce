"""The stream driver: requests are queued in the server's call and answered later.

The engine loop, a thread, admits requests, runs steps and routes their outputs.
"""

import contextlib
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from time import monotonic

from inplace.drivers.detokenizer import MAX_CONTEXT, TokenizerError
from inplace.drivers.generation import FinishReason, GenerationState
from inplace.drivers.grammars import PendingMasks, Ready, no_token_left
from inplace.drivers.parsing import RequestParser, TokenizerConfig
from inplace.drivers.queues import (
    FailedGenerations,
    SequenceQueues,
    StreamRequest,
    find_buffered_reply,
)
from inplace.drivers.reply import BufferedReply, Channel, FinalResponse, Reply, ScheduleReply
from inplace.drivers.scheduler import CallQueue, Scheduler, StepPipeline
from inplace.drivers.senders import CancellationWatcher, ResponseBuffer, Senders
from inplace.drivers.shutdown import HandOver, unloading
from inplace.errors import Code, RequestError, backend_failure
from inplace.protocol import GROUP, TEXT
from inplace.runtime.batcher import ActiveRequest, Answer, split_outputs
from inplace.runtime.fairness import WaitingQueue
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.runtime.slots import RECLAIM_INTERVAL, EndReason, SequenceId

MAX_GATHER_TIME, GATHER_POLL_INTERVAL = 0.005, 0.0001
"""Seconds for which a step waits for more requests at most, and between two looks for them."""


MASK_POLL_INTERVAL = 0.001
"""Seconds for which arrivals may wait while the loop waits for masks of grammars."""


SWITCH_INTERVAL = 0.0005
"""Seconds for which another thread may keep the GIL while the engine's thread wants it. Python's
default of 5 ms is several steps of a fast engine."""


Arrival = tuple[Request, Mapping[str, tuple[bytes, ...]], Channel]
"""A request, its inputs of BYTES by name, and the channel that sends its responses."""


Message = list[StreamRequest] | StreamRequest | Callable[[], None] | None
"""Requests that arrived together; a request that was cancelled; a call; or None to stop."""


log = logging.getLogger("inplace")


def engine_thread() -> Executor:
    """An executor of one thread, to load an engine on and then to step it in a stream driver.

    On the CPU it should be one thread: OpenMP keeps worker threads for every thread that has
    computed something large, and with more workers than processors they sleep between two operators
    instead of spinning (libgomp).
    """
    return ThreadPoolExecutor(1, "inplace-engine")


class StreamDriver:
    """Runs a model instance for a server that accepts any number of responses at any time.

    Requests of one sequence run one after another, those of different sequences together
    (continuous batching): a generation joins the next step once it has a slot, and leaves with its
    last token.

    Args:
        instance: the model instance; nothing else uses it.
        tokenizer_config: for generations.
        max_waiting: requests that may wait for a slot.
        thread: steps the engine from now on; of one thread. None for a new one.
    """

    def __init__(
        self,
        instance: ModelInstance,
        tokenizer_config: TokenizerConfig,
        max_waiting: int,
        thread: Executor | None = None,
    ) -> None:
        self.instance = instance
        self._parser = RequestParser(instance, tokenizer_config)
        self._senders = Senders()
        self._engine_loop = EngineLoop(
            instance, self._senders, max_waiting, thread or engine_thread()
        )
        self._closed = False
        self._closing = threading.Lock()

    def submit(self, arrivals: Iterable[Arrival]) -> None:
        """Queue requests that came together; each is answered through its channel.

        Those of one sequence take effect in the order given. All begin in one step, if there is
        room; but requests are passed on before a text is tokenized, so that they do not wait for
        it.
        """
        requests: list[StreamRequest] = []
        for request, texts, channel in arrivals:
            if TEXT in texts and requests:
                self._engine_loop.submit(requests)
                requests = []
            try:
                if self._closed:
                    self._forget(request)
                    raise unloading()
                requests.append(self._parser.parse(request, texts, channel))
                self._watch_grammar(requests[-1])
            except RequestError as error:
                self.instance.observer.request_refused(
                    request.sequence_id, request.request_id, error, end=request.end
                )
                self._send_error(channel, error)
            except Exception as error:  # a defect: the other requests must not suffer
                log.exception("a request could not be taken")
                self._send_error(channel, backend_failure(error))
        if requests:
            self._engine_loop.submit(requests)

    def _forget(self, request: Request) -> None:
        """Delete what is stored of a sequence whose END is refused because the driver is closed."""
        if request.end:
            with contextlib.suppress(RequestError):  # the key is none
                self.instance.forget_stored(request, request.key_digest())

    def tokenize(self, request: Request, texts: Mapping[str, tuple[bytes, ...]]) -> Request:
        """A request with the token ids of its text, if it has one. Thread-safe.

        Raises:
            RequestError: it is refused for its text.
        """
        return self._parser.tokenize_text(request, texts)

    def _watch_grammar(self, request: StreamRequest) -> None:
        """Start a request once its grammar is compiled."""
        if request.grammar is not None and not request.grammar.done():
            start = partial(self._engine_loop.start_prepared, request)
            request.grammar.add_done_callback(lambda _: self._engine_loop.call(start))

    def hand_over(self) -> None:
        """Store the sequences that may be stored, then end them, soon."""
        if self.instance.snapshots is not None:
            self._engine_loop.call(self._engine_loop.hand_over)

    def end_idle(self, seconds: float) -> None:
        """End the sequences that have had no request for so many seconds, soon."""
        self._engine_loop.call(partial(self._engine_loop.end_idle, seconds))

    def stop_running(self, error: RequestError) -> None:
        """Answer every request with this error and end all sequences, soon."""
        self._engine_loop.call(partial(self._engine_loop.stop_running, error))

    def close(self) -> None:
        """Answer every request that is queued or running with SHUTDOWN, and stop the threads."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._engine_loop.close(unloading())
        self._senders.close()
        if self._parser.grammars is not None:
            self._parser.grammars.close()

    def _send_error(self, channel: Channel, error: RequestError) -> None:
        self._senders.publish([], [(Reply(channel), FinalResponse(error))])


class EngineLoop:
    """Runs the requests of a sequence one after another, those of different sequences together.

    Args:
        instance: the model instance; nothing else uses it.
        senders: send the responses.
        max_waiting: requests that may wait for a slot.
        thread: of one thread, which runs the loop until it is closed.
    """

    def __init__(
        self, instance: ModelInstance, senders: Senders, max_waiting: int, thread: Executor
    ) -> None:
        self._instance, self._senders = instance, senders
        decoder_io = instance.program.decoder_io
        self._token_output = decoder_io[1] if decoder_io is not None else None
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._queues = SequenceQueues(instance.table)
        self._failed = FailedGenerations()
        self._waiting: WaitingQueue[StreamRequest] = WaitingQueue(max_waiting)
        self._calls = CallQueue(instance) if isinstance(instance, ScheduledInstance) else None
        tokens_per_decode = instance.manifest.tokens_per_decode
        self._scheduler = (
            Scheduler(instance.program, tokens_per_decode) if self._calls is None else self._calls
        )
        self._masks = PendingMasks()
        self._pipeline = StepPipeline(
            instance, self._scheduler, self._inbox.empty, self._receive_masks
        )
        self._responses = ResponseBuffer(senders, instance.observer)
        self._watcher: CancellationWatcher[StreamRequest] = CancellationWatcher(
            self._inbox.put, senders.gil
        )
        self._next_reclaim = 0.0
        self._snapshots = instance.snapshots
        self._hand_over = HandOver(instance, self._queues, self)
        if self._snapshots is not None:
            self._snapshots.on_fenced = lambda sequence: self.call(
                partial(self._hand_over.fence, sequence)
            )
        instance.observer.watch_waiting(self._waiting)
        self._gil = senders.gil
        instance.gil_released = self._gil.released
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._thread = thread
        thread.submit(self._run)

    def submit(self, requests: list[StreamRequest]) -> None:
        """Queue requests that begin together. Thread-safe.

        Those of one sequence take effect in the order given.
        """
        self._inbox.put(requests)

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the loop's thread, between two steps. Thread-safe."""
        self._inbox.put(function)

    def close(self, error: RequestError) -> None:
        """Stop the loop and answer every request that has no final response with this error."""
        self._inbox.put(None)
        self._thread.shutdown()
        self._watcher.close()
        self._fail_all(error, EndReason.SHUTDOWN)
        while not self._inbox.empty():
            message = self._inbox.get()
            for request in message if isinstance(message, list) else ():
                self._refuse(request, error)
        self._responses.flush()

    # The loop

    def _run(self) -> None:
        self._gil.acquire()
        try:
            with self._instance.engine.on_stream():
                self._loop()
        except BaseException:
            log.exception("the engine's thread has ended")
            raise
        finally:
            self._gil.release()

    def _loop(self) -> None:
        serving = True
        while serving:
            try:
                serving = self._receive()
                if monotonic() >= self._next_reclaim:
                    self._next_reclaim = monotonic() + RECLAIM_INTERVAL
                    self._instance.table.reclaim_idle()
                    self._failed.discard_old()
                self._admit_waiting()
                if serving and (self._scheduler or self._pipeline):
                    self._step()
                    self._admit_waiting()
            except Exception as error:  # a defect: fail what is running, then serve on
                log.exception("the stream driver failed")
                self._fail_all(backend_failure(error), EndReason.ENGINE_FAILED)
            self._responses.flush()
        self._pipeline.drain()

    def _receive(self) -> bool:
        """Handle what has arrived; wait for it if there is nothing to run. False: stop."""
        self._receive_masks()
        busy = self._scheduler or self._pipeline
        serving = self._drain_inbox(0.0 if busy else self._instance.table.reclaim_delay())
        gather_until = monotonic() + MAX_GATHER_TIME
        while serving and self._should_gather() and monotonic() < gather_until:
            serving = self._drain_inbox(GATHER_POLL_INTERVAL)
        return serving

    def _should_gather(self) -> bool:
        """Whether to wait for more requests before the next step.

        While answers of single steps are being sent, their clients are about to send the next
        request; without waiting, each would get a step alone.
        """
        if self._pipeline or not self._scheduler or not self._senders.behind:
            return False
        return not (self._scheduler.fills_a_step or self._scheduler.has_generations)

    def _drain_inbox(self, timeout: float) -> bool:
        """Handle all messages; wait up to ``timeout`` seconds for the first. False: stop."""
        while True:
            try:
                message = self._wait_for_message(timeout) if timeout else self._inbox.get_nowait()
            except queue.Empty:
                return True
            timeout = 0.0
            if message is None:
                return False
            if isinstance(message, list):
                self._on_arrivals(message)
            elif isinstance(message, StreamRequest):
                self._on_cancelled(message)
            else:
                message()

    def _wait_for_message(self, timeout: float) -> Message:
        self._responses.flush()
        if self._masks.pending:
            self._on_masks(self._masks.gather(self._gil.released, MASK_POLL_INTERVAL))
            return self._inbox.get_nowait()
        with self._gil.released:
            return self._inbox.get(timeout=timeout)

    # Arrivals and the queues of sequences

    def _on_arrivals(self, requests: list[StreamRequest]) -> None:
        for index, request in enumerate(requests):
            try:
                self._on_arrival(request)
            except Exception as error:  # a defect; `_loop` answers the requests that are queued
                for other in requests[index:]:
                    if other not in self._queues:
                        self._refuse(other, backend_failure(error))
                raise

    def _on_arrival(self, request: StreamRequest) -> None:
        if request.is_fetch:
            self._fetch(request)
            return
        if request.request.start:
            self._failed.discard(request.sequence_id)
        if request.generation is not None or isinstance(request.reply, ScheduleReply):
            # Watched from here on: an earlier cancellation would find no request in the queues.
            self._watcher.add(request, request.reply)
        for other in self._queues.generations_ended_by(request):
            assert other.generation is not None
            self._finish_generation(other, other.generation, FinishReason.ENDED)
        try:
            is_first = self._queues.add(request)
        except RequestError as error:
            self._refuse(request, error)
            return
        if is_first:
            self.start_next(request.sequence_id)

    def _fetch(self, request: StreamRequest) -> None:
        """Have a request answered with the tokens of its sequence's buffered generation."""
        queued = list(self._queues.get(request.sequence_id))
        live = self._instance.table.get(request.sequence_id)
        if live is None:
            queued += self._failed.get(request.sequence_id)
        try:
            reply = find_buffered_reply(request, queued, live)
            if reply.fetch(request.reply.channel):
                self._senders.enqueue(reply)
        except RequestError as error:
            self._refuse(request, error)

    def start_next(self, sequence_id: SequenceId) -> None:
        """Start the next request of a sequence; requests that cannot start are answered."""
        next_id: SequenceId | None = sequence_id
        while next_id is not None:  # a loop: in a long queue one may follow another very often
            next_id = self._start_first(next_id)

    def _start_first(self, sequence_id: SequenceId) -> SequenceId | None:
        """As `start_next`; returns a sequence whose request has lost its place in the queue."""
        while queued := self._queues.get(sequence_id):
            request = queued[0]
            if sequence_id in self._hand_over.leaving:
                return None  # `HandOver` starts it
            self._fetch_sequence(request)
            if request.is_preparing:
                return None  # `start_prepared` follows
            request.take_restored()
            request.start_matching()
            if self._must_wait(request):
                if request.request.offered:
                    self._refuse(request, self._instance.table.no_free_slot())
                    self._queues.remove(request)
                    continue
                self._inherit_group(request)
                rejected = self._waiting.append(request)
                if rejected is not None:
                    text = f"{len(self._waiting)} requests wait for a slot; send it again later"
                    self._refuse(rejected, RequestError(Code.QUEUE_FULL, text, retryable=True))
                if rejected is not request:
                    self._watcher.add(request, request.reply)
                    if rejected is None:
                        return None
                    self._queues.remove(rejected)
                    return rejected.sequence_id
            elif self._admit(request):
                return None
            if request.matcher is not None:
                self._masks.discard(request)
            self._queues.remove(request)
        return None

    def _fetch_sequence(self, request: StreamRequest) -> None:
        """Let the sequence of a START be read from the store, if it asks for it and is not live."""
        snapshots, asked = self._snapshots, request.request
        if snapshots is None or request.restored is not None or not asked.asks_to_restore:
            return
        if asked.restored is not None:
            return
        if request.validated.refusal is not None or request.key_digest is None or asked.offered:
            return
        if self._instance.table.get(request.sequence_id) is None:
            request.restored = snapshots.fetch(request.sequence_id, request.key_digest)
            start = partial(self.start_prepared, request)
            request.restored.add_done_callback(lambda _: self.call(start))

    def start_prepared(self, request: StreamRequest) -> None:
        """Start a request with all that it waited for, if it is the next of its sequence.

        That is a compiled grammar, or a sequence from the store. On the loop's thread. The request
        has started before if it had all when it arrived here.
        """
        started = request.active is not None or request in self._waiting
        queued = self._queues.get(request.sequence_id)
        if queued and queued[0] is request and not started:
            self.start_next(request.sequence_id)

    def _remove(self, request: StreamRequest) -> None:
        """Remove a request that has been answered and start the next one of its sequence."""
        self._watcher.remove(request)
        if request.matcher is not None:
            self._masks.discard(request)
        if self._queues.remove(request):
            self.start_next(request.sequence_id)

    def _on_cancelled(self, request: StreamRequest) -> None:
        if request not in self._queues:
            return  # it has finished
        if isinstance(request.reply, ScheduleReply):
            self._cancel_schedule(request)
            return
        if request.generation is None:
            if request in self._waiting:  # a step that runs is not stopped
                self._waiting.remove(request)
                text = "it was cancelled while it waited for a slot; nothing was changed"
                self._refuse(request, RequestError(Code.CANCELLED, text, retryable=True))
                self._remove(request)
            return
        if request.active is not None:
            self._instance.table.end(request.active.sequence, EndReason.CANCELLED)
        self._finish_generation(request, request.generation, FinishReason.CANCELLED)

    # Slots

    def _needs_slot(self, request: StreamRequest) -> bool:
        """Whether it is a START that takes a slot, and not one that is refused anyway."""
        if not request.request.start or request.only_ends:
            return False
        is_live = self._instance.table.get(request.sequence_id) is not None
        return not is_live and self._instance.can_start(request.validated)

    def _must_wait(self, request: StreamRequest) -> bool:
        """Whether it needs a slot and has to wait for one.

        A generation waits where no slot is free. A step waits only behind requests that wait
        already, which would otherwise get every slot before it; else it is refused at once, as the
        steps of a `step` model are.
        """
        if not self._needs_slot(request):
            return False
        if not self._instance.table.num_free:
            self._instance.table.reclaim_idle()
        if self._waiting.size:
            return True
        return request.generation is not None and not self._instance.table.num_free

    def _inherit_group(self, request: StreamRequest) -> None:
        """Let a START that copies a sequence wait in that one's group, unless it names its own."""
        validated = request.validated
        if validated.source is None or GROUP in validated.request.parameters:
            return
        source = self._instance.table.find(validated.source)
        if source.group is not None:
            parameters = {**validated.request.parameters, GROUP: source.group}
            validated.request = replace(validated.request, parameters=parameters)

    def _admit(self, request: StreamRequest) -> bool:
        """Give a request its sequence and schedule it. False: it has been answered instead."""
        try:
            if request.only_ends:
                self._instance.end_sequence(request.validated)
                self._responses.add_outputs(request, {})
                return False
            active = request.active = self._instance.admit_validated(request.validated)
        except RequestError as error:
            self._refuse(request, error)
            return False
        request.reply.num_reused_tokens = active.num_reused_tokens
        if active.sequence.restored:
            self._continue_text(request, active)
        if request.generation is not None:
            capacity = self._instance.manifest.capacity
            used = active.sequence.length + active.num_tokens
            request.generation.set_room(None if capacity is None else capacity - used)
        if isinstance(request.reply, ScheduleReply) and isinstance(
            context := active.sequence.driver_state, list
        ):
            request.reply.context = context
        if request.matcher is None:
            self._scheduler.add(request)
        else:
            assert active.adjustments is not None
            request.matcher.advance(active.adjustments.generated)
            self._masks.add(request)
        return True

    def _continue_text(self, request: StreamRequest, active: ActiveRequest) -> None:
        """Let the text of the first generation of a restored sequence go on behind its tokens."""
        active.sequence.restored = False
        generation, io = request.generation, self._instance.program.decoder_io
        if generation is None or io is None:
            return
        fed = active.inputs[io[0]].tolist()  # with the pending token
        prompt = [*active.sequence.token_ids[-MAX_CONTEXT:], *fed]
        request.reply.continue_text(prompt)
        generation.continue_text(prompt)

    def _admit_waiting(self) -> None:
        """Give free slots to the requests that wait for one."""
        while self._waiting.size and self._instance.table.num_free:
            request = self._waiting.popleft()
            if not self._admit(request):
                self._remove(request)

    # Steps

    def _step(self) -> None:
        """Run one step and route its outputs."""
        if self._calls is not None:
            self._call(self._calls)
            return
        result = self._pipeline.step()
        outputs, tokens = result.outputs, list[int]()
        if self._token_output in outputs:
            tokens = outputs[self._token_output].numpy().ravel().tolist()
        has_steps = any(request.generation is None for request in result.requests)
        answers = split_outputs(result.rows, outputs) if has_steps else []
        for row, (request, active) in enumerate(zip(result.requests, result.rows, strict=True)):
            if active.dropped:
                continue
            generation = request.generation
            if active.error is not None:
                self._finish_step(request, active.error)
            elif active.num_computed_tokens < active.num_tokens:
                continue  # more chunks of its prompt are to come
            elif generation is None:
                self._finish_step(request, answers[row])
            else:
                last = self._add_tokens(request, active, generation, tokens)
                if last is None:
                    continue
                active.feed(last)
                if self._snapshots is not None:
                    self._snapshots.write_if_due(active.sequence, last)
                if row >= result.num_decodes:
                    self._scheduler.start_decoding(request)

    def _add_tokens(
        self,
        request: StreamRequest,
        active: ActiveRequest,
        generation: GenerationState,
        tokens: list[int],
    ) -> int | None:
        """Add the tokens that a step has sampled for a generation.

        Args:
            request, active, generation: the generation.
            tokens: by row of the outputs.

        Returns:
            The last of them; None if the generation has ended, or waits for its next mask.
        """
        outputs, row = active.step_outputs
        rows = active.accepted_rows or (row,)
        for index, row in enumerate(rows):
            active.step_outputs = outputs, row
            try:
                text, reason = generation.append(tokens[row])
            except TokenizerError as error:
                self._fail_generation(request, backend_failure(error), EndReason.ENGINE_FAILED)
                return None
            self._responses.add_token(request, generation, text)
            if request.matcher is not None:  # its next mask is not known: nothing is drafted
                self._follow_grammar(request, generation, reason)
                return None
            if reason is not None:
                if unused := len(rows) - 1 - index:
                    active.sequence.roll_back(active.sequence.length - unused)
                self._finish_generation(request, generation, reason)
                return None
        return tokens[row]

    # Grammars

    def _follow_grammar(
        self, request: StreamRequest, generation: GenerationState, reason: FinishReason | None
    ) -> None:
        """Ask for the next mask of a generation after its last token; or finish it."""
        if reason in (FinishReason.EOS, FinishReason.STOP):
            self._finish_generation(request, generation, reason)
            return
        assert request.matcher is not None
        assert request.active is not None
        assert generation.last_token is not None
        self._scheduler.remove(request)
        request.matcher.advance([generation.last_token])
        request.active.feed(generation.last_token)
        self._masks.add(request, reason)

    def _receive_masks(self) -> None:
        """Let the generations go on whose masks have arrived. Does not wait."""
        if self._masks.pending:
            self._on_masks(self._masks.receive())

    def _on_masks(self, ready: list[Ready]) -> None:
        for request, following, reason in ready:
            active, generation = request.active, request.generation
            assert active is not None
            assert active.adjustments is not None
            assert generation is not None
            if following.error is not None:
                self._fail_generation(request, following.error, EndReason.GRAMMAR)
            elif following.mask is None:
                self._finish_generation(request, generation, FinishReason.STOP)
            elif reason is not None:
                self._finish_generation(request, generation, reason)
            elif active.adjustments.set_mask(following.mask):
                self._scheduler.add(request)
                if self._snapshots is not None and generation.last_token is not None:
                    self._snapshots.write_if_due(active.sequence, generation.last_token)
            elif following.may_end:
                self._finish_generation(request, generation, FinishReason.STOP)
            else:
                self._fail_generation(request, no_token_left(), EndReason.GRAMMAR)

    # Schedules

    def _call(self, calls: CallQueue) -> None:
        """Call a program and route its outputs."""
        for request in calls.call():
            active, reply = request.active, request.reply
            assert active is not None
            if active.error is not None:
                if isinstance(reply, ScheduleReply):
                    active.sequence.driver_state = reply.context
                self._finish_step(request, active.error)
            elif isinstance(reply, ScheduleReply):
                self._send_tokens(request, active, reply)
            elif active.finished:
                self._finish_step(request, active.outputs)

    def _send_tokens(
        self, request: StreamRequest, active: ActiveRequest, reply: ScheduleReply
    ) -> None:
        """Send what a call has produced; at the end of the schedule, all its outputs."""
        progress, sequence = active.progress, active.sequence
        assert progress is not None
        first = progress.num_tokens == 0
        if tokens := progress.take_tokens():
            self._responses.add_tokens(request, tokens, first=first)
            context = sequence.driver_state if isinstance(sequence.driver_state, list) else []
            sequence.driver_state = [*context, *tokens[reply.text_from]][-MAX_CONTEXT:]
        if not active.finished:
            return
        self._scheduler.remove(request)
        self._instance.finish(active)
        reason = FinishReason.LENGTH if progress.limited else FinishReason.DONE
        outputs = {
            name: tensor for name, tensor in active.outputs.items() if name not in progress.tokens
        }
        self._responses.add_end(request, reason, outputs, progress.num_tokens)
        self._remove(request)

    def _cancel_schedule(self, request: StreamRequest) -> None:
        """End a request whose client has gone. A sequence between two calls of it ends too."""
        active, num_tokens = request.active, 0
        if active is not None:
            assert active.progress is not None
            active.dropped, num_tokens = True, active.progress.num_tokens
            self._scheduler.remove(request)
            self._instance.table.end(active.sequence, EndReason.CANCELLED)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._responses.add_end(request, FinishReason.CANCELLED, {}, num_tokens)
        self._remove(request)

    def _finish_step(self, request: StreamRequest, answer: Answer | None) -> None:
        """Answer a request with the outputs of a step or with the error of the engine."""
        assert request.active is not None
        assert answer is not None
        self._scheduler.remove(request)
        self._instance.finish(request.active)
        if isinstance(answer, RequestError):
            self._refuse(request, answer)
        else:
            self._responses.add_outputs(request, answer)
        self._remove(request)

    def _finish_generation(
        self, request: StreamRequest, generation: GenerationState, reason: FinishReason
    ) -> None:
        """Finish a generation. Its last token, which no step has consumed, becomes pending."""
        active = request.active
        if active is not None:
            active.dropped = True
            self._scheduler.remove(request)
            sequence, reply = active.sequence, request.reply
            sequence.pending_token = (
                generation.last_token if generation.num_tokens else active.pending_token
            )
            sequence.driver_state = reply if isinstance(reply, BufferedReply) else None
            self._instance.finish(active)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._responses.add_finish(request, generation, reason)
        self._remove(request)

    def _fail_generation(
        self, request: StreamRequest, error: RequestError, reason: EndReason
    ) -> None:
        """Answer a generation with an error and end its sequence; the others of the step go on."""
        assert request.active is not None
        request.active.dropped = True
        self._instance.table.end(request.active.sequence, reason)
        self._finish_step(request, error)

    # Shutdown, and sequences that go on in another server. These run on the loop's thread.

    def hand_over(self) -> None:
        """Store the sequences that may be stored, then end them; those that run after their step.

        Begins what threads have room for, and the rest when called again.
        """
        self._hand_over.advance()

    def stop_generation(self, request: StreamRequest) -> None:
        """Stop a generation whose sequence ends for another server; the caller answers it."""
        assert request.active is not None
        request.active.dropped = True
        self._scheduler.remove(request)
        self._masks.discard(request)

    def answer(self, request: StreamRequest, error: RequestError) -> None:
        """Answer a request with an error, and start the next one of its sequence."""
        self._refuse(request, error)
        self._remove(request)

    def end_idle(self, seconds: float) -> None:
        """End the sequences that have had no request for so many seconds."""
        table = self._instance.table
        for request in self._queues.all():
            # A generation whose tokens are fetched: its client has gone.
            if isinstance(request.reply, BufferedReply) and request.reply.unfetched_for(seconds):
                assert request.generation is not None
                self._finish_generation(request, request.generation, FinishReason.ENDED)
        for sequence in table.idle_for(seconds):
            if not self._queues.get(sequence.id):
                table.end(sequence, EndReason.SHUTDOWN)

    def stop_running(self, error: RequestError) -> None:
        """Answer every request with this error and end all sequences."""
        self._hand_over.finish()
        self._fail_all(error, EndReason.SHUTDOWN)
        for sequence in self._instance.table.idle_for(0.0):
            self._instance.table.end(sequence, EndReason.SHUTDOWN)

    # Errors

    def _refuse(self, request: StreamRequest, error: RequestError) -> None:
        self._watcher.remove(request)
        self._failed.add(request)
        self._responses.add_error(request, error)

    def _fail_all(self, error: RequestError, reason: EndReason) -> None:
        """Answer every request with an error; sequences with a running request end."""
        self._pipeline.drain()
        requests = self._queues.clear()
        self._masks.discard_all(requests)
        self._waiting.clear()
        self._scheduler.clear()
        for request in requests:
            self._refuse(request, error)
            if request.request.end:
                self._instance.forget_stored(request.request, request.key_digest)
            active = request.active
            if active is None:
                continue
            if self._instance.table.get(request.sequence_id) is active.sequence:
                self._instance.table.end(active.sequence, reason)
