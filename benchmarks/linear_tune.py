# ruff: noqa: B023  the functions are called before the loop goes on
"""Block sizes of the linear kernels: times every layer of the benchmark shapes, and cuBLAS.

    for share in 0 1 2 3 4 5 6 7; do
        python -m benchmarks.linear_tune --compile-only --share $share/8 &
    done; wait
    python -m benchmarks.linear_tune --seconds 60

The loop fills Triton's cache on all cores; the last line then only times. Each configuration is
timed as a CUDA graph over enough copies of the weight that the L2 cache does not hold them.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable

import torch
import triton
from inplace.kernels.linear import (
    GemvBlocks,
    LinearBlocks,
    LinearSpec,
    PipelinedBlocks,
    SlicedKBlocks,
    choose_blocks,
    linear,
)

from benchmarks.gpu.bandwidth import bandwidth

LAYERS = {
    "135m qkv": LinearSpec(576, 960, norm=True, eps=1e-5),
    "135m out": LinearSpec(576, 576, residual=True),
    "135m gate-up": LinearSpec(576, 3072, norm=True, eps=1e-5, activation="silu", gated=True),
    "135m down": LinearSpec(1536, 576, residual=True),
    "1b qkv": LinearSpec(2048, 3072, norm=True, eps=1e-5),
    "1b out": LinearSpec(2048, 2048, residual=True),
    "1b gate-up": LinearSpec(2048, 16384, norm=True, eps=1e-5, activation="silu", gated=True),
    "1b down": LinearSpec(8192, 2048, residual=True),
    "1b head": LinearSpec(2048, 128256, norm=True, eps=1e-5, float_out=True),
    "135m head": LinearSpec(576, 49152, norm=True, eps=1e-5, float_out=True),
}
L2_BYTES = 120 << 20
CALLS = 40
GEMV = [
    GemvBlocks(n, k, w)
    for n, k, w in [
        (2, 2048, 2),
        (2, 1024, 2),
        (4, 256, 2),
        (4, 512, 2),
        (4, 1024, 2),
        (4, 1024, 4),
        (4, 2048, 4),
        (8, 512, 2),
    ]
]
SLICED_K = [
    SlicedKBlocks(n, k, w)
    for n, k, w in [
        (16, 64, 8),
        (16, 32, 8),
        (16, 64, 4),
        (16, 32, 4),
        (16, 128, 4),
        (16, 128, 2),
        (32, 32, 8),
        (32, 32, 4),
    ]
]
PIPELINED = {
    8: [
        PipelinedBlocks(16, 256, 4, 3),
        PipelinedBlocks(32, 256, 4, 5),
        PipelinedBlocks(64, 256, 4, 3),
        PipelinedBlocks(64, 128, 4, 5),
        PipelinedBlocks(64, 128, 8, 3),
    ],
    64: [
        PipelinedBlocks(16, 256, 4, 5),
        PipelinedBlocks(32, 128, 4, 5),
        PipelinedBlocks(64, 256, 4, 3),
        PipelinedBlocks(64, 128, 8, 3),
        PipelinedBlocks(64, 64, 4, 3),
    ],
}


def candidates(rows: int) -> list[LinearBlocks]:
    """The grid for a row count."""
    if rows == 1:
        return list(GEMV)
    return [*SLICED_K, *PIPELINED[8]] if rows <= 16 else list(PIPELINED[64])


def timed(launch: Callable[[int], object]) -> float:
    """Microseconds of one call, as a graph of `CALLS` calls."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        launch(0)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in range(CALLS):
            launch(call)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        graph.replay()
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 5 / CALLS * 1e3


def main() -> None:
    """Print the best few configurations of each layer and row count, then one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", default="1,8,64")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="launch every configuration once and time nothing",
    )
    parser.add_argument("--share", default="0/1", help="of the configurations: index/count")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    rate = 1.0 if arguments.compile_only else bandwidth()
    index, count = map(int, arguments.share.split("/"))
    layers = {name: LAYERS[name] for name in arguments.layers.split(",")}
    records = []
    for rows, (name, spec) in itertools.product(
        map(int, arguments.rows.split(",")), layers.items()
    ):
        if time.monotonic() > deadline:
            print("out of time before", rows, name)
            break
        copies = (
            1
            if arguments.compile_only
            else max(1, min(CALLS, L2_BYTES // (spec.inputs * spec.outputs * 2)))
        )
        weights = [
            torch.randn(spec.outputs, spec.inputs, device="cuda", dtype=torch.bfloat16)
            for _ in range(copies)
        ]
        x = torch.randn(rows, spec.inputs, device="cuda", dtype=torch.bfloat16)
        norm = torch.ones(spec.inputs, device="cuda", dtype=torch.bfloat16)
        residual = torch.randn(rows, spec.width, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(
            rows,
            spec.width,
            device="cuda",
            dtype=torch.float32 if spec.float_out else torch.bfloat16,
        )
        product = torch.empty(rows, spec.outputs, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        default, results = choose_blocks(spec, rows, 2), []
        grid = list(dict.fromkeys([*candidates(rows), *([] if default is None else [default])]))[
            index::count
        ]

        def run(call: int, blocks: LinearBlocks) -> None:
            linear(
                spec,
                x=x,
                weight=weights[call % copies],
                bias=None,
                norm=norm if spec.norm else None,
                residual=residual if spec.residual else None,
                out=out,
                workspace=0,
                tokens=rows,
                pdl=True,
                blocks=blocks,
            )

        for blocks in grid:
            if time.monotonic() > deadline:
                break
            try:
                if arguments.compile_only:
                    run(0, blocks)
                else:
                    results.append((timed(lambda call, b=blocks: run(call, b)), str(blocks)))  # type: ignore[misc]
            except (
                triton.runtime.errors.OutOfResources,
                triton.compiler.errors.CompilationError,
                RuntimeError,
            ) as error:
                print(name, rows, blocks, type(error).__name__, str(error)[:100])
        if arguments.compile_only:
            continue
        cublas = timed(lambda call: torch.mm(x, weights[call % copies].t(), out=product))
        floor = spec.inputs * spec.outputs * 2 / rate * 1e6
        results.sort()
        print(
            f"{name} rows {rows}: floor {floor:.1f} cuBLAS {cublas:.1f} "
            f"(default {default or 'cuBLAS'}) |",
            *(f"{us:.1f} {blocks}" for us, blocks in results[:5]),
            flush=True,
        )
        records.append(
            {
                "layer": name,
                "rows": rows,
                "floor_us": floor,
                "cublas_us": cublas,
                "default": str(default),
                "best": results,
            }
        )
    torch.cuda.synchronize()
    if not arguments.compile_only:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
