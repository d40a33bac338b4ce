"""Step times of our TensorRT engines.

    python -m benchmarks.gpu.engine --shape 1b --alias plugin --capacity 1024 \
        --cases 1x600,8x600,64x600 --prefill 512

One capacity and mechanism a process, one line of JSON for each step.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from inplace.engines.arena import Arena
from inplace.engines.tensorrt import TensorRtEngine
from inplace.runtime.batcher import ActiveRequest, form_batch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest
from inplace.schema.specs import AliasKind, Dtype
from inplace_builder import DecoderOptions, capture_decoder
from inplace_builder.served.build import write_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions

from benchmarks.gpu.measurement import Measurement
from benchmarks.gpu.shapes import random_model

REPEATS, STEPS = 5, 100
ENGINES = (
    Path(os.environ["INPLACE_BENCH_ENGINES"]) if "INPLACE_BENCH_ENGINES" in os.environ else None
)
"""Engines built beforehand, side by side, so that the benchmark only has to load them."""


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", required=True)
    parser.add_argument("--alias", default="plugin", choices=("plugin", "copy"))
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument(
        "--cases", default="1x600", help="rows x positions that each holds, separated by commas"
    )
    parser.add_argument(
        "--prefill", type=int, default=0, help="also time a prompt of so many tokens"
    )
    parser.add_argument(
        "--engines",
        type=Path,
        default=ENGINES,
        help="keep what was built here, and take what is kept",
    )
    parser.add_argument("--build-only", action="store_true")
    arguments = parser.parse_args()
    cases = [tuple(map(int, case.split("x"))) for case in arguments.cases.split(",")]
    max_rows = max(rows for rows, _ in cases)
    with tempfile.TemporaryDirectory() as folder:
        kept = (
            f"{arguments.shape}-{arguments.alias}-c{arguments.capacity}-b{max_rows}"
            f"-p{arguments.prefill}"
        )
        place = arguments.engines / kept if arguments.engines is not None else Path(folder)
        before = time.perf_counter()
        if not (place / "model").exists():
            place.mkdir(parents=True, exist_ok=True)
            build(
                place,
                arguments.shape,
                arguments.alias,
                max_rows,
                arguments.capacity,
                max(arguments.prefill, 1),
            )
            (place / "build_seconds").write_text(str(time.perf_counter() - before))
        if arguments.build_only:
            return
        manifest, arena, engine = opened(place)
        built = float((place / "build_seconds").read_text())
        for rows, length in cases:
            report(arguments, manifest, engine, arena, [length] * rows, [1] * rows, built)
        if arguments.prefill:
            report(arguments, manifest, engine, arena, [0], [arguments.prefill], built)


def build(
    folder: Path, shape: str, alias: AliasKind, rows: int, capacity: int, chunk: int
) -> Manifest:
    """Build a randomly weighted model of this shape, a slot for each row.

    It is verified against transformers on the GPU.
    """
    model = random_model(shape, torch.bfloat16, "cpu")
    options = BuildOptions(
        dtype=Dtype.BFLOAT16,
        device="cuda",
        slots=rows,
        max_rows=rows,
        capacity=capacity,
        chunk=chunk,
        step_tokens=max(rows, chunk),
        engine="tensorrt",
        alias=alias,
    )
    capture = capture_decoder(model, DecoderOptions(capacity, rows, chunk, options.max_tokens))
    model.to("cuda")  # the reference of the verification
    return write_engine(capture, folder / "model", options)


def opened(place: Path) -> tuple[Manifest, Arena, TensorRtEngine]:
    """Load what `build` wrote; states hold random numbers."""
    torch.cuda.empty_cache()
    manifest = Manifest.load(place / "model" / MODEL_VERSION)
    arena = Arena(manifest.states, manifest.slots, torch.device("cuda"))
    engine = TensorRtEngine(EngineFolder(place / "model" / MODEL_VERSION), manifest, arena)
    for tensor in arena.tensors.values():
        tensor.normal_()
    torch.cuda.synchronize()
    return manifest, arena, engine


def report(
    arguments: argparse.Namespace,
    manifest: Manifest,
    engine: TensorRtEngine,
    arena: Arena,
    lengths: list[int],
    tokens: list[int],
    built: float,
) -> None:
    """Time one step and print its line."""
    inputs = step_inputs(manifest, engine, arena, lengths, tokens)
    times = [engine.time(inputs, STEPS) for _ in range(REPEATS)]
    cached = sum(length + count for length, count in zip(lengths, tokens, strict=True))
    position = sum(state.slot_bytes for state in manifest.states) // arguments.capacity
    weights = engine.memory["weights"] + int(manifest.built_with["weights_in_plan_bytes"])
    measurement = Measurement(
        engine=f"inplace-{arguments.alias}",
        shape=arguments.shape,
        rows=len(lengths),
        capacity=arguments.capacity,
        length=max(lengths),
        tokens=sum(tokens),
        kind="decode" if max(tokens) == 1 else "prefill",
        us=statistics.median(times),
        us_min=min(times),
        repeats=REPEATS,
        weight_bytes=weights,
        cache_bytes_read=cached * position,
        memory=engine.memory | {"arena": arena.bytes},
        build_s=built,
    )
    print(json.dumps(measurement.record()), flush=True)


def step_inputs(
    manifest: Manifest, engine: TensorRtEngine, arena: Arena, lengths: list[int], tokens: list[int]
) -> dict[str, torch.Tensor]:
    """The inputs of a step of sequences with so many cached positions and new tokens."""
    instance = ModelInstance(manifest, arena, engine, idle_timeout=float("inf"))
    requests: list[ActiveRequest] = []
    for row, (length, count) in enumerate(zip(lengths, tokens, strict=True)):
        ids = torch.randint(0, 1000, (1, count))
        request = instance.admit(Request(row + 1, start=True, end=False, inputs={"input_ids": ids}))
        request.sequence.length = length
        requests.append(request)
    return form_batch(manifest.program("step"), requests).inputs


if __name__ == "__main__":
    main()
