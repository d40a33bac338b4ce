"""Servers that are replaced and killed while sequences of every kind of state run on them."""

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from inplace.client import AsyncClient, Retry
from inplace.runtime.snapshots import SWEEP_INTERVAL
from inplace.snapshots.store import MARK_SECONDS
from inplace_builder.tools.tritonserver import Ports, TritonServer
from rolling.models import EVERY, ROWS, build
from rolling.scripts import scripts
from rolling.users import Tally, User
from support.fault_proxy import kill_server
from support.storing import left_in_folder

CALM = 6.0
"""Seconds between two events, in which all servers run."""

EXIT_SECONDS = 60
"""Triton's exit timeout."""

RESENT_MORE = {"kv": 16, "ring": 16, "ssm": 16, "whisper": 1, "rnnt": 1}
"""Positions that a client may have to send again beside ``snapshot_every``: a sequence is stored
before a request runs, so that one is lost, and tokens on their way are."""


@dataclass
class Judgement:
    """What was seen, and what of it must not be.

    Attributes:
        numbers: for the record.
        faults: empty where everything is as it must be.
    """

    numbers: dict[str, Any]
    faults: list[str] = field(default_factory=list)


class Replicas:
    """Servers of the same models, at the same addresses also after a restart."""

    def __init__(self, repository: Path, logs: Path, count: int) -> None:
        self._repository, self._logs = repository, logs
        self._ports = [Ports(0, 0, 0).resolve() for _ in range(count)]
        self.servers: list[TritonServer | None] = [None] * count
        self.statuses: list[int] = []

    @property
    def urls(self) -> list[str]:
        return [f"127.0.0.1:{ports.grpc}" for ports in self._ports]

    def start(self, index: int) -> None:
        """Start one and wait until it is ready."""
        server = TritonServer(
            self._repository,
            self._ports[index],
            log=self._logs / f"server{index}-{time.monotonic_ns()}.log",
            arguments=[f"--exit-timeout-secs={EXIT_SECONDS}"],
            start_timeout=300.0,
        )
        server.start()
        self.servers[index] = server
        server.wait_ready()

    def drain(self, index: int) -> None:
        """End one with SIGTERM."""
        server = self.servers[index]
        assert server is not None
        self.statuses.append(server.stop())
        self.servers[index] = None

    def kill(self, index: int) -> None:
        """End one with SIGKILL."""
        server = self.servers[index]
        assert server is not None
        kill_server(server)
        self.servers[index] = None

    def stop(self) -> None:
        """End all that run."""
        for server in self.servers:
            if server is not None:
                server.stop(timeout=10)


def roll(
    folder: Path,
    *,
    users: Mapping[str, int],
    servers: int,
    updates: int,
    kills: int,
    seed: int,
    num_scripts: int = 4,
) -> Judgement:
    """Run one.

    Args:
        folder: an empty one, for models, the store and logs.
        users: how many sequences of each kind live at a time.
        servers: replicas.
        updates: rolling updates, in which each replica is drained and started again.
        kills: of random replicas.
        seed: of everything that is random.
        num_scripts: different sequences of each kind.
    """
    torch.set_num_threads(1)
    repository = build(folder, max(ROWS, *users.values()))
    book = scripts(num_scripts)
    replicas = Replicas(repository, folder, servers)
    try:
        for index in range(servers):
            replicas.start(index)
            print(f"server {index} is ready", flush=True)
        events = ["update"] * updates + ["kill"] * kills
        random.Random(seed).shuffle(events)
        return asyncio.run(_live(folder, replicas, book, users, events, seed))
    finally:
        replicas.stop()


async def _live(
    folder: Path,
    replicas: Replicas,
    book: Mapping[str, list[Any]],
    users: Mapping[str, int],
    events: list[str],
    seed: int,
) -> Judgement:
    tally, draw, begin = Tally(), random.Random(f"events {seed}"), time.monotonic()
    retry = Retry(attempts=40, timeout=180.0)
    async with AsyncClient(replicas.urls, retry=retry) as client:
        everyone = [
            User(client, kind, book[kind], number, seed, tally)
            for kind, count in users.items()
            for number in range(count)
        ]
        running = [asyncio.create_task(user.run()) for user in everyone]
        history = []
        for event in events:
            await asyncio.sleep(CALM)
            at = time.monotonic() - begin
            which = await _happen(event, replicas, draw)
            history.append(
                {"event": event, "server": which, "at": at, "end": time.monotonic() - begin}
            )
            print(history[-1], dict(tally.turns), len(tally.wrong), tally.lost, flush=True)
        await asyncio.sleep(CALM)
        for user in everyone:
            user.stopping = True
        results = await asyncio.gather(*running, return_exceptions=True)
    left, marks = await _left_behind(folder / "store"), len(_files(folder / "store"))
    left_later = await _marks(folder / "store")
    errors = [repr(each) for each in results if isinstance(each, BaseException)]
    numbers = {
        "seconds": time.monotonic() - begin,
        "servers": len(replicas.urls),
        "sequences_at_a_time": dict(users),
        "snapshot_every": EVERY,
        "events": history,
        "sequences_begun": dict(tally.begun),
        "sequences_finished": dict(tally.finished),
        "turns": dict(tally.turns),
        "values_compared": dict(tally.values),
        "restored": dict(tally.restored),
        "positions_sent_again": {
            kind: {str(number): count for number, count in sorted(each.items())}
            for kind, each in tally.resent.items()
        },
        "sent_again_from_the_beginning": dict(tally.replayed),
        "lost": tally.lost,
        "wrong": tally.wrong,
        "failed": tally.failed,
        "longest_turn_s": tally.longest,
        "left_in_the_store": left,
        "marks_of_ended_sequences": marks - len(left),
        "left_when_marks_were_removed": left_later,
        "exit_statuses_of_drained_servers": replicas.statuses,
    }
    faults = [*_faults(tally), *errors, *(f"left: {name}" for name in left + left_later)]
    return Judgement(numbers, faults)


async def _happen(event: str, replicas: Replicas, draw: random.Random) -> str:
    """An update of all replicas one after the other, or a kill of one, which is started again."""
    if event == "update":
        for index in range(len(replicas.urls)):
            await asyncio.to_thread(replicas.drain, index)
            await asyncio.to_thread(replicas.start, index)
            await asyncio.sleep(1.0)
        return "all"
    index = draw.randrange(len(replicas.urls))
    replicas.kill(index)
    await asyncio.to_thread(replicas.start, index)
    return str(index)


async def _left_behind(store: Path) -> list[str]:
    """The snapshots when all sequences have ended and there was time to delete."""
    deadline = time.monotonic() + 20.0
    while (left := left_in_folder(store)) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    return [file.name for file in left]


async def _marks(store: Path) -> list[str]:
    """What is left of marks that sequences have ended, when there was time to remove them."""
    deadline = time.monotonic() + MARK_SECONDS + 2 * SWEEP_INTERVAL
    while (left := _files(store)) and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
    return left


def _files(store: Path) -> list[str]:
    return sorted(file.name for file in store.rglob("*") if file.is_file())


def _faults(tally: Tally) -> list[str]:
    faults = [*tally.wrong, *tally.lost, *tally.failed]
    for kind, every in EVERY.items():
        most = max(tally.resent[kind], default=0)
        if most > every + RESENT_MORE[kind]:
            faults.append(f"{kind}: {most} positions were sent again; snapshot_every is {every}")
    return faults
