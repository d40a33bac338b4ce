"""Block sizes of the kernels for a mixture of experts: times the layers of two published models.

    python -m benchmarks.grouped_tune > benchmarks/results/gpu_grouped_blocks.txt

Processes fill Triton's cache on all cores first; then each configuration is timed as a CUDA graph.
For each layer and number of tokens: the times that the bytes of the used experts and the products
take, that of `choose_blocks`, and the fastest configurations, with the relative error of their
results, beside a product for each expert by PyTorch.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from inplace.kernels.grouped_linear import (
    MAX_FEW_PAIRS,
    GroupedBlocks,
    GroupedLinearSpec,
    choose_blocks,
    grouped_linear,
    grouped_linear_workspace,
)
from inplace.operators.grouped_linear import _grouped_linear
from torch import Tensor

from benchmarks.gpu.bandwidth import bandwidth

LAYERS = {
    "Mixtral-8x7B up": (GroupedLinearSpec(4096, 28672, 8, activation="silu", gated=True), 2),
    "Mixtral-8x7B down": (GroupedLinearSpec(14336, 4096, 8), 2),
    "Qwen3-30B-A3B up": (GroupedLinearSpec(2048, 1536, 128, activation="silu", gated=True), 8),
    "Qwen3-30B-A3B down": (GroupedLinearSpec(768, 2048, 128), 8),
}
"""A layer, and the experts of a token."""

FEW = [
    (16, 256, 4, 3),
    (32, 64, 4, 4),
    (32, 128, 4, 3),
    (32, 128, 4, 4),
    (32, 256, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 3),
    (64, 64, 8, 4),
    (64, 128, 8, 3),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (32, 64, 2, 6),
]
"""Outputs of a program, inputs of a round, warps, stages."""

MANY = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
    (256, 64, 64, 8, 4),
]
WIDE = [
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (64, 256, 64, 8, 4),
]
"""Rows and outputs of a program, inputs of a round, warps, stages; the second of layers without a
gate, which have one sum for each output instead of two."""

TOGETHER = (1, 4, 16, 64)
"""Tiles that take the same outputs one after another."""


def configurations(spec: GroupedLinearSpec, pairs: int, tokens: int) -> Iterator[GroupedBlocks]:
    """What is tried."""
    if pairs <= MAX_FEW_PAIRS:
        for m in [16] if tokens <= 8 else [16, 32, 64]:
            for n, k, warps, stages in FEW:
                yield GroupedBlocks(m, n, k, warps, stages)
        return
    for m, n, k, warps, stages in MANY if spec.gated else MANY + WIDE:
        for rest, rows_first in product((0, 16, 32, 64), (False, True)):
            if rest < m:
                yield GroupedBlocks(m, n, k, warps, stages, rest, rows_first=rows_first)


def layer(
    spec: GroupedLinearSpec, chosen: int, tokens: int
) -> tuple[Callable[[GroupedBlocks], Tensor], Callable[[], Tensor], int]:
    """A call of one layer, the same by PyTorch, and the bytes of the experts that it uses."""
    torch.manual_seed(0)
    weight = torch.randn(spec.experts, spec.outputs, spec.inputs, device="cuda").bfloat16() * 0.02
    shape = (tokens, spec.inputs) if spec.gated else (tokens, chosen, spec.inputs)
    x = torch.randn(shape, device="cuda").bfloat16()
    ids = torch.randn(tokens, spec.experts, device="cuda").topk(chosen).indices
    out = x.new_empty(tokens, chosen, spec.width)
    scratch = grouped_linear_workspace(spec, tokens * chosen) // 4
    workspace = torch.empty(max(1, scratch), dtype=torch.int32, device="cuda")

    def call(blocks: GroupedBlocks) -> Tensor:
        grouped_linear(
            spec,
            x=x,
            expert_ids=ids,
            weight=weight,
            bias=None,
            out=out,
            workspace=workspace,
            tokens=tokens,
            experts_per_token=chosen,
            shared=spec.gated,
            blocks=blocks,
        )
        return out

    by_torch = partial(
        _grouped_linear, x, ids, weight, activation=spec.activation, gated=spec.gated
    )
    return call, by_torch, len(ids.unique()) * spec.inputs * spec.outputs * 2


def cases(tokens: list[int]) -> Iterator[tuple[str, GroupedLinearSpec, int, int]]:
    """Name, layer, experts of a token and tokens."""
    for name, (spec, chosen) in LAYERS.items():
        for count in tokens:
            yield name, spec, chosen, count


def compile_share(tokens: list[int], share: int, of: int) -> None:
    """Compile every ``of``-th configuration."""
    number = 0
    for _, spec, chosen, count in cases(tokens):
        call, _, _ = layer(spec, chosen, count)
        for blocks in configurations(spec, count * chosen, count):
            number += 1
            if number % of == share:
                attempt(call, blocks)
        del call
        torch.cuda.empty_cache()


def attempt(call: Callable[[GroupedBlocks], Tensor], blocks: GroupedBlocks) -> Tensor | None:
    """The result; None if the blocks do not fit into the GPU's shared memory."""
    from triton.runtime.errors import OutOfResources

    try:
        return call(blocks)
    except OutOfResources:
        return None


def microseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The time of a call in a CUDA graph of many."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * float(begin.elapsed_time(end)) / repeats


def on_all_cores(*command: str) -> None:
    """Run a module of Python with ``--share I/N`` in one process for each core but two."""
    count = max(1, (os.cpu_count() or 2) - 2)
    begin = [sys.executable, "-m", *command, "--share"]
    for process in [subprocess.Popen([*begin, f"{i}/{count}"]) for i in range(count)]:
        process.wait()


def product_rate() -> float:
    """Operations a second of a large product in bfloat16 by PyTorch."""
    extent = 8192
    a, b = (torch.randn(extent, extent, device="cuda").bfloat16() for _ in range(2))
    return 2e6 * extent**3 / microseconds(lambda: a @ b, 10)


def measure(
    name: str, spec: GroupedLinearSpec, chosen: int, tokens: int, speed: float, rate: float
) -> None:
    """Time the configurations of a case, and print the fastest.

    Args:
        name: of the layer.
        spec: its properties.
        chosen: experts of a token.
        tokens: of the step.
        speed: bytes a second.
        rate: operations a second.
    """
    call, by_torch, moved = layer(spec, chosen, tokens)
    expected = by_torch().float()
    repeats = 20 if tokens <= 64 else 6
    timed: dict[GroupedBlocks, tuple[float, float]] = {}

    def time(blocks: GroupedBlocks) -> None:
        result = attempt(call, blocks)
        if result is not None:
            error = float((result.float() - expected).norm() / expected.norm())
            timed[blocks] = (microseconds(partial(call, blocks), repeats), error)

    default = choose_blocks(spec, tokens, chosen, 2)
    time(default)
    for blocks in configurations(spec, tokens * chosen, tokens):
        time(blocks)
    if tokens * chosen > MAX_FEW_PAIRS:
        for blocks in sorted(timed, key=lambda blocks: timed[blocks])[:3]:
            for together in TOGETHER:
                time(replace(blocks, together=together))
    operations = 2 * tokens * chosen * spec.inputs * spec.outputs
    print(
        f"{name} {tokens} bytes {1e6 * moved / speed:.1f} products {1e6 * operations / rate:.1f} "
        f"default {timed[default][0]:.1f}"
    )
    for blocks in sorted(timed, key=lambda blocks: timed[blocks])[:8]:
        us, error = timed[blocks]
        print(f"    {us:.1f} {error:.1e} {blocks}", flush=True)
    worst = max(timed, key=lambda blocks: timed[blocks][1])
    print(f"    largest error {timed[worst][1]:.1e} {worst}", flush=True)


def main() -> None:
    """Compile on all cores, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", help="compile only: I/N, the I-th of N shares")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 2048])
    given = parser.parse_args()
    if given.share:
        share, of = map(int, given.share.split("/"))
        compile_share(given.tokens, share, of)
        return
    on_all_cores("benchmarks.grouped_tune", "--tokens", *map(str, given.tokens))
    speed, rate = bandwidth(), product_rate()
    for case in cases(given.tokens):
        measure(*case, speed, rate)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
