"""The load generator on tritonclient: so many clients, spread over processes."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

from benchmarks.perf.clients import Load, Measured

READY = 3.0
"""Seconds until all processes of clients must have begun."""


def run(load: Load) -> dict[str, Any]:
    """Drive the load and describe what was measured, in the schema of `benchmarks.perf`.

    Raises:
        RuntimeError: a process of clients failed.
    """
    processes = min(load.sequences, max(1, (os.cpu_count() or 2) // 2))
    load = replace(load, begin=time.time() + READY)
    parts = [
        load.sequences // processes + (number < load.sequences % processes)
        for number in range(processes)
    ]
    running = []
    for count in parts:
        part = replace(load, sequences=count, rate=load.rate and load.rate * count / load.sequences)
        command = [sys.executable, "-m", "benchmarks.perf.clients", json.dumps(asdict(part))]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    measured = []
    for process in running:
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a process of clients ended with status {process.returncode}")
        measured.append(Measured(**json.loads(output)))
    return described(measured, load.seconds)


def described(parts: list[Measured], seconds: float) -> dict[str, Any]:
    """All clients together: requests and tokens a second, times in microseconds."""
    latencies = [latency for part in parts for latency in part.latencies]
    result: dict[str, Any] = {
        "requests_per_second": len(latencies) / seconds,
        "latency_us": percentiles(latencies),
        "refused": sum(part.refused for part in parts),
    }
    errors = [part.error for part in parts if part.error]
    if errors:
        result["first_error"] = errors[0]
    gaps = [gap for part in parts for gap in part.gaps]
    if gaps:
        result["tokens_per_second"] = sum(part.tokens for part in parts) / seconds
        result["first_token_us"] = percentiles([first for part in parts for first in part.first])
        result["inter_token_us"] = percentiles(gaps)
    return result


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Mean, p50, p90 and p99 in microseconds; the smallest value that so many are at or below."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {"mean": statistics.fmean(ordered) * 1e6} | {
        f"p{level}": ordered[math.ceil(len(ordered) * level / 100) - 1] * 1e6
        for level in (50, 90, 99)
    }
