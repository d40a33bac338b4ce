"""Admission: which sequence a request gets, and whether it fits. It needs no engine."""

from collections.abc import Callable
from dataclasses import replace
from time import monotonic

import numpy as np
import torch

from inplace.engines.arena import Arena
from inplace.errors import RESTORED, Code, LoadError, RequestError
from inplace.parameters import forwards_nothing, parse_parameters, prompt_outputs
from inplace.protocol import (
    FORGET,
    GROUP,
    LOGITS,
    LOGPROBS,
    PROMPT_LOGPROBS,
    PROMPT_OUTPUTS,
)
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.observer import Observer
from inplace.runtime.prefixes import PrefixCache
from inplace.runtime.prompt import PromptLogprobs
from inplace.runtime.requests import Request, ValidatedRequest, validate_inputs
from inplace.runtime.sampling import ScoreAdjustments
from inplace.runtime.slots import EndReason, SequenceState, SlotTable
from inplace.runtime.snapshots import SnapshotKeeper
from inplace.schema.prefixes import PrefixOptions
from inplace.schema.programs import Program
from inplace.schema.served import Manifest
from inplace.schema.snapshots import SnapshotOptions
from inplace.schema.specs import LOGPROB_ROLES, Update
from inplace.snapshots import SnapshotStore


class Admission:
    """Validates requests and gives them their sequences. Not thread-safe, except `validate`.

    Args:
        manifest: describes the engine.
        arena: the memory of its states.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        clock: monotonic seconds.
        prompt_program: runs the rows that ask for log-probabilities of fed tokens; None if there
            is none.

    Attributes:
        program: the program of a step.
        observer: counts and logs what happens.
        table: the live sequences.
        prefixes: free slots whose tokens are known; None where prefixes are not reused.
        snapshots: stores sequences outside of the server; None where they are not stored.
        is_forwarded: whether a parameter is a header that the server forwards, so that its name
            need not be known.
    """

    def __init__(
        self,
        manifest: Manifest,
        arena: Arena,
        idle_timeout: float,
        clock: Callable[[], float],
        prompt_program: Program | None,
    ) -> None:
        self.manifest = manifest
        self.program: Program = manifest.interface
        self.arena = arena
        self.observer = Observer(arena.slots, arena.bytes)
        self.table = SlotTable(arena.slots, idle_timeout, clock, self.observer)
        self.is_forwarded: Callable[[str], bool] = forwards_nothing
        self._clock = clock
        self._prompt_program = prompt_program
        outputs = self.program.outputs
        self._default_outputs = frozenset(spec.name for spec in outputs if not spec.on_request)
        self._optional_outputs = frozenset(
            spec.name for spec in outputs if spec.on_request and spec.role not in LOGPROB_ROLES
        )
        self._all_outputs = frozenset(spec.name for spec in outputs)
        prompt = frozenset(() if prompt_program is None else PROMPT_OUTPUTS)
        self._logprob_outputs = prompt.union(
            spec.name for spec in outputs if spec.role in LOGPROB_ROLES
        )
        io = self.program.decoder_io
        # What penalties count, where the program has them, and prefixes are found by.
        self._counted_input = io[0] if io is not None and self.program.max_adjusted else None
        self.prefixes: PrefixCache | None = None
        self.snapshots: SnapshotKeeper | None = None
        self._appends_only = all(state.update is Update.APPEND for state in manifest.states)

    def store_sequences(self, options: SnapshotOptions, store: SnapshotStore) -> None:
        """Store sequences with a key outside of the server; before the first request."""
        io = self.program.decoder_io
        if io is not None:
            self._counted_input = io[0]  # a snapshot has the tokens
        self.snapshots = SnapshotKeeper(
            store, options, self.arena, self.manifest, self.observer, self._used_length
        )
        self.observer.forward_to(self.snapshots)

    def reuse_prefixes(self, options: PrefixOptions, secret: bytes | None = None) -> None:
        """Let prompts use what earlier ones have computed; before the first request.

        Args:
            options: what the operator has set.
            secret: makes salts, the same in all servers that a sequence may go to; random if None.

        Raises:
            LoadError: the model is not a language model of one program, has a draft, or its tokens
                see later ones, so that states depend on which tokens were fed together.
        """
        io = self.program.decoder_io
        drafts = self.manifest.decode_schedule is not None
        if io is None or self.manifest.is_scheduled or drafts or self.program.lookahead:
            raise LoadError(
                "config.pbtxt: prefixes are reused in language models without a draft whose tokens "
                "see earlier ones alone, and this model is none: leave prefix_reuse out"
            )
        self._counted_input = io[0]
        self.prefixes = self.table.kept = PrefixCache(
            options, self.arena.slots, appends_only=self._appends_only, clock=self._clock,
            secret=secret,
        )  # fmt: skip
        self.observer.watch_kept(self.prefixes)

    def admit(self, request: Request) -> ActiveRequest:
        """Admit a request: `validate` and `admit_validated`."""
        return self.admit_validated(self.validate(request))

    def validate(self, request: Request, *, allow_empty: bool = False) -> ValidatedRequest:
        """Check everything about a request that does not depend on its sequence. Thread-safe.

        Args:
            request: a step, or a generation whose text has been tokenized.
            allow_empty: whether its input may have no tokens, see `validate_inputs`.

        Raises:
            RequestError: its ``sequence_key`` is invalid. Other errors are the ``refusal`` of what
                is returned, because START and END of such a request still take effect.
        """
        names = request.parameters.keys()
        key_digest = request.key_digest() if names else None
        try:
            if request.refusal is not None:
                raise request.refusal
            _check_sequence_id(request)
            if names:
                parse_parameters(request.parameters, request.kind, self.is_forwarded)
            inputs, num_tokens = validate_inputs(
                self._interface(request),
                request.inputs,
                request.parameters,
                allow_empty=allow_empty,
                last=request.end,
            )
            validated = ValidatedRequest(
                request, key_digest, inputs, num_tokens, requested_outputs=self._outputs(request)
            )
            if not names:
                self._check_logprob_outputs(request, frozenset())
                return validated
            sampling_params = request.sampling_params(self.program)
            if not sampling_params.is_greedy:  # else GREEDY itself: its batches form faster
                validated.sampling_params = sampling_params
                validated.requested_outputs |= sampling_params.outputs
            validated.prompt_logprobs = request.prompt_logprobs(self._prompt_program)
            self._check_logprob_outputs(
                request, sampling_params.outputs.union(prompt_outputs(validated.prompt_logprobs))
            )
            validated.position = request.position()
            validated.source = request.source()
            validated.cache_salt = request.cache_salt()
            request.forgets()
            if request.restores() and self.snapshots is None:
                raise RequestError(
                    Code.NO_SNAPSHOT,
                    "this server stores no sequences (snapshot_store): START without 'restore' and"
                    " send all tokens again",
                )
        except RequestError as error:
            return ValidatedRequest(request, key_digest, refusal=error)
        return validated

    def _interface(self, request: Request) -> Program:
        """What a request takes."""
        return self.program

    def _outputs(self, request: Request) -> frozenset[str]:
        """The outputs of a step: those that need no asking, and those that are asked for.

        An output is asked for by name or by a parameter of its name. The parameter decides where
        both are there, so that a client which names all outputs can leave one out.
        Log-probabilities are only asked for by their parameter.

        Raises:
            RequestError: BAD_PARAMETER, the parameter asks for an output that the model lacks.
        """
        requested, parameters = request.requested_outputs, request.parameters
        if requested is None and LOGITS not in parameters:
            return self._default_outputs
        asked = {
            name
            for name in self._optional_outputs
            if (request.flag(name) if name in parameters else name in (requested or ()))
        }
        if LOGITS not in self._optional_outputs and request.flag(LOGITS):
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {LOGITS!r} asks for an output that this model does not have; it has"
                f" {sorted(self._default_outputs)}",
            )
        return self._default_outputs | asked

    def _check_logprob_outputs(self, request: Request, asked: frozenset[str]) -> None:
        """Refuse a request that names log-probabilities which it does not ask for.

        Triton passes on a request that names no outputs as if it named all of the model's.

        Args:
            request: the request.
            asked: the outputs that its parameters ask for.

        Raises:
            RequestError: BAD_OUTPUT.
        """
        named = request.requested_outputs
        if named is None or named >= self._all_outputs:
            return
        if missing := sorted((named & self._logprob_outputs) - asked):
            needed = sorted({PROMPT_LOGPROBS if n in PROMPT_OUTPUTS else LOGPROBS for n in missing})
            raise RequestError(
                Code.BAD_OUTPUT,
                f"the outputs {missing} need the parameters {needed}, above 0 for the most likely"
                f" tokens: send them, or do not name these outputs",
            )

    def admit_validated(self, validated: ValidatedRequest) -> ActiveRequest:
        """Give a request its sequence; after this, only the engine can make it fail.

        A START resets: a live sequence with its id ends. But with the key of the live sequence and
        a position above 0 it continues that sequence, because Triton forgets sequences that are
        alive here and then accepts only a START. With ``from`` the new sequence is a copy of that
        one. A refused START leaves no slot, a refused END frees its slot; every other refusal, and
        one for the key, changes nothing.

        Raises:
            RequestError: why it is refused.
        """
        request = self._apply_start(validated)
        restored = validated.request.restored is not None
        try:
            if validated.refusal is not None:
                raise validated.refusal
            source = self._source(validated)
            sequence = None if request.start else self.table.find(request.sequence_id)
            self._check_tokens(validated, sequence or source)
            adjustments = self._adjustments(validated, sequence or source)
            if sequence is None:
                sequence = self._start(validated, source)
            elif self.snapshots is not None and not request.end:
                self.snapshots.write_if_due(sequence, sequence.pending_token)
        except RequestError as error:
            live = self.table.get(request.sequence_id)
            if restored and live is not None and error.code is Code.POSITION:
                raise self._restored_elsewhere(live) from None
            if request.end and live is not None:
                self._forget_if_asked(request, live)
                self.table.end(live)
            elif request.end:
                self.forget_stored(request, validated.key_digest)
            raise
        sequence.busy = True
        self._forget_if_asked(request, sequence)
        self.observer.request_admitted(monotonic() - request.arrival_time)
        active = ActiveRequest(
            request,
            sequence,
            validated.inputs,
            validated.num_tokens,
            sequence.length,
            validated.sampling_params,
            adjustments,
            validated.requested_outputs,
        )
        if validated.prompt_logprobs is not None:
            assert self.program.decoder_io is not None
            active.prompt_logprobs = PromptLogprobs(
                validated.inputs[self.program.decoder_io[0]],
                validated.prompt_logprobs,
                pending=sequence.pending_token is not None,
            )
        if request.start and source is None and sequence.length:
            self._skip_prefix(active)
        self._prepend_pending_token(active)
        if self.snapshots is not None:
            sequence.num_prompt_tokens = sequence.length + active.num_tokens
        active.end_position = sequence.length + active.num_tokens + validated.max_new_tokens
        return active

    def forget_stored(self, request: Request, key_digest: bytes | None) -> None:
        """Delete what is stored of the sequence of a refused END, which is not live here.

        Unless its client may still send the request to another server, which restores the sequence.
        """
        if self.snapshots is not None and not request.may_go_on_elsewhere:
            self.snapshots.forget(request.sequence_id, key_digest)

    @staticmethod
    def _restored_elsewhere(sequence: SequenceState) -> RequestError:
        """The error of a START whose sequence was restored at another position."""
        return RequestError(
            Code.POSITION,
            f"{RESTORED}{sequence.position}, which is not that of the request; it lives: send what"
            f" comes after that position",
        )

    def _restore(self, validated: ValidatedRequest) -> Request:
        """Give the sequence that was read from the store a slot; the request goes on with it.

        A sequence that is ahead of its client is cut back, if its states only append.

        Raises:
            RequestError: NO_FREE_SLOT.
        """
        request, restored = validated.request, validated.request.restored
        assert restored is not None
        snapshot = restored.snapshot
        sequence = self.table.start(request.sequence_id, validated.key_digest, lease=restored.lease)
        sequence.restore(snapshot)
        used = self._used_length(sequence)
        self.arena.restore_used(sequence.slot, snapshot.states, used)
        position = validated.position
        known = min(len(sequence.token_ids), sequence.position - 1)
        if self._appends_only and position is not None and 0 < position <= known:
            self._cut_back(sequence, position, pending=not validated.num_tokens)
            restored.lease.stored_at = position
        return replace(request, start=False)

    def _cut_back(self, sequence: SequenceState, position: int, *, pending: bool) -> None:
        """Forget what a sequence has behind a position.

        Args:
            sequence: the sequence, whose states only append.
            position: the position, of which all tokens are known.
            pending: leave the last token to be fed, because the request brings none.
        """
        last = sequence.token_ids[position - 1]
        sequence.roll_back(position - pending)
        sequence.pending_token = last if pending else None

    def _source(self, validated: ValidatedRequest) -> SequenceState | None:
        """The sequence that a START begins as a copy of; None without the parameter ``from``.

        Raises:
            RequestError: UNKNOWN_SEQUENCE, SEQUENCE_KEY or SEQUENCE_BUSY.
        """
        if validated.source is None:
            return None
        source = self.table.find(validated.source)
        source.check_copy(validated.key_digest)
        return source

    def _start(self, validated: ValidatedRequest, source: SequenceState | None) -> SequenceState:
        """Begin a sequence, empty or as a copy.

        Raises:
            RequestError: NO_FREE_SLOT.
        """
        if source is not None:
            self.table.touch(source)  # or it might be reclaimed to make room for its copy
        request = validated.request
        if source is None and self.prefixes is not None:
            return self._start_with_prefix(validated, self.prefixes)
        sequence = self.table.start(request.sequence_id, validated.key_digest)
        sequence.group = request.parameters.get(GROUP)
        if source is None:
            self.arena.reset(sequence.slot)
        else:
            self.arena.copy(source.slot, sequence.slot, self._used_length(source))
            sequence.copy_from(source)
        return sequence

    def _start_with_prefix(
        self, validated: ValidatedRequest, prefixes: PrefixCache
    ) -> SequenceState:
        """Begin a sequence with the states of the first tokens of its prompt, if a slot has them.

        Raises:
            RequestError: NO_FREE_SLOT.
        """
        request, prefix = validated.request, None
        salt = prefixes.salt(validated.key_digest, validated.cache_salt)
        self.table.reclaim_idle()
        computes_all = validated.prompt_logprobs is not None
        if salt is not None and not computes_all and validated.num_tokens > 1:
            assert self._counted_input is not None
            prompt = validated.inputs[self._counted_input].numpy().astype(np.int32)
            prefix = prefixes.find(salt, prompt, self.table.live)
        slot = None if prefix is None or prefix.kept is None else prefixes.take(prefix.kept)
        sequence = self.table.start(request.sequence_id, validated.key_digest, slot)
        sequence.group, sequence.salt = request.parameters.get(GROUP), salt
        if salt is not None and prefixes.on_tokens is not None:
            assert self._counted_input is not None
            prefixes.on_tokens(salt, validated.inputs[self._counted_input].tolist())
        if prefix is None:
            self.arena.reset(sequence.slot)
            return sequence
        self.arena.copy(prefix.slot, sequence.slot, prefix.length)
        sequence.length = prefix.length
        sequence.token_ids.frombytes(prompt[: prefix.length].tobytes())
        self.observer.prefix_reused(prefix.length, copied=prefix.slot != sequence.slot)
        return sequence

    def _skip_prefix(self, active: ActiveRequest) -> None:
        """Feed only the tokens of a prompt whose states are not there yet."""
        assert self._counted_input is not None
        reused = active.sequence.length
        active.inputs = {self._counted_input: active.inputs[self._counted_input][reused:]}
        active.num_tokens -= reused
        active.num_reused_tokens = reused

    @staticmethod
    def _forget_if_asked(request: Request, sequence: SequenceState) -> None:
        try:
            forgets = request.end and request.flag(FORGET)
        except RequestError:  # it is refused, and its END takes effect; then nothing is kept
            forgets = True
        if forgets:
            sequence.salt = None

    def _used_length(self, sequence: SequenceState) -> int | None:
        """The positions of the states that append which a sequence uses; None if not known."""
        return sequence.length if self.manifest.decode_schedule is None else None

    def _adjustments(
        self, validated: ValidatedRequest, sequence: SequenceState | None
    ) -> ScoreAdjustments | None:
        """The scores that a request adjusts; None for none.

        Raises:
            RequestError: BAD_PARAMETER, as `ScoreAdjustments`.
        """
        params = validated.sampling_params
        if not params.adjusts:
            return None
        assert self._counted_input is not None
        token_ids = list[int]() if sequence is None else sequence.token_ids.tolist()
        if sequence is not None and sequence.pending_token is not None:
            token_ids.append(sequence.pending_token)
        token_ids += validated.inputs[self._counted_input].tolist()
        most, capacity = validated.max_new_tokens, self.manifest.capacity
        if capacity is not None:
            most = min(most, capacity - len(token_ids))
        return ScoreAdjustments(params, token_ids, self.program, most)

    def end_sequence(self, validated: ValidatedRequest) -> None:
        """End the sequence of an END that has no tokens.

        Raises:
            RequestError: UNKNOWN_SEQUENCE or SEQUENCE_KEY; POSITION, after the sequence has ended.
        """
        request = validated.request
        if self.snapshots is not None and self.table.get(request.sequence_id) is None:
            self.snapshots.forget(request.sequence_id, validated.key_digest)
        live = self.table.find(request.sequence_id)
        live.check_key(validated.key_digest, start=False)
        self._forget_if_asked(validated.request, live)
        self.table.end(live)
        _check_position(validated, live.position)

    def finish(self, active: ActiveRequest) -> None:
        """Finish an answered request: free the slot of an END, else start the idle clock."""
        sequence = active.sequence
        sequence.busy = False
        if self.table.get(sequence.id) is not sequence:
            return  # it ended when the engine failed
        if active.request.end:
            self.table.end(sequence)
        else:
            self.table.touch(sequence)

    def _apply_start(self, validated: ValidatedRequest) -> Request:
        """Check the key; end the live sequence that a START replaces.

        Returns:
            The request, without its START flag if it continues the live sequence.
        """
        request = validated.request
        live = self.table.get(request.sequence_id)
        if live is None and request.restored is not None and validated.refusal is None:
            return self._restore(validated)
        if live is None:
            return request
        try:
            live.check_key(validated.key_digest, start=request.start)
        except RequestError as error:
            raise (request.refusal or error) from None  # a key that could not be read is not wrong
        if request.start and live.key_digest is not None and request.continues_sequence:
            return replace(request, start=False)
        if request.start:
            self.table.end(live, EndReason.START)
        return request

    def can_start(self, validated: ValidatedRequest) -> bool:
        """Whether a START of a sequence that is not live is admitted once a slot is free."""
        if validated.refusal is not None:
            return False
        if validated.request.restored is not None:
            return True
        try:
            source = self._source(validated)
            self._check_tokens(validated, source)
            self._adjustments(validated, source)
        except RequestError:
            return False
        return True

    def _check_tokens(self, validated: ValidatedRequest, sequence: SequenceState | None) -> None:
        """Refuse tokens that do not continue this sequence, or begin a new one if it is None.

        Raises:
            RequestError: POSITION, EMPTY_INPUT or CAPACITY.
        """
        pending = sequence is not None and sequence.pending_token is not None
        # First: another instance may have the sequence at that position (`may_succeed_elsewhere`).
        _check_position(validated, sequence.position if sequence is not None else 0)
        if validated.num_tokens == 0 and not pending:
            raise RequestError(
                Code.EMPTY_INPUT,
                "the input has no tokens, and the sequence has no generated token that could be"
                " continued from; send at least 1 token",
            )
        self._check_chunk(validated.num_tokens + pending)
        self._check_fits(validated, sequence.position if sequence is not None else 0)

    def _check_fits(self, validated: ValidatedRequest, length: int) -> None:
        _check_position(validated, length)
        num_tokens = validated.num_tokens
        capacity, new = self.manifest.capacity, validated.min_new_tokens
        if capacity is not None and length + num_tokens + new > capacity:
            raise RequestError(
                Code.CAPACITY,
                f"{num_tokens} tokens{f' and {new} more' if new else ''} do not fit: the sequence"
                f" holds {length} of {capacity} positions, {capacity - length} are left; send"
                f" fewer, or build with a larger capacity",
            )

    def _check_chunk(self, num_tokens: int) -> None:
        """Refuse tokens that one step does not take, where they must be fed in one."""
        if self.program.lookahead and num_tokens > self.program.chunk:
            raise RequestError(
                Code.CAPACITY,
                f"{num_tokens} tokens do not fit into one step, which takes {self.program.chunk} of"
                f" a sequence; tokens of this model see later ones that are fed with them, so a"
                f" prompt cannot be divided: send fewer, or build with a larger chunk",
            )

    def _prepend_pending_token(self, active: ActiveRequest) -> None:
        """Feed the sequence's pending token, if it has one, before the tokens of the request."""
        token = active.sequence.pending_token
        if token is None:
            return
        assert self.program.decoder_io is not None
        name = self.program.decoder_io[0]
        active.inputs = {name: torch.cat([torch.tensor([token]), active.inputs[name]])}
        active.num_tokens += 1
        active.pending_token = token
        active.sequence.pending_token = None


def _check_sequence_id(request: Request) -> None:
    if request.sequence_id in (0, ""):
        raise RequestError(
            Code.NO_SEQUENCE_ID,
            "the request names no sequence; send a correlation id that is not 0 or empty",
        )


def _check_position(validated: ValidatedRequest, length: int) -> None:
    """Refuse a request that was meant for another length of its sequence.

    Raises:
        RequestError: POSITION.
    """
    position = validated.position
    if position is not None and position != length:
        raise RequestError(
            Code.POSITION,
            f"the request was meant for position {position}, the sequence holds {length}; an"
            f" earlier request or its answer was lost: send what is missing, or START again",
        )
