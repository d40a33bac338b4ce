"""Streams in the engine alone: the requests of clients that speak in real time, without a server.

    python -m benchmarks.streams.alone FOLDER STREAMS,STREAMS… SECONDS LIMIT

prints a line of JSON for each number of streams, up to the first that does not keep up, or that
would end more than LIMIT seconds after the start.
"""

import json
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from inplace.protocol import AUDIO, SAMPLE_RATE
from inplace.runtime.audio import audio_spec
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance

from benchmarks.perf.generator import percentiles

Line = dict[str, Any]

WARM_UP = 2.0
"""Seconds that are not measured."""


@dataclass
class Result:
    """What was measured.

    Attributes:
        latencies: seconds from when a chunk was complete until its answer.
        calls: of programs, by name.
        tokens: that were answered.
        late: chunks that were complete before the stream's last one was answered.
        seconds: where the time went: to admit requests, and by program to launch calls, to wait for
            them, and to advance their rows.
    """

    latencies: list[float] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    late: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def took(self, what: str, since: float) -> float:
        """Add what has taken time since then; the present time."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - since
        return now


class Streams:
    """So many streams, whose chunks are complete at evenly spaced times.

    Args:
        folder: the version folder of an engine with a slot for each stream.
    """

    def __init__(self, folder: Path) -> None:
        self.instance = ScheduledInstance.open(folder, idle_timeout=float("inf"))
        audio = audio_spec(self.instance.program)
        assert audio is not None
        assert audio.sample_rate is not None
        self.samples, self.rate = audio.shape[0], audio.sample_rate
        self.chunk_seconds = self.samples / self.rate
        self._chunks = 0.1 * torch.randn(64, 1, self.samples)

    def run(self, streams: int, seconds: float) -> Result:
        """Measure for so many seconds."""
        with self.instance.engine.on_stream():
            return self._run(streams, seconds)

    def _run(self, streams: int, seconds: float) -> Result:
        result, waiting = Result(), deque[ActiveRequest]()
        begin, due = time.perf_counter(), 0
        until = begin + WARM_UP + seconds
        busy: dict[int, float] = {}
        while (now := time.perf_counter()) < until:
            while (at := begin + due / streams * self.chunk_seconds) <= now:
                stream = due % streams + 1
                if stream in busy:
                    result.late += at >= begin + WARM_UP
                else:
                    before = time.perf_counter()
                    waiting.append(self._admit(stream, first=due < streams))
                    busy[stream] = at
                    result.took("admit", before)
                due += 1
            if waiting:
                self._call(waiting, busy, result, begin + WARM_UP)
        while waiting:
            self._call(waiting, busy, result, float("inf"))
        return result

    def _admit(self, stream: int, *, first: bool) -> ActiveRequest:
        chunk = self._chunks[random.randrange(len(self._chunks))]
        request = Request(
            stream,
            first,
            False,
            {AUDIO: chunk},
            parameters={SAMPLE_RATE: self.rate},
            requested_outputs=frozenset({"tokens"}),
        )
        return self.instance.admit(request)

    def _call(
        self, waiting: deque[ActiveRequest], busy: dict[int, float], result: Result, since: float
    ) -> None:
        """Call a program; answer what is finished, put the others back behind the waiting ones."""
        rows = self.instance.next_rows(waiting)
        called = set(rows)
        left = [active for active in waiting if active not in called]
        assert rows[0].progress is not None
        name = rows[0].progress.next_call.program
        now = time.perf_counter()
        step = self.instance.launch(rows)
        now = result.took(f"launch {name}", now)
        outputs = self.instance.wait(step)
        now = result.took(f"wait for {name}", now)
        self.instance.advance(step, outputs)
        result.took(f"advance {name}", now)
        result.calls[name] = result.calls.get(name, 0) + 1
        waiting.clear()
        waiting.extend(left)
        for active in rows:
            if not active.finished:
                waiting.append(active)
                continue
            if active.error is not None:
                raise active.error
            tokens = active.outputs["tokens"]
            self.instance.finish(active)
            at = busy.pop(int(active.sequence.id))
            if at >= since:
                result.tokens += tokens.shape[1]
                result.latencies.append(time.perf_counter() - at)


def line(where: str, streams: int, chunk_seconds: float, latencies: list[float], late: int) -> Line:
    """A line of the result: whether so many streams keep up."""
    times = percentiles(latencies)
    return {
        "where": where,
        "streams": streams,
        "chunk_ms": chunk_seconds * 1e3,
        "latency_us": times,
        "late": late,
        "keeps_up": not late and bool(times) and times["p99"] < chunk_seconds * 1e6,
    }


def main() -> None:
    """Measure numbers of streams."""
    begin = time.perf_counter()
    folder, counts, seconds, limit = parse(sys.argv[1:])
    streams = Streams(folder / "1")
    print(f"loaded in {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    for count in counts:
        if time.perf_counter() - begin + WARM_UP + seconds > limit:
            break
        result = streams.run(count, seconds)
        measured = line("alone", count, streams.chunk_seconds, result.latencies, result.late)
        audio_seconds = len(result.latencies) * streams.chunk_seconds
        measured |= {
            "calls": result.calls,
            "seconds": {what: round(each, 3) for what, each in result.seconds.items()},
            "tokens_per_second": result.tokens / audio_seconds if audio_seconds else 0.0,
        }
        print(json.dumps(measured), flush=True)
        if not measured["keeps_up"]:
            break


def parse(arguments: list[str]) -> tuple[Path, list[int], float, float]:
    """The folder, the numbers of streams, the seconds of each, and the limit."""
    folder, counts, seconds, limit = arguments
    return Path(folder), [int(count) for count in counts.split(",")], float(seconds), float(limit)


if __name__ == "__main__":
    main()
