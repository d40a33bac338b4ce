"""Generations that follow a grammar, between their token and the mask for the next one."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from time import monotonic

from inplace.drivers.generation import FinishReason
from inplace.drivers.queues import StreamRequest
from inplace.errors import Code, RequestError
from inplace.grammars import GrammarMatcher, Next, wait_for_masks
from inplace.protocol import ALLOWED_TOKEN_IDS, BANNED_TOKEN_IDS

MAX_MASK_WAIT = 0.002
"""Seconds for which the first mask waits for those of other generations, if nothing else runs: they
share a step then."""


Ready = tuple[StreamRequest, Next, FinishReason | None]
"""A generation, what may come next in it, and why its last token was the last one anyway."""


class PendingMasks:
    """Generations that no step runs until they have their next mask.

    Used on the engine's thread alone.

    Attributes:
        pending: each generation that waits, and why it ends, by its matcher.
    """

    def __init__(self) -> None:
        self.pending: dict[GrammarMatcher, tuple[StreamRequest, FinishReason | None]] = {}

    def add(self, request: StreamRequest, reason: FinishReason | None = None) -> None:
        """Wait for the next mask of a generation, which its matcher has been asked for.

        Args:
            request: the generation.
            reason: why it ends with its last token, unless its grammar is complete.
        """
        assert request.matcher is not None
        self.pending[request.matcher] = request, reason

    def discard(self, request: StreamRequest) -> None:
        """Forget a request that has been answered, and close its matcher."""
        if request.matcher is not None:
            self.pending.pop(request.matcher, None)
            request.matcher.close()
            request.matcher = None

    def discard_all(self, requests: Iterable[StreamRequest]) -> None:
        """As `discard`."""
        for request in requests:
            self.discard(request)

    def receive(self, timeout: float = 0.0) -> list[Ready]:
        """The generations with an answer; waits up to ``timeout`` seconds for the first."""
        if not self.pending:
            return []
        ready = wait_for_masks(self.pending, timeout)
        return [(request, each.receive(), reason) for each, request, reason in self._taken(ready)]

    def _taken(
        self, matchers: Iterable[GrammarMatcher]
    ) -> list[tuple[GrammarMatcher, StreamRequest, FinishReason | None]]:
        return [(each, *self.pending.pop(each)) for each in matchers]

    def gather(self, released: AbstractContextManager[object], timeout: float) -> list[Ready]:
        """As `receive`, and those whose answers come soon after the first.

        Args:
            released: entered while it waits.
            timeout: seconds to wait for the first.
        """
        with released:
            ready = self.receive(timeout)
        until = monotonic() + MAX_MASK_WAIT
        while ready and self.pending and monotonic() < until:
            with released:
                ready += self.receive(MAX_MASK_WAIT)
        return ready


def no_token_left() -> RequestError:
    """The error of a generation in which the grammar and other masks exclude all tokens."""
    return RequestError(
        Code.BAD_PARAMETER,
        "no token is left that may be chosen: the grammar, the tokens that end the generation,"
        f" {ALLOWED_TOKEN_IDS!r} and {BANNED_TOKEN_IDS!r} exclude all; the sequence has ended,"
        " START again with other parameters",
    )
