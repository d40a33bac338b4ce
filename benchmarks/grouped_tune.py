"""Block sizes of the kernels for a mixture of experts: times the layers of two published models.

    python -m benchmarks.grouped_tune > benchmarks/results/gpu_grouped_blocks.txt

Processes fill Triton's cache on all cores first; then each configuration is timed as a CUDA graph.
For each layer and number of tokens: the time that the bytes of the used experts take, that of
`choose_blocks`, and the fastest configurations, with whether their results equal its own.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from inplace.kernels.grouped_linear import (
    MAX_FEW_PAIRS,
    GroupedBlocks,
    GroupedLinearSpec,
    choose_blocks,
    grouped_linear,
    grouped_linear_workspace,
)
from torch import Tensor

from benchmarks.gpu.bandwidth import bandwidth

LAYERS = {
    "Mixtral-8x7B up": (GroupedLinearSpec(4096, 28672, 8, activation="silu", gated=True), 2),
    "Mixtral-8x7B down": (GroupedLinearSpec(14336, 4096, 8), 2),
    "Qwen3-30B-A3B up": (GroupedLinearSpec(2048, 1536, 128, activation="silu", gated=True), 8),
    "Qwen3-30B-A3B down": (GroupedLinearSpec(768, 2048, 128), 8),
}
"""A layer, and the experts of a token."""

TOKENS = (1, 8, 64, 2048)
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
MANY = [
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 3),
    (128, 64, 8, 3),
    (128, 64, 8, 4),
    (128, 32, 8, 4),
    (64, 64, 8, 4),
    (128, 128, 8, 2),
    (128, 64, 4, 3),
]
"""Outputs of a program, inputs of a round, warps, stages."""


def configurations(spec: GroupedLinearSpec, pairs: int, tokens: int) -> Iterator[GroupedBlocks]:
    """What is tried."""
    if pairs <= MAX_FEW_PAIRS:
        rows, others = [16] if tokens <= 8 else [16, 32, 64], FEW
    else:
        rows, others = [64, 128] if spec.experts > 16 else [64, 128, 256], MANY
    for m in rows:
        for n, k, warps, stages in others:
            yield GroupedBlocks(m, n, k, warps, stages)


def layer(
    spec: GroupedLinearSpec, chosen: int, tokens: int
) -> tuple[Callable[[GroupedBlocks], Tensor], int]:
    """A call of one layer, and the bytes of the experts that it uses."""
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

    return call, len(ids.unique()) * spec.inputs * spec.outputs * 2


def cases() -> Iterator[tuple[str, GroupedLinearSpec, int, int]]:
    """Name, layer, experts of a token and tokens."""
    for name, (spec, chosen) in LAYERS.items():
        for tokens in TOKENS:
            yield name, spec, chosen, tokens


def compile_share(share: int, of: int) -> None:
    """Compile every ``of``-th configuration."""
    number = 0
    for _, spec, chosen, tokens in cases():
        call, _ = layer(spec, chosen, tokens)
        for blocks in configurations(spec, tokens * chosen, tokens):
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


def microseconds(call: Callable[[GroupedBlocks], Tensor], blocks: GroupedBlocks) -> float:
    """The time of a call in a CUDA graph of many."""
    repeats = 20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call(blocks)
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * float(begin.elapsed_time(end)) / repeats


def main() -> None:
    """Compile on all cores, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", help="compile only: I/N, the I-th of N shares")
    given = parser.parse_args()
    if given.share:
        share, of = map(int, given.share.split("/"))
        compile_share(share, of)
        return
    count = max(1, (os.cpu_count() or 2) - 2)
    command = [sys.executable, "-m", "benchmarks.grouped_tune", "--share"]
    for process in [subprocess.Popen([*command, f"{i}/{count}"]) for i in range(count)]:
        process.wait()
    speed = bandwidth()
    for name, spec, chosen, tokens in cases():
        call, moved = layer(spec, chosen, tokens)
        default = choose_blocks(spec, tokens, chosen, 2)
        expected = call(default).float()
        timed = []
        for blocks in configurations(spec, tokens * chosen, tokens):
            result = attempt(call, blocks)
            if result is None:
                continue
            equal = torch.allclose(result.float(), expected, rtol=0.05, atol=0.05)
            timed.append((microseconds(call, blocks), equal, str(blocks)))
        limit = 1e6 * moved / speed
        print(f"{name} {tokens} limit {limit:.1f} default {microseconds(call, default):.1f}")
        for us, equal, text in sorted(timed)[:6]:
            print(f"    {us:.1f} {equal} {text}", flush=True)
        del call
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
