"""Clients of every kind, each with one conversation after another."""

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fuzz.damage import NOT_FOR, REFUSED
from soak.line import Line, LostError, RefusedError
from soak.songs import Song

SHARES = {"normal": 62, "garbage": 8, "idle": 8, "vanish": 8, "restart": 8, "cancel": 6}
"""How clients behave, of a hundred."""
FULL = ("INPLACE-NO_FREE_SLOT retryable=1", "INPLACE-QUEUE_FULL retryable=1")
GONE = ("INPLACE-UNKNOWN_SEQUENCE", "must specify the START flag")
LATE = 3.0
"""Seconds beyond the idle timeout that a silent client stays away: the backend looks for idle
sequences between steps, which a busy machine delays."""
PATIENCE = 120.0
"""Seconds for which a client asks again while the server is full."""


@dataclass
class Tally:
    """What came of it.

    Attributes:
        begun, finished: conversations by behaviour; one that breaks off on purpose is finished when
            it came to that point.
        heard: tokens that were compared with what the model says alone.
        refused: requests by the code of the error, ``triton`` for Triton's own.
        wrong: tokens that differ from it, and anything else that must not happen.
        injected: ids of the conversations that misbehaved on purpose.
    """

    begun: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    heard: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    cut_short: list[str] = field(default_factory=list)
    injected: set[str] = field(default_factory=set)

    def refuse(self, text: str) -> None:
        """Count a refusal."""
        found = re.search(r"INPLACE-(\w+)", text)
        self.refused[found[1] if found else "triton"] += 1


@dataclass(frozen=True)
class Place:
    """Where the clients are."""

    url: str
    model: str
    songs: list[Song]
    seed: int
    idle: float
    until: float


class Performance:
    """One conversation over one line, each turn by steps or by a generation as the dice fall."""

    def __init__(self, line: Line, song: Song, name: str, rng: random.Random, tally: Tally) -> None:
        self.line, self.song, self.name, self.rng, self.tally = line, song, name, rng, tally

    async def play(self) -> AsyncIterator[bool]:
        """Yields after every answer: True where no request is under way."""
        carry: list[int] = []  # said by steps: the client sends it back itself
        for number, turn in enumerate(self.song.turns):
            last = number == len(self.song.turns) - 1
            heard: list[int] = []
            if self.rng.random() < 0.6:
                generation = {
                    "max_tokens": len(turn.said),
                    "ignore_eos": True,
                    "stream_interval": self.rng.choice((1, 1, 4)),
                }
                async for _ in self._ask(
                    carry + turn.new, number, heard, start=number == 0, end=last, **generation
                ):
                    yield False
                if len(heard) < len(turn.said):
                    raise LostError(f"a generation said {len(heard)} tokens of {len(turn.said)}")
                carry = []
            else:
                ids = carry + turn.new
                for count in range(len(turn.said)):
                    end = last and count == len(turn.said) - 1
                    async for _ in self._ask(
                        ids, number, heard, start=number == count == 0, end=end
                    ):
                        pass
                    ids = carry = heard[-1:]
                    if not end:
                        yield True
            yield not last
            await asyncio.sleep(self.rng.random() * 0.5)

    async def _ask(
        self,
        ids: list[int],
        turn: int,
        heard: list[int],
        *,
        start: bool,
        end: bool,
        **parameters: int | bool,
    ) -> AsyncIterator[None]:
        """Send one request; a START again while the server is full. Compares every token."""
        request = self.line.request(
            ids,
            self.name,
            start=start,
            end=end,
            parameters=dict(self.song.parameters) | parameters,
            id=f"{self.name}/{turn}",
        )
        until, pause = time.monotonic() + PATIENCE, 0.2
        while True:
            try:
                async for tokens in self.line.ask(request):
                    heard += tokens
                    self.tally.heard += len(tokens)
                    if not self.song.begins(turn, heard):
                        self.tally.wrong.append(
                            f"{self.name} turn {turn}: heard {heard}, alone "
                            f"{self.song.turns[turn].said}"
                        )
                        raise LostError("wrong tokens")
                    yield
                return
            except RefusedError as error:
                self.tally.refuse(str(error))
                if not (start and str(error).startswith(FULL) and time.monotonic() < until):
                    raise
            await asyncio.sleep(pause * (0.5 + self.rng.random()))
            pause = min(2.0, 1.5 * pause)


class Client:
    """One of many: conversation after conversation, each with its own behaviour."""

    def __init__(self, place: Place, number: int, tally: Tally) -> None:
        self.place, self.number, self.tally = place, number, tally
        self.lives = 0

    async def run(self) -> None:
        """Live."""
        await asyncio.sleep(random.Random(f"{self.place.seed} {self.number}").random())
        while time.monotonic() < self.place.until:
            self.lives += 1
            rng = random.Random(f"{self.place.seed} client {self.number} life {self.lives}")
            [how] = rng.choices(list(SHARES), list(SHARES.values()))
            name = f"{how}-{self.number}-{self.lives}"
            if how != "normal":
                self.tally.injected.add(name)
            line = Line(self.place.url, self.place.model)
            performance = Performance(line, rng.choice(self.place.songs), name, rng, self.tally)
            self.tally.begun[how] += 1
            try:
                await getattr(self, f"_{how}")(performance)
                self.tally.finished[how] += 1
            except (RefusedError, LostError) as error:
                self.tally.cut_short.append(f"{name}: {type(error).__name__} {error}")
            finally:
                await line.drop()

    async def _normal(self, performance: Performance) -> None:
        async for _ in performance.play():
            pass

    async def _garbage(self, performance: Performance) -> None:
        """Damaged requests between those of a conversation that must not suffer."""
        rng, line = performance.rng, performance.line
        async for resting in performance.play():
            if resting and rng.random() < 0.3:
                request = line.request([1], performance.name)
                how = rng.choice(sorted(set(REFUSED) - NOT_FOR["stream"]))
                REFUSED[how](request, rng)
                try:
                    await line.hear(request)
                    self.tally.wrong.append(
                        f"{performance.name}: answered although damaged by {how}"
                    )
                except RefusedError as error:
                    self.tally.refuse(str(error))

    async def _some(self, performance: Performance, *, resting: bool) -> bool:
        """Perform up to a random point; False if the song was over before."""
        left = performance.rng.randint(1, 12)
        async for rests in performance.play():
            left -= 1
            if left <= 0 and (rests or not resting):
                return True
        return False

    async def _idle(self, performance: Performance) -> None:
        """Goes silent for too long, comes back, and must be told so."""
        if not await self._some(performance, resting=True):
            return
        await asyncio.sleep(self.place.idle + LATE)
        try:
            await performance.line.hear(
                performance.line.request([1], performance.name, id=performance.name)
            )
            self.tally.wrong.append(
                f"{performance.name}: answered after {self.place.idle + LATE:.0f} s of silence"
            )
        except RefusedError as error:
            self.tally.refuse(str(error))
            if not any(text in str(error) for text in GONE):
                raise

    async def _vanish(self, performance: Performance) -> None:
        """Is gone without a word; its slot is reclaimed."""
        await self._some(performance, resting=performance.rng.random() < 0.5)
        await performance.line.drop()

    async def _cancel(self, performance: Performance) -> None:
        """Cancels the stream."""
        await self._some(performance, resting=False)
        await performance.line.cancel()

    async def _restart(self, performance: Performance) -> None:
        """START on the live id over another connection, the old one still there or just gone."""
        rng = performance.rng
        await self._some(performance, resting=rng.random() < 0.5)
        if rng.random() < 0.5:
            await performance.line.drop()
        line = Line(self.place.url, self.place.model)
        try:
            again = Performance(
                line, rng.choice(self.place.songs), performance.name, rng, self.tally
            )
            async for _ in again.play():
                pass
        finally:
            await line.drop()
