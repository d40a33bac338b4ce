# ruff: noqa: B023  the functions are called before the loop goes on
"""Block sizes of the linear kernels: times every layer of the benchmark shapes over a small grid, and cuBLAS beside it.

    python benchmarks/linear_tune.py [--seconds 90]

Each configuration is timed as a CUDA graph over enough copies of the weight that the L2 cache does not hold them.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable

import torch
import triton
from inplace.kernels import linear as kernels
from inplace.kernels.linear import LinearSpec

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
GEMV = [(n, k, w) for n in (2, 4, 8, 16) for k in (512, 1024, 2048) for w in (2, 4, 8) if 2048 <= n * k <= 16384]
SKINNY = [
    (n, k, w, s) for n in (16, 32, 64) for k in (64, 128, 256) for w in (4, 8) for s in (3, 5) if n * k >= 2048 and n * k * s <= 65536
]


def timed(work: Callable[[int], object]) -> float:
    """Microseconds of one call, as a graph of `CALLS` calls."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work(0)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in range(CALLS):
            work(call)
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
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--rows", default="1,8,64")
    parser.add_argument("--layers", default=",".join(LAYERS), help="names; a process a layer at the same time fills Triton's cache faster")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    layers = {name: LAYERS[name] for name in arguments.layers.split(",")}
    found = []
    for rows, (name, spec) in itertools.product(map(int, arguments.rows.split(",")), layers.items()):
        if time.monotonic() > deadline:
            print("out of time before", rows, name)
            break
        copies = max(1, min(CALLS, L2_BYTES // (spec.inputs * spec.outputs * 2)))
        weights = [torch.randn(spec.outputs, spec.inputs, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        x = torch.randn(rows, spec.inputs, device="cuda", dtype=torch.bfloat16)
        norm = torch.ones(spec.inputs, device="cuda", dtype=torch.bfloat16)
        residual = torch.randn(rows, spec.width, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(rows, spec.width, device="cuda", dtype=torch.float32 if spec.float_out else torch.bfloat16)
        product = torch.empty(rows, spec.outputs, device="cuda", dtype=torch.bfloat16)
        chosen, results = kernels.gemv_blocks if rows == 1 else kernels.skinny_blocks, []
        kernels.SKINNY_ROWS, kept = 64, kernels.SKINNY_ROWS
        grid: list[tuple[int, ...]] = list(GEMV if rows == 1 else SKINNY)

        def run(call: int) -> None:
            kernels.linear(
                spec, x=x, weight=weights[call % copies], bias=None, norm=norm if spec.norm else None,
                residual=residual if spec.residual else None, out=out, workspace=0, tokens=rows, pdl=True,
            )  # fmt: skip

        for blocks in grid:
            if time.monotonic() > deadline:
                break
            setattr(kernels, chosen.__name__, lambda *_, b=blocks: b)
            try:
                results.append((timed(run), blocks))
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
                print(name, rows, blocks, type(error).__name__, str(error)[:100])
        setattr(kernels, chosen.__name__, chosen)
        kernels.SKINNY_ROWS = kept
        cublas = timed(lambda call: torch.mm(x, weights[call % copies].t(), out=product))
        floor = spec.inputs * spec.outputs * 2 / 3.02e12 * 1e6
        results.sort()
        print(
            f"{name} rows {rows}: floor {floor:.1f} cuBLAS {cublas:.1f} |",
            *(f"{us:.1f} {blocks}" for us, blocks in results[:4]),
            flush=True,
        )
        found.append({"layer": name, "rows": rows, "floor_us": floor, "cublas_us": cublas, "best": results[:6]})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
