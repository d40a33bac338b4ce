"""A soak: build, serve, let the clients live, judge."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from soak.clients import Client, Place, Tally
from soak.songs import CAPACITY, Song, songbook
from soak.watch import Memory, error_lines, free_slots, metric
from support.models import open_instance, tiny_llama
from support.pool import reconfigure, warmed

MODEL = "llama"
SLOTS, ROWS = 256, 64
FLUSH = 1.2
"""Seconds after which the server's metrics show what has happened."""


@dataclass
class Judgement:
    """What was seen, and what of it must not be.

    Attributes:
        numbers: for the record.
        faults: empty where everything is as it must be.
    """

    numbers: dict[str, Any]
    faults: list[str] = field(default_factory=list)


def build(folder: Path, idle: float) -> Path:
    """A repository with a tiny random Llama as a stream model, which Triton warms up."""
    tiny_llama(folder / "source")
    options = BuildOptions(
        slots=SLOTS, max_rows=ROWS, capacity=CAPACITY, chunk=16, idle_timeout=idle, serve="stream"
    )
    build_decoder(folder / "source", folder / "repository" / MODEL, options)
    reconfigure(folder / "repository" / MODEL, warmed)
    return folder / "repository"


def soak(
    folder: Path,
    *,
    seconds: float,
    seed: int,
    clients: int,
    songs: int = 200,
    idle: float = 8.0,
    growth: float = 0.02,
) -> Judgement:
    """Run one; the same seed lets the same clients do the same things, in another interleaving.

    Args:
        folder: an empty one, for the model and the server's log.
        seconds: how long new conversations begin.
        seed: of everything that clients do.
        clients: how many at a time.
        songs: different conversations.
        idle: the model's idle timeout, in seconds.
        growth: how much larger processes may be at the end than in the middle of the run, see
            `Memory.growth`.
    """
    repository = build(folder, idle)
    book = songbook(open_instance(repository / MODEL), seed, songs)
    with TritonServer(repository, Ports(0, 0, 0), log=folder / "log") as server:
        judgement = asyncio.run(_live(server, book, seconds, seed, clients, idle, growth))
        # 1 where Triton itself still counts sequences as live and gives up waiting for them
        judgement.numbers["server_exit_status"] = server.stop()
    return judgement


async def _live(
    server: TritonServer,
    book: list[Song],
    seconds: float,
    seed: int,
    clients: int,
    idle: float,
    growth: float,
) -> Judgement:
    assert server.log is not None
    skip = len(server.log.read_text(errors="replace").splitlines())
    tally, memory = Tally(), Memory(server)
    place = Place(server.grpc_url, MODEL, book, seed, idle, time.monotonic() + seconds)
    looking = asyncio.create_task(memory.look())
    begin = time.monotonic()
    await asyncio.gather(*(Client(place, number, tally).run() for number in range(clients)))
    took = time.monotonic() - begin
    looking.cancel()
    await asyncio.sleep(idle + 1.0)
    slots = await free_slots(server, MODEL, SLOTS)
    await asyncio.sleep(idle + FLUSH)
    live = metric(server, "inplace_sequences_live", MODEL)
    errors, unexplained = error_lines(server, tally.injected, skip)
    well = tally.finished["normal"] / max(1, tally.begun["normal"])
    judgement = Judgement(
        {
            "seconds": took,
            "conversations": dict(tally.begun),
            "came_to_their_end": dict(tally.finished),
            "well_behaved_finished": well,
            "tokens_compared": tally.collected,
            "wrong": tally.wrong,
            "cut_short": tally.cut_short[:50],
            "refused": dict(tally.refused),
            "slots_free_one_second_after_idle_timeout": slots,
            "slots": SLOTS,
            "idle_timeout": idle,
            "error_lines": errors,
            "error_lines_without_an_injected_id": unexplained,
            "memory": memory.growth() | {"seconds": memory.times, "bytes": memory.seen},
        }
    )
    judge = judgement.faults
    judge += tally.wrong + [f"unexplained ERROR line: {line}" for line in unexplained]
    if well < 0.95:
        judge.append(
            f"only {well:.1%} of the well-behaved conversations finished: {tally.cut_short[:10]}"
        )
    if slots != SLOTS or live != 0:
        judge.append(
            f"{slots} of {SLOTS} slots are free a second after the idle timeout; the "
            f"metrics say {live:.0f} live sequences"
        )
    for name, result in memory.growth().items():
        if result["growth"] > growth:
            judge.append(f"the {name}'s resident memory grew by {result['growth']:.1%}: {result}")
    return judgement
