"""What a client knows of one sequence: what the server has accepted, what it may hold, and how to bring it back."""

import secrets
from collections.abc import Sequence

import numpy as np

from inplace.client.calls import Array, InferRequest, ModelMetadata, sent
from inplace.client.errors import ClientError, SequenceLostError, UnreachableError
from inplace.client.want import Part, Want, advance, extended, joined
from inplace.errors import Code
from inplace.protocol import INPUT_IDS, POSITION, SEQUENCE_KEY, TEXT_OUTPUT

NOWHERE = 1 << 62
"""A position that no slot can hold."""


class Ledger:
    """The books of one sequence: they make requests and judge errors; input and output are done elsewhere.

    A START sets a key that nobody can guess. Every later request carries it, and the position that the client believes in. A step that was
    not answered is sent again with START, key and position, which the backend takes as a step of the sequence if it stands where the client
    left it. If it does not, what was sent so far is sent again from the beginning: tokens as one prompt.

    Args:
        id: the correlation id; a random one if None.
        key: the key; a fresh random one for each sequence if None; none is sent if empty.
        replay: keep what a replay needs.

    Attributes:
        length: positions the server holds, a token that waits to be fed included; None after a text, whose tokens the client does not know.
        live: the server holds the sequence, as far as is known.
        held: the server may hold something for it: the backend a slot, or Triton a sequence whose START the backend refused.
    """

    def __init__(self, id: int | str | None, key: str | None, replay: bool) -> None:
        self.id: int | str = id if id is not None else secrets.randbits(63) or 1
        self.length: int | None = 0
        self._given, self._replay = key, replay
        self._last: dict[str, Array] = {}
        self.begin()

    def begin(self) -> None:
        """The next request begins a new sequence."""
        self.key = secrets.token_urlsafe(16) if self._given is None else self._given
        self.live = self.held = False
        self._doubtful = False  # the last step was not answered
        self._history: list[Part] | None = [] if self._replay else None

    @property
    def movable(self) -> bool:
        """Whether another server can take the sequence over."""
        return not self.live or self._history is not None

    @property
    def _unkept(self) -> str:
        return (
            "its inputs are not tokens, so the client kept none to replay"
            if self._replay
            else "replay is off"
        )

    def calls(
        self, want: Want, model: ModelMetadata, past: Sequence[Part] = ()
    ) -> list[InferRequest]:
        """The requests to send now, one after the other; the answer to the last one is what is wanted.

        Args:
            want: what is wanted.
            model: what the model is.
            past: what a fresh sequence needs before it, beside the history.
        """
        if self.live:
            return [
                self._call(
                    want,
                    model,
                    self.length,
                    start=self._doubtful and bool(self.key and self.length),
                )
            ]
        calls: list[InferRequest] = []
        position: int | None = 0
        for part in joined(self._past(past), want):
            calls.append(self._call(part, model, position, start=not calls))
            position = advance(position, part, model)
        return calls

    def sent(self, call: InferRequest, model: ModelMetadata) -> None:
        """The request is on its way."""
        self.held = True
        self._last = {
            name: array[:1] if name in model.tokens else array
            for name, array in call.inputs.items()
        }
        if INPUT_IDS in model.tokens:
            self._last = {INPUT_IDS: np.zeros(1, dtype=np.int64)}

    def accepted(self, want: Want, model: ModelMetadata, said: Sequence[int] = ()) -> None:
        """The last of `calls` was answered.

        Args:
            want: what was wanted.
            model: what the model is.
            said: what a generation said: the sequence has that too.
        """
        position = self.length
        if not self.live:
            past = self._past()
            position = None if any(isinstance(part, str) for part in past) else sum(map(len, past))
        position = advance(position, want, model)
        self.length = None if position is None else position + len(said)
        self.live, self._doubtful = True, False
        part = want.part
        if want.end:
            self.begin()
        elif self._history is not None:
            self._history = (
                None if part is None else extended(extended(self._history, part), list(said))
            )

    def failed(self, error: ClientError, call: InferRequest, *, spoke: bool = False) -> ClientError:
        """Judge an error: what is known of the sequence now, and whether the same request may be made again.

        Args:
            error: what came instead of a response.
            call: the request.
            spoke: responses came before the error.

        Returns:
            The error to raise; ``retryable`` where the same request, made again, may succeed.
        """
        silent, unknown = isinstance(error, UnreachableError), isinstance(error, SequenceLostError)
        gone = silent and (
            call.generates or error.by_backend
        )  # it may have said more than came; or it is being unloaded
        if (
            unknown
            and not error.by_backend
            and not call.start
            and self.live
            and self.key
            and self.length
        ):
            self._doubtful = error.retryable = True  # Triton forgot it, the backend may not have
        elif (
            unknown
            or gone
            or (spoke and error.retryable)
            or (self._doubtful and error.code == Code.POSITION)
        ):
            return self.lost(error)
        elif silent:
            self._doubtful = self.live
            if not self.movable:
                error.add_note(f"The sequence cannot go on elsewhere: {self._unkept}.")
        elif (
            spoke
            or call.end
            or (call.start and not self.live)
            or (error.code == Code.ENGINE_FAILED and not error.retryable)
        ):
            self.forget()
        return error

    def interrupted(self, call: InferRequest | None) -> None:
        """The caller stopped waiting for the answer to a step."""
        if call is not None and not call.generates:
            self._doubtful = self.live

    def lost(self, error: ClientError) -> ClientError:
        """The sequence is not where the client left it. Returns the error to raise: retryable where the next request replays it."""
        if self.live and self._history is None:
            return error.as_lost(self._unkept)
        self.forget()
        error.retryable = True
        return error

    def forget(self) -> None:
        """The next request replays the sequence. One that cannot be replayed is left to the server's own words."""
        if self._history is not None:
            self.live = self._doubtful = False

    def ending(self, model: ModelMetadata) -> InferRequest:
        """The request that frees what the server may hold.

        Triton takes no request without inputs, so it is an END for a position that nothing can hold: it is refused, and ends all the same.
        """
        start = bool(self.key) and (
            self._doubtful or not self.live
        )  # Triton may have forgotten it, and then takes nothing else
        return self._call(
            Want(self._last, end=True, parameters={POSITION: NOWHERE}), model, None, start=start
        )

    def _past(self, more: Sequence[Part] = ()) -> list[Part]:
        past = [part.copy() if isinstance(part, list) else part for part in self._history or []]
        for part in more:
            past = extended(past, part)
        return past

    def _call(
        self, want: Want, model: ModelMetadata, position: int | None, *, start: bool
    ) -> InferRequest:
        own: dict[str, str | int] = {SEQUENCE_KEY: self.key} if self.key else {}
        if position is not None:
            own[POSITION] = position
        return InferRequest(
            sequence=self.id,
            start=start,
            end=want.end,
            inputs=want.inputs,
            parameters=own | sent(want.parameters),
            outputs=tuple(name for name in want.outputs if name != TEXT_OUTPUT or model.speaks),
            request=want.request or secrets.token_hex(4),
        )
