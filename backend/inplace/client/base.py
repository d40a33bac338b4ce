"""What sequences of both clients, synchronous and asyncio, share: everything but input and output."""

from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

import numpy as np
from tritonclient.utils import InferenceServerException

from inplace.client.calls import Array, InferRequest, ModelMetadata, Parameter
from inplace.client.endpoints import Endpoints
from inplace.client.errors import ClientError, RefusedError, UnreachableError, parsed
from inplace.client.ledger import Ledger
from inplace.client.progress import Progress
from inplace.client.want import Want
from inplace.errors import Code
from inplace.protocol import FINISH_REASON, INPUT_IDS, MAX_TOKENS, STOP, TEXT, TEXT_OUTPUT, TOKENS

BUSY = ("NO_FREE_SLOT", "QUEUE_FULL")
"""Codes of a server that has no room: another one may."""


class Options(TypedDict, total=False):
    """Parameters of a generation; the server decides about those that are left out.

    Attributes:
        temperature, top_k, top_p, seed: how tokens are chosen; the most likely ones if left out.
        ignore_eos: do not finish at an end token.
        stream_interval: fewest tokens of a response.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    stream_interval: int


class SequenceBase:
    """A sequence's books, the server that has it, and what an error means for both.

    Args:
        endpoints: the servers.
        model: name of the model.
        timeout: seconds to wait for one answer, or for the next response of a generation.
        ledger: the books.
    """

    def __init__(self, endpoints: Endpoints, model: str, timeout: float, ledger: Ledger) -> None:
        self.model, self.timeout = model, timeout
        self._endpoints, self._ledger = endpoints, ledger
        self._server = endpoints.choose()

    @property
    def id(self) -> int | str:
        """The correlation id."""
        return self._ledger.id

    @property
    def key(self) -> str:
        """The ``sequence_key`` of the START that was or will be sent."""
        return self._ledger.key

    @property
    def length(self) -> int | None:
        """Tokens (or entries) that the sequence has; None after a prompt that was a text, whose tokens only the server knows."""
        return self._ledger.length

    @property
    def server(self) -> str:
        """The server that has the sequence, or will have it."""
        return self._server

    def _judged(
        self, error: InferenceServerException, call: InferRequest | None, *, spoke: bool = False
    ) -> ClientError:
        """The error to raise. Where the server is gone or has no room, the sequence is another one's from here on.

        Args:
            error: from tritonclient.
            call: the request that was sent, if any.
            spoke: it has had a response before the error.
        """
        typed = parsed(error, self.id, call.request if call else "")
        if call is not None:
            typed = self._ledger.failed(typed, call, spoke=spoke)
        gone = isinstance(typed, UnreachableError)
        if gone:
            self._endpoints.failed(self._server)
        if gone or (typed.code in BUSY and not self._ledger.live):
            self._move()
        return typed

    def _move(self) -> None:
        if not self._ledger.movable:
            return
        server = self._endpoints.choose(other_than=self._server)
        if server != self._server:
            self._ledger.forget()
            self._ledger.held = False
            self._server = server


def check_streams(sequence: SequenceBase, model: ModelMetadata) -> None:
    """Refuse to ask a model for a generation that is served step by step.

    Raises:
        RefusedError: as the model itself would say it.
    """
    if not model.streams:
        text = f"model {sequence.model!r} is served step by step and generates nothing: build it with --serve stream, or step it with tokens()"
        raise RefusedError(
            InferenceServerException(text),
            code=Code.BAD_PARAMETER,
            reason=text,
            retryable=False,
            sequence=sequence.id,
            request="",
        )


class GenerationBase:
    """What generations of both clients share.

    Args:
        want: the generation.
        timeout: seconds without a response after which the server counts as gone.
    """

    def __init__(self, want: Want, timeout: float) -> None:
        self.timeout = timeout
        self._progress = Progress(want)
        self._call: InferRequest | None = None  # the request under way

    @property
    def tokens(self) -> list[int]:
        """All tokens said so far."""
        return list(self._progress.tokens)

    @property
    def text(self) -> str:
        """All text said so far."""
        return self._progress.text

    @property
    def finish_reason(self) -> str:
        """Why it ended, see `Piece`; empty while it runs."""
        return self._progress.finish_reason


def generation(
    prompt: Sequence[int] | Array | str,
    max_tokens: int,
    stop: Sequence[str],
    text: bool,
    end: bool,
    request: str,
    options: Options,
) -> Want:
    """A generation from what a user gives; the arguments are those of `Sequence.generate`."""
    inputs: dict[str, Array] = {}
    if isinstance(prompt, str):
        inputs[TEXT] = np.array([prompt.encode()], dtype=np.object_)
    else:
        inputs[INPUT_IDS] = np.asarray(prompt, dtype=np.int64)
    if stop:
        inputs[STOP] = np.array([one.encode() for one in stop], dtype=np.object_)
    parameters: dict[str, Parameter] = {MAX_TOKENS: max_tokens}
    parameters.update(cast(Mapping[str, Parameter], options))
    outputs = (TOKENS, TEXT_OUTPUT, FINISH_REASON) if text else (TOKENS, FINISH_REASON)
    return Want(inputs, end, parameters, outputs, request)
