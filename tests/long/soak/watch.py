"""The server while it is soaked: its memory, its log, its slots."""

import asyncio
import re
import statistics
import time
import urllib.request
from collections.abc import Iterable

import psutil
from inplace_builder.tools.tritonserver import TritonServer
from soak.line import Line, RefusedError

EVERY = 2.0
"""Seconds between two looks at the memory."""
MIB = 1 << 20


class Memory:
    """Resident bytes of the server's process and of its backend's, over time."""

    def __init__(self, server: TritonServer) -> None:
        assert server.process is not None
        parent = psutil.Process(server.process.pid)
        stubs = [child for child in parent.children(recursive=True) if "stub" in child.name()]
        self.processes = {"server": parent} | {
            f"stub {number}": stub for number, stub in enumerate(stubs)
        }
        self.times: list[float] = []
        self.seen: dict[str, list[int]] = {name: [] for name in self.processes}

    async def look(self) -> None:
        """Look every `EVERY` seconds until cancelled."""
        begin = time.monotonic()
        while True:
            self.times.append(round(time.monotonic() - begin, 1))
            for name, process in self.processes.items():
                self.seen[name].append(process.memory_info().rss)
            await asyncio.sleep(EVERY)

    def growth(self) -> dict[str, dict[str, float]]:
        """The median of the run's last fifth over that of its third fifth, less 1."""
        result = {}
        for name, values in self.seen.items():
            fifth = max(1, len(values) // 5)
            middle, last = (
                statistics.median(values[2 * fifth : 3 * fifth]),
                statistics.median(values[-fifth:]),
            )
            result[name] = {
                "middle_mib": middle / MIB,
                "last_mib": last / MIB,
                "growth": last / middle - 1,
            }
        return result


def error_lines(server: TritonServer, injected: Iterable[str], skip: int) -> tuple[int, list[str]]:
    """ERROR lines of the log after the first ``skip``: how many, and those without these ids."""
    assert server.log is not None
    lines = [
        line
        for line in server.log.read_text(errors="replace").splitlines()[skip:]
        if re.match(r"E\d{4} ", line)
    ]
    known = set(injected)
    return len(lines), [
        line for line in lines if not known.intersection(re.findall(r"[a-z]+-\d+-\d+", line))
    ]


async def free_slots(server: TritonServer, model: str, slots: int, lines: int = 16) -> int:
    """How many of ``slots`` new sequences, begun at the same time, get a slot; all are ended."""

    async def hold(number: int) -> int:
        line, owned = Line(server.grpc_url, model), 0
        names = [f"held-{index}" for index in range(number, slots, lines)]
        for start in (True, False):
            for name in names:
                try:
                    await line.collect(line.request([1], name, start=start, end=not start))
                    owned += start
                except RefusedError as error:
                    if "INPLACE-" not in str(error) and "must specify the START flag" not in str(
                        error
                    ):
                        raise
        await line.close()
        return owned

    return sum(await asyncio.gather(*map(hold, range(lines))))


def metric(server: TritonServer, name: str, model: str) -> float:
    """One of the backend's metrics."""
    with urllib.request.urlopen(
        f"http://{server.host}:{server.ports.metrics}/metrics", timeout=10
    ) as page:
        text = page.read().decode()
    return sum(
        map(
            float, re.findall(rf'^{name}{{[^}}]*model="{model}"[^}}]*}} (\S+)$', text, re.MULTILINE)
        )
    )
