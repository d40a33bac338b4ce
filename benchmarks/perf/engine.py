"""A step of the engine without a server: ``python -m benchmarks.perf.engine MODEL/1 ROWS STEPS`` prints its median in microseconds."""

import statistics
import sys
import time
from pathlib import Path

import torch
from inplace.instance import ModelInstance
from inplace.requests import Request

TOKEN, PROMPT = 5, 16


def main(folder: Path, rows: int, steps: int) -> None:
    """Measure and print."""
    instance = ModelInstance.open(folder, idle_timeout=float("inf"))
    manifest = instance.manifest
    times = []
    for step in range(min(steps, (manifest.capacity or steps + 1) - PROMPT)):
        ids = torch.full((1, PROMPT if step == 0 else 1), TOKEN)
        works = [instance.admit(Request(row + 1, step == 0, False, {"input_ids": ids})) for row in range(rows)]
        begin = time.perf_counter()
        while pending := [work for work in works if not work.finished]:
            instance.step(pending)
        times.append(time.perf_counter() - begin)
        for work in works:
            instance.finish(work)
    print(statistics.median(times[1:]) * 1e6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
