"""Clients whose sequences run scripts again and again, and what happened to them."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from inplace.client import AsyncClient, AsyncSequence
from inplace.client.errors import ClientError
from inplace.client.replay import SequenceTracker
from inplace.client.requests import InferRequest
from inplace.protocol import POSITION
from rolling.models import EVERY
from rolling.scripts import TURNS, WrongError


@dataclass
class Tally:
    """What happened, by kind of state.

    Attributes:
        begun, finished: sequences.
        turns: that were answered and compared.
        values: that were compared.
        restored: requests after which a sequence went on in another server from a snapshot.
        resent: how many positions behind its client a restored sequence was, how often.
        replayed: sequences that were sent again from the beginning.
        lost: sequences that could not go on, with the reason.
        wrong: values that are not those of a run alone.
        failed: other errors of requests.
        longest: seconds of the longest turn.
    """

    begun: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)
    restored: Counter[str] = field(default_factory=Counter)
    resent: dict[str, Counter[int]] = field(
        default_factory=lambda: {kind: Counter() for kind in EVERY}
    )
    replayed: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    longest: dict[str, float] = field(default_factory=dict)


class Watched(SequenceTracker):
    """A client's tracker that counts what it restores."""

    def watch(self, tally: Tally, kind: str) -> None:
        self._tally, self._kind = tally, kind

    def _not_restored(self, error: ClientError) -> ClientError:
        asked = self.asked
        result = super()._not_restored(error)
        if self._restored_at is not None:
            self._tally.resent[self._kind][asked - self._restored_at] += 1
        elif not self._restoring:
            self._tally.replayed[self._kind] += 1
        return result

    def failed(
        self, error: ClientError, request: InferRequest, *, partial: bool = False
    ) -> ClientError:
        self.asked = int(request.parameters.get(POSITION, 0))
        return super().failed(error, request, partial=partial)

    def answered(self, *arguments: Any, **options: Any) -> None:
        if self._restoring or self._restored_at is not None:
            self._tally.restored[self._kind] += 1
            if self._restoring:
                self._tally.resent[self._kind][0] += 1
        super().answered(*arguments, **options)


class User:
    """Runs scripts of one kind, a sequence for each, until it is told to stop.

    Args:
        client: of all servers.
        kind: the model.
        scripts: of that kind.
        number: of the user.
        seed: of its pauses and of what it runs.
        tally: shared by all users.
    """

    def __init__(
        self,
        client: AsyncClient,
        kind: str,
        scripts: list[Any],
        number: int,
        seed: int,
        tally: Tally,
    ) -> None:
        self._client, self._kind, self._scripts, self._tally = client, kind, scripts, tally
        self._draw = random.Random(f"{seed} {kind} {number}")
        self.stopping = False

    async def run(self) -> None:
        await asyncio.sleep(self._draw.uniform(0.0, 3.0))
        while not self.stopping:
            script = self._draw.choice(self._scripts)
            self._tally.begun[self._kind] += 1
            sequence = AsyncSequence(self._client, self._kind, timeout=60.0)
            sequence._tracker = tracker = Watched(None, None, replay=True)
            tracker.watch(self._tally, self._kind)
            try:
                await self._turns(sequence, script)
                self._tally.finished[self._kind] += 1
            except WrongError as error:
                self._tally.wrong.append(str(error))
            except ClientError as error:
                kind = type(error).__name__
                text = f"{self._kind} at {sequence.length}: {kind}: {error} {_notes(error)}"
                (self._tally.lost if "Lost" in kind else self._tally.failed).append(text)
            finally:
                await sequence.close()

    async def _turns(self, sequence: AsyncSequence, script: Any) -> None:
        heard: list[int] = []
        for turn in range(TURNS):
            begin = time.monotonic()
            values = await script.run(sequence, turn, self._draw, heard)
            took = time.monotonic() - begin
            self._tally.longest[self._kind] = max(took, self._tally.longest.get(self._kind, 0.0))
            self._tally.turns[self._kind] += 1
            self._tally.values[self._kind] += values
            await asyncio.sleep(self._draw.uniform(0.1, 1.5))


def _notes(error: ClientError) -> str:
    return " ".join(getattr(error, "__notes__", ()))
