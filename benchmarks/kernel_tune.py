"""Times the attention kernels on a GPU over a small grid of blocks; prints the best.

Decode: a CUDA graph of many launches over different slots, together larger than the second-level
cache, as the layers of a model are. Prefill: 512 tokens of one row, beside
`torch.nn.functional.scaled_dot_product_attention`. bfloat16, lengths of 600; under 90 seconds. The
defaults' times are printed too.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from inplace.kernels.attention import (
    AttentionSpec,
    DecodeBlocks,
    PrefillBlocks,
    attention_locks,
    attention_workspace,
    decode_blocks,
    launch_append,
    launch_decode,
    launch_prefill,
    prefill_blocks,
)
from torch import Tensor

SHAPES, LENGTH, PROMPT = [(9, 3, 64), (32, 8, 64)], 600, 512
ROWS, CAPACITIES = (1, 8, 64), (1024, 4096, 32768)
DECODE = [
    DecodeBlocks(split, keys, warps, stages)
    for split, keys, warps, stages in [
        (64, 64, 2, 1),
        (64, 64, 4, 1),
        (128, 64, 4, 1),
        (128, 64, 4, 2),
        (128, 128, 4, 1),
        (128, 128, 4, 2),
        (128, 128, 8, 1),
        (256, 128, 4, 1),
        (256, 128, 4, 2),
        (256, 256, 8, 1),
    ]
]
PREFILL = [
    PrefillBlocks(queries, keys, warps, stages)
    for queries in (64, 128)
    for keys in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
    if not (queries == 128 and keys == 128 and warps == 4)  # spills
]
COLD_BYTES, MAX_BYTES, MAX_LAUNCHES = 150 << 20, 16 << 30, 300
"""Bytes that a graph's launches read together, bytes of states to allocate, launches in a graph.

An H100's cache holds 50 MB.
"""


def microseconds(launch: Callable[[], None], launches: int) -> float:
    """The median time of one launch, from replays of a CUDA graph of ``work``."""
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / launches)
    return float(statistics.median(times))


def control(values: list[int]) -> Tensor:
    """An int32 control tensor."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def random(*shape: int) -> Tensor:
    """Normal bfloat16 values."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


@dataclass
class Decode:
    """Steps of one shape, row count and capacity, each over slots of its own."""

    spec: AttentionSpec
    rows: int
    capacity: int
    pdl: bool

    def __post_init__(self) -> None:
        spec, rows, width = (
            self.spec,
            self.rows,
            self.spec.kv_heads * self.spec.dim * 4,
        )  # bytes of a position, keys and values
        num_states = max(30, COLD_BYTES // (rows * LENGTH * width))
        states = max(1, min(num_states, MAX_LAUNCHES, MAX_BYTES // (rows * self.capacity * width)))
        self.launches = max(30, states)
        shape = (states * rows, spec.kv_heads, self.capacity, spec.dim)
        self.keys, self.values = (
            torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)
        )
        for state in (self.keys, self.values):
            state[:, :, : LENGTH + 1].normal_()
        self.slots = [
            control(list(range(index * rows, index * rows + rows))) for index in range(states)
        ]
        self.starts = control([LENGTH] * rows)
        self.stride = (spec.heads + 2 * spec.kv_heads) * spec.dim
        self.merged = random(rows, self.stride)
        sizes = [spec.heads * spec.dim, spec.kv_heads * spec.dim, spec.kv_heads * spec.dim]
        self.query, self.key, self.value = self.merged.split(sizes, 1)
        self.angles = torch.rand(rows, spec.rotary, device="cuda")
        self.out = random(rows, spec.heads, spec.dim)

    def time(self, blocks: DecodeBlocks) -> float:
        """Microseconds a launch."""
        spec, rows = self.spec, self.rows
        count = attention_workspace(spec, rows, rows, self.capacity, blocks.min_split) // 4
        scratch = torch.empty(max(1, count), device="cuda")
        locks = torch.zeros(attention_locks(spec, rows), dtype=torch.int32, device="cuda")

        def launch() -> None:
            for index in range(self.launches):
                launch_decode(
                    spec, blocks, self.query, self.key, self.value,
                    self.stride, self.stride, self.stride, self.angles, self.angles,
                    self.keys, self.values, self.capacity, self.slots[index % len(self.slots)],
                    self.starts, self.query, self.query, self.query, self.query, self.out, scratch,
                    locks, rows, self.pdl, settled=self.pdl,
                )  # fmt: skip

        return microseconds(launch, self.launches)


def tune_decode(pdl: bool) -> None:
    """Every shape, row count and capacity: the three best and the default.

    The ideal is the time to read keys and values at 3 TB/s.
    """
    for heads, kv_heads, dim in SHAPES:
        spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, rotary=dim)
        default = decode_blocks(spec, 2)
        for rows in ROWS:
            for capacity in CAPACITIES:
                step = Decode(spec, rows, capacity, pdl)
                times = {blocks: step.time(blocks) for blocks in {*DECODE, default}}
                ideal = rows * LENGTH * kv_heads * dim * 4 / 3e6
                best = sorted(times, key=lambda blocks: times[blocks])[:3]
                print(
                    f"decode {heads}/{kv_heads}x{dim} rows {rows} capacity {capacity}: "
                    f"default {times[default]:.2f} µs, read {ideal:.2f}; "
                    + "; ".join(
                        f"{times[b]:.2f} split {b.min_split} keys {b.keys} warps {b.warps} "
                        f"stages {b.stages}"
                        for b in best
                    ),
                    flush=True,
                )
                del step


def tune_prefill(heads: int, kv_heads: int, dim: int, pdl: bool) -> None:
    """A prompt of 512 tokens: the best blocks, beside the append and PyTorch's attention."""
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, rotary=dim)
    stride, launches = (heads + 2 * kv_heads) * dim, 30
    merged, angles = random(PROMPT, stride), torch.rand(PROMPT, dim, device="cuda")
    keys, values = random(launches, kv_heads, 1024, dim), random(launches, kv_heads, 1024, dim)
    slots, offsets, starts = (
        [control([index]) for index in range(launches)],
        control([0, PROMPT]),
        control([0]),
    )
    query, key, value = merged.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    out = random(PROMPT, heads, dim)

    def append() -> None:
        for slot in slots:
            launch_append(
                spec, key, value, stride, stride, angles, angles, keys, values,
                1024, slot, offsets, starts, query, query, PROMPT, 1, pdl,
            )  # fmt: skip

    def prefill(blocks: PrefillBlocks) -> Callable[[], None]:
        def launch() -> None:
            for slot in slots:
                launch_prefill(
                    spec, blocks, query, stride, angles, angles, keys, values,
                    1024, slot, offsets, starts, query, query, query, query, out, PROMPT, 1, pdl,
                )  # fmt: skip

        return launch

    full = [random(1, count, PROMPT, dim) for count in (heads, kv_heads, kv_heads)]
    repeated = [full[0], *(x.repeat_interleave(heads // kv_heads, 1) for x in full[1:])]

    def sdpa(inputs: list[Tensor]) -> Callable[[], None]:
        query, key, value = inputs

        def launch() -> None:
            for _ in range(launches):
                F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
                )

        return launch

    default = prefill_blocks(spec, 2, PROMPT)
    times = {blocks: microseconds(prefill(blocks), launches) for blocks in {*PREFILL, default}}
    best = sorted(times, key=lambda blocks: times[blocks])[:4]
    print(
        f"prefill {heads}/{kv_heads}x{dim}, {PROMPT} tokens: default {times[default]:.2f} µs, "
        f"append {microseconds(append, launches):.2f}, "
        f"SDPA grouped {microseconds(sdpa(full), launches):.2f}, "
        f"SDPA repeated {microseconds(sdpa(repeated), launches):.2f}; "
        + "; ".join(
            f"{times[b]:.2f} queries {b.queries} keys {b.keys} warps {b.warps} stages {b.stages}"
            for b in best
        ),
        flush=True,
    )


if __name__ == "__main__":
    supported = torch.cuda.get_device_capability() >= (9, 0)
    print(
        torch.cuda.get_device_name(),
        "with" if supported else "without",
        "programmatic dependent launch",
    )
    for shape in SHAPES:
        tune_prefill(*shape, supported)
    tune_decode(supported)
