"""Device memory of a loaded engine against what it reports, and over many steps.

    python -m benchmarks.gpu.memory --out build/gpu [--shape 135m] [--rows 64] \
        [--capacity 1024] [--steps 10000]

The engine is built in one process and loaded in another, whose device memory the driver reports. A
bare CUDA context, with the same libraries loaded, is subtracted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.record import facts


def used() -> int:
    """Bytes in use on the device, as the driver counts them; nothing else may run on it."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def measure(folder: Path, rows: int, steps: int) -> dict[str, object]:
    """Load, step, compare."""
    from inplace.engines import NO_OTHER_THREADS
    from inplace.engines.arena import Arena
    from inplace.engines.tensorrt import TensorRtEngine
    from inplace.schema.files import EngineFolder
    from inplace.schema.served import Manifest
    from inplace.trt import load_tensorrt

    from benchmarks.gpu.engine import step_inputs

    load_tensorrt("tensorrt")
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    bare = used()
    manifest = Manifest.load(folder / "1")
    arena = Arena(manifest.states, manifest.slots, torch.device("cuda"))
    engine = TensorRtEngine(EngineFolder(folder / "1"), manifest, arena)
    inputs = step_inputs(manifest, engine, arena, [600] * rows, [1] * rows)
    engine.launch(inputs, {"next_token"})(NO_OTHER_THREADS)
    torch.cuda.synchronize()
    loaded, counted = used(), sum(engine.memory.values()) + arena.bytes
    history = []
    for step in range(steps):
        engine.launch(inputs, {"next_token"})(NO_OTHER_THREADS)
        if step % (steps // 10) == 0:
            history.append(used() - bare)
    weights = engine.memory["weights"] + int(manifest.built_with["weights_in_plan_bytes"])
    return facts(
        "device memory of a loaded engine against what it counts, and over many steps",
        "python -m benchmarks.gpu.memory",
    ) | {
        "bare_context_bytes": bare,
        "process_bytes": loaded - bare,
        "counted_bytes": counted,
        "difference": (loaded - bare - counted) / (loaded - bare),
        "parts": engine.memory | {"arena": arena.bytes},
        "engine_over_weights": sum(engine.memory.values()) / weights,
        "torch_reserved": torch.cuda.memory_reserved(),
        "torch_allocated": torch.cuda.memory_allocated(),
        "steps": steps,
        "process_bytes_over_steps": history,
    }


def main() -> None:
    """Build here, measure in a fresh process, write ``memory_<shape>.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument(
        "--engine", type=Path, help="measure this engine directory, in this process"
    )
    arguments = parser.parse_args()
    if arguments.engine is not None:
        result = measure(arguments.engine, arguments.rows, arguments.steps)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"memory_{arguments.shape}.json").write_text(
            json.dumps(result, indent=1) + "\n"
        )
        print(json.dumps(result, indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--shape",
            arguments.shape,
            "--rows",
            str(arguments.rows),
            "--steps",
            str(arguments.steps),
            "--out",
            str(arguments.out),
        ]
        code = (
            "import sys; from pathlib import Path; from benchmarks.gpu.engine import build; "
            "build(Path(sys.argv[1]), sys.argv[2], 'plugin', *map(int, sys.argv[3:]))"
        )
        subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                folder,
                arguments.shape,
                str(arguments.rows),
                str(arguments.capacity),
                "128",
            ],
            check=True,
        )
        engine = str(Path(folder) / "model")
        subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.memory", "--engine", engine, *options],
            check=True,
        )


if __name__ == "__main__":
    main()
