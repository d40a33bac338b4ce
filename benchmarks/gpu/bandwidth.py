"""How fast this GPU copies its own memory: what a step of few rows cannot beat."""

import subprocess
import sys

import torch

from benchmarks.record import ROOT

COPIED = 4 << 30
"""Bytes copied, many times what an L2 cache holds."""


def bandwidth() -> float:
    """Bytes a second of a device-to-device copy, reads and writes counted.

    The best of ten copies of 4 GB, measured in a process of its own.

    Raises:
        subprocess.CalledProcessError: there is no GPU.
    """
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.bandwidth"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    return float(output.split()[-1])


def main() -> None:
    """Print the bandwidth."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    times = []
    for _ in range(11):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    print(2 * COPIED / min(times[1:]))


if __name__ == "__main__":
    main()
