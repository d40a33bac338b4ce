"""Where a decode step's time goes: kernels of replayed steps, by name, with PyTorch's profiler.

    python -m benchmarks.gpu.profile --out build/gpu [--shape 135m] [--rows 1] \
        [--capacity 1024] [--length 600]

Prints the largest kernels and writes all of them to the folder ``--out``.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from inplace.engines.arena import Arena
from inplace.engines.tensorrt import TensorRtEngine
from torch.profiler import ProfilerActivity

from benchmarks.gpu.engine import build, opened, step_inputs
from benchmarks.record import facts

STEPS = 20


def main() -> None:
    """Profile and write ``profile_<shape>_b<rows>.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--rows", default="1", help="numbers of rows, separated by commas")
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--length", type=int, default=600)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.rows.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), arguments.shape, "plugin", max(counts), arguments.capacity, 1)
        manifest, arena, engine = opened(Path(folder))
        arguments.out.mkdir(parents=True, exist_ok=True)
        for rows in counts:
            inputs = step_inputs(manifest, engine, arena, [arguments.length] * rows, [1] * rows)
            result = facts(
                "kernels of one decode step, bfloat16, by PyTorch's profiler",
                "python -m benchmarks.gpu.profile",
            )
            result |= profiled(engine, arena, inputs) | {
                "shape": arguments.shape,
                "rows": rows,
                "capacity": arguments.capacity,
                "length": arguments.length,
            }
            (arguments.out / f"profile_{arguments.shape}_b{rows}.json").write_text(
                json.dumps(result, indent=1) + "\n"
            )
            print(
                f"{arguments.shape} B{rows}: {result['step_us']:.0f} us a step, "
                f"kernels {result['kernel_us']:.0f} us"
            )
            for kernel in result["kernels"][:14]:
                print(f"  {kernel['us']:8.1f} us {kernel['count']:6.1f} x {kernel['name'][:90]}")


def profiled(
    engine: TensorRtEngine, arena: Arena, inputs: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Microseconds and launches of each kernel in a step, and of the step without profiler."""
    alone = engine.time(inputs, STEPS)
    with torch.profiler.profile(
        activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]
    ) as profile:
        engine.time(inputs, STEPS)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if str(event.device_type).endswith("CUDA") and event.device_time > 0:
            times[event.name].append(event.device_time)
    steps = STEPS + 1
    kernels: list[dict[str, Any]] = [
        {
            "name": name,
            "us": sum(durations) / steps,
            "count": len(durations) / steps,
            "each_us": sum(durations) / len(durations),
        }
        for name, durations in times.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["us"])
    return {
        "step_us": alone,
        "kernel_us": sum(kernel["us"] for kernel in kernels),
        "launches": sum(kernel["count"] for kernel in kernels),
        "arena_bytes": arena.bytes,
        "kernels": kernels,
    }


if __name__ == "__main__":
    main()
