"""Sizes of the launches of scans and delta rules: times those of two published models.

    python -m benchmarks.recurrence_tune > benchmarks/results/gpu_recurrence_blocks.txt

Processes fill Triton's cache on all cores first. A decode step is timed as a CUDA graph of many, of
which each uses other states than those before. Of a prompt the time of each kernel is printed, by
PyTorch's profiler. Each line has the relative error of outputs and states, beside the operators in
PyTorch.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle, product
from unittest.mock import patch

import torch
import torch.nn.functional as F
from inplace.kernels import recurrence
from inplace.kernels.recurrence import PromptBlocks, StateBlocks
from inplace.operators.recurrence import (
    _delta_rule,
    _delta_rule_on_gpu,
    _selective_scan,
    _selective_scan_on_gpu,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bandwidth import bandwidth
from benchmarks.gpu.operators import NUM_SLOTS, PROMPT, ROWS, offsets, random, slots_of
from benchmarks.grouped_tune import microseconds, on_all_cores

Operator = Callable[..., Tensor]
ENTRIES = [(512, 1), (1024, 1), (2048, 1), (2048, 2), (2048, 4), (4096, 2), (4096, 4), (4096, 8)]
ENTRIES += [(8192, 4), (8192, 8), (16384, 8)]
"""Entries of a state that a program has, and its warps."""


STEPS = 25
"""Different steps; a CUDA graph has fewer."""


class Layer:
    """Steps of a layer with so many rows and tokens, and its states."""

    def __init__(
        self, rows: int, gpu: Operator, by_torch: Operator, state: Tensor, *inputs: Tensor
    ) -> None:
        self.rows, self.gpu, self.state, self.inputs = rows, gpu, state, inputs
        self.slots = [slots_of(number, rows) for number in range(STEPS)]
        self.offsets = offsets(rows, inputs[0].shape[0])
        self.by_torch = by_torch
        self.initial = torch.randn_like(state[self.slots[0]])
        self.expected: Tensor | None = None

    def call(self, number: int = 0) -> Tensor:
        """Run a step; its number chooses the states."""
        return self.gpu(*self.inputs, self.state, self.slots[number], self.offsets)

    def error(self) -> float:
        """Of the first step's outputs and states, from random states."""
        if self.expected is None:
            self.expected = self._results(self.by_torch)
        results = self._results(self.gpu)
        return float((results - self.expected).norm() / self.expected.norm())

    def _results(self, operator: Operator) -> Tensor:
        slots = self.slots[0]
        self.state[slots] = self.initial
        out = operator(*self.inputs, self.state, slots, self.offsets)
        return torch.cat([out.float().flatten(), self.state[slots].flatten()])


def scan(rows: int, tokens: int) -> Layer:
    """The scan of Mamba2-2.7B."""
    heads, dim, size = 80, 64, 128
    rates = -torch.rand(heads, 1, 1, device="cuda") - 0.1
    key, query = random(tokens, 1, size), random(tokens, 1, size)
    state = torch.zeros(NUM_SLOTS, heads, dim, size, device="cuda")
    inputs = random(tokens, heads, dim), torch.rand(tokens, heads, device="cuda"), rates
    skip = random(heads)
    operators = _selective_scan_on_gpu, _selective_scan
    return Layer(rows, *operators, state, *inputs, key, query, skip)


def delta(rows: int, tokens: int) -> Layer:
    """The gated delta rule of Qwen3-Next."""
    heads, dim = 32, 128
    query, key = (F.normalize(random(tokens, heads, dim), dim=-1) for _ in range(2))
    decay = F.logsigmoid(torch.randn(tokens, heads, device="cuda"))
    beta = random(tokens, heads).sigmoid()
    state = torch.zeros(NUM_SLOTS, heads, dim, dim, device="cuda")
    value = random(tokens, heads, dim)
    operators = _delta_rule_on_gpu, _delta_rule
    return Layer(rows, *operators, state, query, key, value, decay, beta)


LAYERS = {"Mamba2-2.7B scan": scan, "Qwen3-Next delta rule": delta}


def decode_blocks() -> Iterator[StateBlocks]:
    """What is tried for decode steps."""
    for evict, (entries, warps) in product(("", "evict_first"), ENTRIES):
        yield StateBlocks(entries, warps, evict)


def prompt_blocks() -> Iterator[PromptBlocks]:
    """What is tried for prompts: each size beside the others as they are."""
    now = PromptBlocks()
    yield now
    for narrow, stages, warps in product((16, 32, 64), (2, 3), (4, 8)):
        yield replace(now, narrow=narrow, stages=stages, states_warps=warps)
    for outer, warps in product((64, 128), (4, 8)):
        yield replace(now, outer=outer, outputs_warps=warps)
    for warps in (1, 2, 4, 8):
        yield replace(now, solve_warps=max(2, warps), inverse_warps=warps)


@contextmanager
def launched_with(blocks: StateBlocks | PromptBlocks) -> Iterator[None]:
    """Launch with other sizes than those that are chosen."""
    with ExitStack() as stack:
        if isinstance(blocks, PromptBlocks):
            stack.enter_context(patch.object(recurrence, "PROMPT_BLOCKS", blocks))
        else:
            for name in ("choose_scan_blocks", "choose_delta_blocks"):
                stack.enter_context(patch.object(recurrence, name, lambda *_, **__: blocks))
        yield


def each() -> Iterator[tuple[Callable[[int, int], Layer], int, int, StateBlocks | PromptBlocks]]:
    """Layer, rows, tokens and blocks of everything that is timed."""
    for make in LAYERS.values():
        for rows in ROWS:
            for blocks in decode_blocks():
                yield make, rows, rows, blocks
        for prompt in prompt_blocks():
            yield make, 1, PROMPT, prompt


def time_decode(layer: Layer) -> float:
    """Microseconds of a step."""
    numbers = cycle(range(STEPS))
    return microseconds(lambda: layer.call(next(numbers)))


def time_kernels(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel of a call."""
    calls = 10
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / calls for event in profiler.key_averages()}
    return {key: round(us, 1) for key, us in times.items() if us >= 0.05}


def main() -> None:
    """Compile on all cores, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", help="compile only: I/N, the I-th of N shares")
    given = parser.parse_args()
    if given.share:
        share, of = map(int, given.share.split("/"))
        for number, (make, rows, tokens, blocks) in enumerate(each()):
            if number % of == share:
                with launched_with(blocks):
                    make(rows, tokens).call()
        return
    on_all_cores("benchmarks.recurrence_tune")
    speed = bandwidth()
    for name, make in LAYERS.items():
        for rows in ROWS:
            tune_decode(name, make(rows, rows), speed)
        layer = make(1, PROMPT)
        print(f"{name} {PROMPT}", flush=True)
        for prompt in prompt_blocks():
            with launched_with(prompt):
                times, error = time_kernels(layer.call), layer.error()
            print(f"    {sum(times.values()):.1f} {error:.1e} {times} {prompt}", flush=True)


def tune_decode(name: str, layer: Layer, speed: float) -> None:
    """Time the sizes of a decode step, and print the fastest."""
    now, timed = time_decode(layer), []
    for blocks in decode_blocks():
        with launched_with(blocks):
            timed.append((time_decode(layer), layer.error(), blocks))
    moved = 2 * layer.rows * layer.state[0].numel() * layer.state.itemsize
    head = f"{name} {layer.rows} limit {1e6 * moved / speed:.1f} default {now:.1f}"
    print(f"{head}, largest error {max(error for _, error, _ in timed):.1e}", flush=True)
    for us, error, blocks in sorted(timed, key=lambda each: each[0])[:10]:
        print(f"    {us:.1f} {error:.1e} {blocks.entries} {blocks.warps} {blocks.evict!r}")


if __name__ == "__main__":
    main()
