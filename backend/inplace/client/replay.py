"""What a client keeps of its sequences, and how it restores them on another server."""

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from tritonclient.utils import InferenceServerException

from inplace.client.errors import ClientError, SequenceLostError, UnreachableError
from inplace.client.requests import (
    Array,
    InferRequest,
    ModelMetadata,
    ParameterArgument,
    Segment,
    SequenceRequest,
    check_no_nul,
    check_parameters,
    check_sequence_id,
    encode_parameters,
    step_request,
)
from inplace.errors import Code, restored_position
from inplace.protocol import (
    AUDIO,
    AUDIO_INT16,
    CACHE_SALT,
    FROM,
    GROUP,
    INPUT_IDS,
    INVALID_POSITION,
    MAX_TOKENS,
    POSITION,
    RESTORE,
    SEQUENCE_KEY,
    TEXT,
)

RECENT_POSITIONS = 8
"""Positions whose requests are kept beside those that a snapshot may lack."""


NOT_RESTORED = frozenset(
    {Code.NO_SNAPSHOT, Code.BAD_SNAPSHOT, Code.POSITION, Code.BAD_PARAMETER, Code.SEQUENCE_KEY}
)
"""Codes of servers that cannot restore a sequence."""


class SequenceTracker:
    """What a client knows of one sequence. It makes requests and classifies errors, without I/O.

    A START sets a random key. Every later request carries it, and the position at which the client
    expects the sequence. A step without an answer is sent again with START, key and position; the
    backend runs it as a step of the live sequence if that is at this position. If it is not,
    everything sent so far is sent again from the beginning: tokens as one prompt.

    Where the servers store sequences, a sequence that is lost is restored first: the same request
    with ``restore``. If it was stored at an earlier position, what comes after that is sent again.
    Only if no server has stored it, everything is sent again: the tokens, or the requests since the
    beginning of a sequence that is too young to be stored.

    Args:
        sequence_id: the correlation id; a random one if None.
        key: the key; a new random one for each sequence if None; none is sent if empty.
        replay: keep the history that a replay needs.
        group: the parameter ``group`` of its generations; none if empty.

    Raises:
        ValueError: Triton would not take the id or the key as it is.

    Attributes:
        length: positions that the sequence has on the server, a token that is still to be fed
            included; None after a text, whose number of tokens the client does not know.
        live: the server holds the sequence, as far as the client knows.
        needs_end: the server may hold something for it that an END frees: a slot of the backend, or
            Triton's own entry for a sequence whose START the backend refused.
    """

    def __init__(
        self, sequence_id: int | str | None, key: str | None, replay: bool, group: str = ""
    ) -> None:
        if sequence_id is not None:
            check_sequence_id(sequence_id)
        check_no_nul("the key", key or "")
        self._group = group
        self.sequence_id: int | str = (
            sequence_id if sequence_id is not None else secrets.randbits(63) or 1
        )
        self._route = self.sequence_id
        self.length: int | None = 0
        self._fixed_key, self._replay = key, replay
        self._stores = False  # as far as is known
        self._last_inputs: dict[str, Array] = {}
        self._num_changes = 0  # how often the server's state may have changed
        self.reset()

    def reset(self) -> None:
        """The next request begins a new sequence."""
        self.key = secrets.token_urlsafe(16) if self._fixed_key is None else self._fixed_key
        self.live = self.needs_end = False
        self._unanswered = False  # the last step had no answer
        self._num_changes += 1
        self._source: tuple[SequenceTracker, int] | None = None
        self._cache_salt: ParameterArgument | None = None  # of the START, also of a replay's
        self._history: list[Segment] | None = [] if self._replay else None
        self._restoring = False  # the next request asks for a snapshot
        self._restored_at: int | None = None  # the position of one that was restored
        self._restarting = False  # the next request sends `_recent` from the beginning
        self._recent: deque[tuple[int, SequenceRequest]] = deque()  # without history, by position

    def fork(self, sequence_id: int | str | None) -> "SequenceTracker":
        """The tracker of a copy of this sequence, whose first request lets the server copy it.

        If that one is gone by then, or has had another request, the copy is made by a replay.

        Args:
            sequence_id: of the copy; a random one if None.

        Raises:
            ValueError: this sequence has no key, or the id is not allowed.
        """
        if not self.key:
            raise ValueError("a sequence without a key cannot be copied: give it one")
        copied = SequenceTracker(sequence_id, self._fixed_key, self._replay, self._group)
        if copied.sequence_id == self.sequence_id:
            raise ValueError(f"a copy of sequence {self.sequence_id!r} needs an id of its own")
        copied.key, copied.length, copied._route = self.key, self.length, self._route
        copied._cache_salt = self._cache_salt
        copied._history = None if self._history is None else self._extended_history()
        copied._source = (self, self._num_changes) if self.live else None
        return copied

    @property
    def _source_id(self) -> int | str | None:
        """The sequence that the server can copy for the first request; None without one."""
        if self._source is None:
            return None
        source, num_changes = self._source
        unchanged = source.live and source._num_changes == num_changes
        return source.sequence_id if unchanged and source.key == self.key else None

    @property
    def movable(self) -> bool:
        """Whether another server can take the sequence over."""
        has_state = self.live or self._source is not None
        return not has_state or self._history is not None or self.may_restore

    @property
    def may_restore(self) -> bool:
        """Whether a server may have stored the sequence."""
        return self._stores and bool(self.key) and self._source is None

    @property
    def _no_replay_reason(self) -> str:
        return (
            "its inputs are not tokens, so the client kept none to replay"
            if self._replay
            else "replay is off"
        )

    @property
    def restores(self) -> bool:
        """Whether the next request asks for a snapshot, or goes on with a restored sequence."""
        return self._restoring or self._restored_at is not None

    def infer_requests(
        self,
        request: SequenceRequest,
        model: ModelMetadata,
        prefix: Sequence[Segment] = (),
        num_fed: int = 0,
    ) -> list[InferRequest]:
        """The requests to send now, in order; the last one's answer is the answer to ``request``.

        Args:
            request: what the caller asked for.
            model: the model.
            prefix: what a new sequence needs before ``request`` and after the history.
            num_fed: how many of its tokens a server had before, if it goes on with a generation.

        Raises:
            SequenceLostError: it should begin as a copy of a sequence that is not as it was, and
                there is no history.
        """
        if self._restarting:
            return self._from_beginning(request, model)
        if self._restored_at is not None:
            if (missing := self._missing(request, model, self._restored_at, num_fed)) is not None:
                return missing
            if self._history is None:
                raise self._lost_error(
                    f"it was restored at position {self._restored_at}, and what comes after that"
                    " was not kept"
                )
            self._restoring, self._restored_at, self.live = False, None, False
        if self._restoring:
            asked = None if prefix else self._restore_request(request, model, num_fed)
            if asked is not None:
                return [asked]
            self._restoring = False
        if self.live:
            resume = self._unanswered and bool(self.key and self.length)
            return [self._infer_request(request, model, self.length, start=resume)]
        if (source := self._source_id) is not None and not prefix:
            copying = replace(request, parameters={**request.parameters, FROM: source})
            return [self._infer_request(copying, model, self.length, start=True)]
        if self._source is not None and self._history is None:
            raise self._source_lost()
        self._source = None
        parameters = dict(request.parameters)
        begun = self._cache_salt if self._history else None
        self._cache_salt = parameters.pop(CACHE_SALT, begun)
        request = replace(request, parameters=parameters)
        requests: list[InferRequest] = []
        position: int | None = 0
        for part in _with_history(self._extended_history(prefix), request):
            requests.append(self._infer_request(part, model, position, start=not requests))
            position = _next_position(position, part, model)
        return requests

    def _restore_request(
        self, request: SequenceRequest, model: ModelMetadata, num_fed: int
    ) -> InferRequest | None:
        """The request that lets a server restore the sequence; None if it cannot be named."""
        if not model.stores or not self.may_restore or self.length is None:
            return None
        position = self.length + num_fed
        if not position or (num_fed and INPUT_IDS not in request.inputs):
            return None
        if num_fed:
            request = request.without_first(num_fed)
        asking = replace(request, parameters={**request.parameters, RESTORE: True})
        return self._infer_request(asking, model, position, start=True)

    def _missing(
        self, request: SequenceRequest, model: ModelMetadata, restored_at: int, num_fed: int
    ) -> list[InferRequest] | None:
        """The requests that a sequence lacks which was restored at an earlier position.

        Returns:
            The last one is ``request``; None if that is not known.
        """
        if self.length is None or restored_at > self.length + num_fed:
            return None
        history = self._history
        if history is not None and INPUT_IDS in request.inputs:
            if any(isinstance(segment, str) for segment in history):
                return None
            tokens = [token for segment in history for token in segment]
            if len(tokens) != self.length:
                return None
            whole = request.with_prefix(cast(list[int], tokens))
            rest = whole.without_first(restored_at)
            return [self._infer_request(rest, model, restored_at, start=self._unanswered)]
        # Triton has forgotten a sequence whose END was refused: then the first one carries START.
        return self._recent_requests(request, model, restored_at, start=self._unanswered)

    def _recent_requests(
        self, request: SequenceRequest, model: ModelMetadata, begin: int, *, start: bool
    ) -> list[InferRequest] | None:
        """The requests that were kept from a position on, and this one; None if one is missing.

        Args:
            request: this one.
            model: the model.
            begin: the position.
            start: whether the first one carries START.
        """
        position, requests = begin, list[InferRequest]()
        for at, recent in self._recent:
            if at == position:
                first = start and not requests
                requests.append(self._infer_request(recent, model, at, start=first))
                position += model.num_positions(recent.inputs)
        if position != self.length:
            return None
        first = start and not requests
        return [*requests, self._infer_request(request, model, position, start=first)]

    def _from_beginning(self, request: SequenceRequest, model: ModelMetadata) -> list[InferRequest]:
        """All requests of a sequence that is younger than its first snapshot, and this one.

        Raises:
            SequenceLostError: not all were kept.
        """
        requests = self._recent_requests(request, model, 0, start=True)
        if requests is None:
            self._restarting = False
            raise self._lost_error(f"no server has stored it, and {self._no_replay_reason}")
        return requests

    def _keep_recent(self, position: int, request: SequenceRequest, model: ModelMetadata) -> None:
        """Keep a request that was answered, as long as a snapshot may be older than it."""
        self._recent.append((position, replace(request, request_id="")))
        oldest = position - 2 * model.snapshot_every - RECENT_POSITIONS
        while self._recent[0][0] < oldest:
            self._recent.popleft()

    def sending(self, request: InferRequest, model: ModelMetadata) -> None:
        """Record that a request is about to be sent."""
        self.needs_end = True
        self._num_changes += 1
        self._stores = model.stores
        self._last_inputs = {
            name: array[:1] if name in model.token_inputs else array
            for name, array in request.inputs.items()
        }
        if INPUT_IDS in model.token_inputs:
            self._last_inputs = {INPUT_IDS: np.zeros(1, dtype=np.int64)}

    def answered(
        self, request: SequenceRequest, model: ModelMetadata, generated: Sequence[int] = ()
    ) -> None:
        """Record that the last of `infer_requests` was answered.

        Args:
            request: what the caller asked for.
            model: the model.
            generated: the tokens of a generation, which are part of the sequence now.
        """
        position = self.length
        begins = not self.live and self._source is None
        if begins and not self._restoring and not self._restarting:
            history = self._extended_history()
            unknown = any(isinstance(segment, str) for segment in history)
            position = None if unknown else sum(map(len, history))
        unreplayable = request.segment is None or self._history is None
        if unreplayable and self._replay and self.may_restore and position is not None:
            self._keep_recent(position, request, model)
        position = _next_position(position, request, model)
        self.length = None if position is None else position + len(generated)
        self.live, self._unanswered, self._source = True, False, None
        self._restoring, self._restored_at, self._restarting = False, None, False
        if request.end:
            self.reset()
        elif self._history is not None:
            segment = request.segment
            self._history = (
                None
                if segment is None
                else _append(_append(self._history, segment), list(generated))
            )

    def failed(
        self, error: ClientError, request: InferRequest, *, partial: bool = False
    ) -> ClientError:
        """Update the state after an error, and decide whether the same request may be sent again.

        Args:
            error: the answer to the request.
            request: the request.
            partial: the request had responses before the error.

        Returns:
            The error to raise; ``retryable`` where the same request may succeed if it is sent
            again.
        """
        is_answer = error.from_backend and not isinstance(error, UnreachableError)
        if request.restores and is_answer and not partial:
            return self._not_restored(error)
        unreachable = isinstance(error, UnreachableError)
        unknown = isinstance(error, SequenceLostError)
        # a generation may have run further than its responses show; a backend that answers is being
        # unloaded
        gone = unreachable and (request.generates or error.from_backend)
        # Triton forgot the sequence, but the backend may still hold it
        forgotten = unknown and not error.from_backend and not request.start and self.live
        if forgotten and self.key and self.length:
            self._unanswered = error.retryable = True
        elif (
            unknown
            or error.code == Code.FENCED
            or gone
            or (partial and error.retryable)
            or (self._unanswered and error.code == Code.POSITION)
            or (self._source is not None and error.code in (Code.POSITION, Code.SEQUENCE_KEY))
        ):
            return self._lost(error)
        elif unreachable:
            self._unanswered = self.live
            if not self.movable:
                error.add_note(
                    f"The sequence cannot continue on another server: {self._no_replay_reason}."
                )
        elif self._source is None and (
            partial
            or request.end
            or (request.start and not self.live)
            or (error.code == Code.ENGINE_FAILED and not error.retryable)
        ):
            self.replay_next()
        return error

    def interrupted(self, request: InferRequest | None) -> None:
        """Record that the caller stopped waiting for the answer to a step."""
        if request is not None and not request.generates:
            self._unanswered = self.live

    def _lost(self, error: ClientError) -> ClientError:
        """The error to raise for a sequence that is lost: retryable if it can be replayed."""
        if not self.movable:
            return error.as_sequence_lost(self._no_replay_reason)
        self.replay_next(restore=True)
        error.retryable = True
        return error

    def _not_restored(self, error: ClientError) -> ClientError:
        """Update the state after a request that asked for a snapshot was refused."""
        if error.code == Code.POSITION:
            self._restored_at = restored_position(error.reason)
        if self._restored_at is not None:
            self.live, self.needs_end, error.retryable = True, True, True
        elif error.code in NOT_RESTORED:
            self._restoring = False
            if self._history is None and not (self._recent and self._recent[0][0] == 0):
                return error.as_sequence_lost(
                    f"no server has stored it, and {self._no_replay_reason}"
                )
            self._restarting = self._history is None
            self.replay_next()
            error.retryable = True
        return error

    def replay_next(self, *, restore: bool = False) -> None:
        """Let the next request replay the sequence, where there is a history.

        Without one it is sent as if the sequence were live, so that the server's own error is
        raised.

        Args:
            restore: let the server restore it first, if servers store sequences.
        """
        self._restored_at, self._restoring = None, restore and self.may_restore
        self._restarting = self._restarting and not self._restoring
        if self._history is not None or self._restoring:
            self.live = self._unanswered = False
            self._source = None

    def _source_lost(self) -> SequenceLostError:
        """The error of a copy whose source has changed, where nothing was kept to replay."""
        return self._lost_error(
            "the sequence to copy has had another request, or has ended, and it cannot be replayed:"
            f" {self._no_replay_reason}; send the first request of a copy before that"
        )

    def _lost_error(self, text: str) -> SequenceLostError:
        """The error of a sequence that is lost without a server's saying so."""
        return SequenceLostError(
            InferenceServerException(text),
            code=Code.UNKNOWN_SEQUENCE,
            reason=text,
            retryable=False,
            sequence=self.sequence_id,
            request="",
        )

    def end_request(self, model: ModelMetadata) -> InferRequest:
        """The request that frees what the server may hold.

        Triton takes no request without inputs, so this is an END with real inputs at an invalid
        position: the backend refuses the step and ends the sequence.
        """
        # Triton may have forgotten the sequence, and then it takes nothing but a START
        start = bool(self.key) and (self._unanswered or not self.live)
        inputs = {
            name: array[:0] if name in (AUDIO, AUDIO_INT16) else array
            for name, array in self._last_inputs.items()
        }
        end = SequenceRequest(inputs, end=True, parameters={POSITION: INVALID_POSITION})
        return self._infer_request(end, model, None, start=start)

    def release_request(self, model: ModelMetadata) -> InferRequest:
        """The END with which Triton forgets a sequence of an instance whose process has ended.

        Without START: a sequence that another instance has is not ended.
        """
        return replace(self.end_request(model), start=False)

    def stranger_requests(self, model: ModelMetadata) -> tuple[InferRequest, InferRequest]:
        """START and END of an id that nobody uses, to the same server."""
        end = replace(
            self.release_request(model), sequence_id=secrets.randbits(63) or 1, parameters={}
        )
        return replace(end, start=True, end=False, request_id=secrets.token_hex(4)), end

    def _extended_history(self, segments: Sequence[Segment] = ()) -> list[Segment]:
        """A copy of the history with more segments."""
        history = [
            segment.copy() if isinstance(segment, list) else segment
            for segment in self._history or []
        ]
        for segment in segments:
            history = _append(history, segment)
        return history

    def _infer_request(
        self, request: SequenceRequest, model: ModelMetadata, position: int | None, *, start: bool
    ) -> InferRequest:
        own: dict[str, str | int] = {SEQUENCE_KEY: self.key} if self.key else {}
        if position is not None:
            own[POSITION] = position
        if self._group and MAX_TOKENS in request.parameters:
            own[GROUP] = self._group
        is_own = not {FROM, RESTORE} & request.parameters.keys()
        if start and self._cache_salt is not None and is_own:
            own |= encode_parameters({CACHE_SALT: self._cache_salt})
        made = InferRequest(
            sequence_id=self.sequence_id,
            start=start,
            end=request.end,
            inputs=request.inputs,
            parameters=own | encode_parameters(request.parameters),
            outputs=request.output_names(model),
            request_id=request.request_id or secrets.token_hex(4),
            route=self._route,
        )
        check_parameters(made)
        return made


def _with_history(history: Sequence[Segment], request: SequenceRequest) -> list[SequenceRequest]:
    """The history as steps of a new sequence, then the request.

    Tokens right before the request's own tokens become one prompt with them.
    """
    if not history:
        return [request]
    *before, last = history
    steps = [step_request(segment) for segment in before]
    if isinstance(last, list) and INPUT_IDS in request.inputs:
        return [*steps, request.with_prefix(last)]
    return [*steps, step_request(last), request]


def _append(history: list[Segment], segment: Segment) -> list[Segment]:
    """The history with one more segment; tokens after tokens are appended in place."""
    if history and isinstance(history[-1], list) and isinstance(segment, list):
        history[-1] += segment
        return history
    return [*history, segment] if segment else history


def _next_position(
    position: int | None, request: SequenceRequest, model: ModelMetadata
) -> int | None:
    """The position of a sequence after a request; None where it is unknown, as after a text."""
    if position is None or TEXT in request.inputs:
        return None
    return position + model.num_positions(request.inputs)
