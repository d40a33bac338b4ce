"""Steps of the engine without a server.

``python -m benchmarks.perf.engine MODEL/1 ROWS,ROWS STEPS`` prints medians in microseconds.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request

TOKEN, PROMPT = 5, 16


def median(instance: ModelInstance, rows: int, steps: int) -> float:
    """Of steps of so many rows, a token each, behind a prompt; seconds."""
    capacity = instance.manifest.capacity
    times = []
    for step in range(min(steps, (capacity or steps + 1) - PROMPT)):
        ids = torch.full((1, PROMPT if step == 0 else 1), TOKEN)
        requests = [
            instance.admit(Request(row + 1, step == 0, False, {"input_ids": ids}))
            for row in range(rows)
        ]
        begin = time.perf_counter()
        while unfinished := [request for request in requests if not request.finished]:
            instance.step(unfinished)
        times.append(time.perf_counter() - begin)
        for request in requests:
            instance.finish(request)
    return statistics.median(times[1:])


def main(folder: Path, rows: list[int], steps: int) -> None:
    """Measure and print."""
    instance = ModelInstance.open(folder, idle_timeout=float("inf"))
    for count in rows:
        print(f"median {median(instance, count, steps) * 1e6}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2].split(",")], int(sys.argv[3]))
