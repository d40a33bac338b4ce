"""Loads spread over processes of clients, and what they measured, in one schema for all targets."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import psutil

from benchmarks.generation.arrivals import Arrivals
from benchmarks.generation.burst import Burst
from benchmarks.generation.chat_users import Chats
from benchmarks.perf import generator
from benchmarks.record import ROOT

STARTED, PREPARED = 2.5, 4.0
"""Seconds after which all client processes have begun, and have many long prompts ready.

Where that is not so, ``late_s`` in the results says it.
"""

PARTS = "benchmarks.generation."
"""The package of the modules that are processes of clients."""


def run_burst(load: Burst, processes: int) -> list[dict[str, Any]]:
    """All generations of a burst; times from its beginning.

    Raises:
        RuntimeError: a process of clients failed.
    """
    load = replace(load, begin=time.time() + STARTED)
    parts = [
        replace(load, first=load.first + first, streams=count)
        for first, count in _divided(load.streams, processes)
    ]
    return _from_beginning(_spread("burst", parts), load.begin)


def run_arrivals(load: Arrivals, processes: int) -> list[dict[str, Any]]:
    """All generations of requests that arrive at random; times from the beginning.

    Raises:
        RuntimeError: a process of clients failed.
    """
    load = replace(load, begin=time.time() + PREPARED, parts=processes)
    parts = [replace(load, part=part) for part in range(processes)]
    return _from_beginning(_spread("arrivals", parts), load.begin)


def run_chats(load: Chats, processes: int) -> list[dict[str, Any]]:
    """All turns of all users, those of a user one after the other; times from the beginning.

    Raises:
        RuntimeError: a process of clients failed.
    """
    load = replace(load, begin=time.time() + STARTED)
    parts = [
        replace(load, first=load.first + first, users=count)
        for first, count in _divided(load.users, processes)
    ]
    return _from_beginning(_spread("chat_users", parts), load.begin)


def _divided(count: int, processes: int) -> list[tuple[int, int]]:
    """The first of each process's share of a count, and how many it has; no share is empty."""
    processes = min(processes, count)
    bounds = [count * number // processes for number in range(processes + 1)]
    return [(first, end - first) for first, end in pairwise(bounds)]


def _spread(module: str, parts: Sequence[Burst | Arrivals | Chats]) -> list[dict[str, Any]]:
    running = [
        subprocess.Popen(
            [sys.executable, "-m", PARTS + module, json.dumps(asdict(part))],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for part in parts
    ]
    outputs = [process.communicate()[0] for process in running]
    for process in running:
        if process.returncode:
            raise RuntimeError(f"a client process ended with status {process.returncode}")
    return [one for output in outputs for one in json.loads(output)]


def _from_beginning(generations: list[dict[str, Any]], begin: float) -> list[dict[str, Any]]:
    for one in generations:
        one["sent"] -= begin
        one["responses"] = [(at - begin, tokens) for at, tokens in one["responses"]]
    return generations


def described(generations: Sequence[dict[str, Any]], end: float = 0.0) -> dict[str, Any]:
    """Tokens a second, and times in microseconds.

    A response of k tokens counts as k times a k-th of the time since the one before it. A request
    that was given up at ``end`` counts with the time until then as that to its first token.
    """
    whole = [one for one in generations if not one.get("error")]
    seconds = max((one["responses"][-1][0] for one in whole), default=0.0)
    tokens = sum(count for one in whole for _, count in one["responses"])
    first = [one["responses"][0][0] - one["sent"] for one in whole]
    first += [end - one["sent"] for one in generations if one.get("error")]
    result = {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "first_token_us": generator.percentiles(first),
        "inter_token_us": generator.percentiles(gaps(whole)),
        "tokens_per_response": tokens / max(1, sum(len(one["responses"]) for one in whole)),
        "late_s": max(one["late"] for one in generations),
    }
    if errors := [one["error"] for one in generations if one.get("error")]:
        result |= {"not_answered": len(errors), "first_error": errors[0]}
    return result


def gaps(generations: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds between tokens."""
    found: list[float] = []
    for one in generations:
        for (last, _), (at, tokens) in zip(one["responses"], one["responses"][1:], strict=False):
            found += [(at - last) / tokens] * tokens if tokens else []
    return found


def requests_per_second(generations: Sequence[dict[str, Any]]) -> float:
    """How many generations end in a second while a server is saturated.

    Between the ends of a tenth and of nine tenths of those that began at once.
    """
    ends: list[float] = sorted(
        one["responses"][-1][0] for one in generations if not one.get("error")
    )
    low, high = len(ends) // 10, len(ends) * 9 // 10
    if high <= low or ends[high] <= ends[low]:
        raise RuntimeError(f"{len(ends)} generations of {len(generations)} ended")
    return (high - low) / (ends[high] - ends[low])


def cpu_seconds(process: int) -> float:
    """Processor time of a process so far, and of those that it started."""
    front = psutil.Process(process)
    times = [each.cpu_times() for each in (front, *front.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))
