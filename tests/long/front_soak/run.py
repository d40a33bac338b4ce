"""Random bodies, then clients that leave, for the OpenAI front end as a process; what is left."""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import psutil
from front_soak.clients import Client, Tally
from inplace_builder.served.decoder import build_decoder
from inplace_builder.tools.tritonserver import Ports, TritonServer
from soak.watch import metric
from support.fronts import Front
from support.openai_bodies import REQUESTS, check_answer
from support.served import MODEL, OPTIONS
from support.vocabulary import llama_with_tokenizer

EVERY = 1.0
"""Seconds between two looks at the front end."""

IN_FLIGHT = "inplace_openai_requests_in_flight"


@dataclass
class Judgement:
    """What was seen, and what of it must not be.

    Attributes:
        numbers: for the record.
        faults: empty where everything is as it must be.
    """

    numbers: dict[str, Any]
    faults: list[str] = field(default_factory=list)


@contextmanager
def front_process(
    server: TritonServer, repository: Path, log: Path
) -> Iterator[tuple[psutil.Popen, Front]]:
    """`inplace openai` as a process, which is ended; its log has what it did."""
    port = Ports(0).resolve().grpc
    command = [sys.executable, "-m", "inplace_builder", "openai", f"--port={port}"]
    command += [f"--server={server.grpc_url}", f"--model-repository={repository}"]
    with log.open("wb") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while f"running on http://127.0.0.1:{port}" not in log.read_text():
            assert process.is_running() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, Front(port)
    finally:
        with suppress(psutil.NoSuchProcess):  # it has ended, as it should
            process.kill()


def soak(folder: Path, *, bodies: int, seconds: float, clients: int, seed: int) -> Judgement:
    """Send bodies, then let clients live.

    Args:
        folder: an empty one, for the model and the logs.
        bodies: random ones, one after the other.
        seconds: for which clients begin something.
        clients: how many at a time.
        seed: of the bodies and of everything that clients do.
    """
    llama_with_tokenizer(folder / "source")
    build_decoder(folder / "source", folder / "repository" / MODEL, OPTIONS)
    repository, log = folder / "repository", folder / "front.log"
    with (
        TritonServer(repository, Ports(0, 0, 0), log=folder / "log") as server,
        front_process(server, repository, log) as (process, front),
    ):
        statuses, begin = fuzz(front, bodies, seed), time.monotonic()
        before = process.num_fds(), process.num_threads()
        tally, memory = asyncio.run(live(process, front, seconds, clients, seed))
        took = time.monotonic() - begin
        front.wait_for(IN_FLIGHT, 1)  # the one that asks
        live_sequences = settled(server)
        after = process.num_fds(), process.num_threads()
        process.terminate()
        status = process.wait(60)
    growth = grown(memory)
    numbers = {
        "bodies": {str(status): count for status, count in statuses.most_common()},
        "seconds": took,
        "behaviours": dict(tally.begun.most_common()),
        "statuses": {str(status): count for status, count in tally.statuses.most_common()},
        "tokens_of_whole_answers": tally.tokens,
        "wrong": tally.wrong[:50],
        "live_sequences_after": live_sequences,
        "open_files": {"before": before[0], "after": after[0]},
        "threads": {"before": before[1], "after": after[1]},
        "memory": {"growth": growth, "bytes": memory},
        "exit_status": status,
        "tracebacks": log.read_text(errors="replace").count("Traceback"),
    }
    faults = list(tally.wrong)
    for name, found, wanted in (
        ("sequences that are live", live_sequences, 0.0),
        ("exit status", status, 0),
        ("tracebacks in the log", numbers["tracebacks"], 0),
    ):
        if found != wanted:
            faults.append(f"{name}: {found}")
    if after[0] > before[0] + 3 or after[1] > before[1] + 8:
        faults.append(f"open files and threads: {before} before, {after} after")
    if growth > 0.05:
        faults.append(f"the resident memory grew by {growth:.1%} since the middle of the run")
    return Judgement(numbers, faults)


def fuzz(front: Front, bodies: int, seed: int) -> Counter[int]:
    """Send random bodies; every answer is a result or one of OpenAI's errors."""
    statuses: Counter[int] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=bodies,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(REQUESTS)
    def send(request: tuple[str, bytes]) -> None:
        statuses[check_answer(front, *request)] += 1

    if bodies:
        send()
    return statuses


async def live(
    process: psutil.Popen, front: Front, seconds: float, clients: int, seed: int
) -> tuple[Tally, list[int]]:
    """Let clients live; what they saw, and the front end's resident bytes over that time."""
    tally, until, seen = Tally(), time.monotonic() + seconds, list[int]()
    running = [
        asyncio.create_task(Client(front.port, f"{seed} {number}", until, tally).run())
        for number in range(clients)
    ]
    while not all(task.done() for task in running):
        seen.append(process.memory_info().rss)
        await asyncio.sleep(EVERY)
    await asyncio.gather(*running)
    return tally, seen


def grown(memory: list[int]) -> float:
    """The median of the last fifth over that of the third one, less 1."""
    fifth = max(1, len(memory) // 5)
    middle, last = memory[2 * fifth : 3 * fifth] or memory, memory[-fifth:]
    return statistics.median(last) / statistics.median(middle) - 1


def settled(server: TritonServer) -> float:
    """How many sequences live, once cancelled ones had the time to end."""
    deadline = time.monotonic() + 10
    while (
        found := metric(server, "inplace_sequences_live", MODEL)
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def dumps(record: dict[str, Any]) -> str:
    """The record as text, without the single looks at the memory."""
    memory = {name: value for name, value in record["memory"].items() if name != "bytes"}
    return json.dumps(record | {"memory": memory}, indent=1)
