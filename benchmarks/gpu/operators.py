"""Operators of mixtures of experts and of recurrences beside the kernels that vLLM has for them.

    python -m benchmarks.gpu.operators --out benchmarks/results/gpu_operators.json
    python -m benchmarks.gpu.operators --peer vllm --out …     # where vLLM can be imported

Shapes are those of published models, one layer each. A call is a decode step of some rows with a
token each, or the prompt of one row. The time is that of the kernels of a call, by PyTorch's
profiler; a state or an expert's weight that a call uses is not in the L2 cache, because the calls
before it used others. The limit is the bytes that a call must move over the GPU's bandwidth.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from inplace import operators
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bandwidth import bandwidth
from benchmarks.record import facts

ROWS = (1, 8, 64)
PROMPT = 2048
CALLS = 20
NUM_SLOTS = 513
"""States of a layer. Slot 0 is not used, because vLLM takes it for no slot."""

Call = Callable[[int], object]
"""One call; its argument is the number of the call, which chooses the states."""


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        layer: which layer of which model.
        rows: of the step.
        tokens: of all rows.
        bytes: that it must read and write; 0 where matrix products are the limit.
        ours: makes the call.
        peers: the same by vLLM's kernels; None if that is not compared.
        states: what the calls write.
    """

    layer: str
    rows: int
    tokens: int
    bytes: int
    ours: Call
    peers: Callable[[], Call] | None = None
    states: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Result:
    """Times of a case in microseconds.

    Attributes:
        layer, rows, tokens: of the case.
        us: of Inplace's kernels.
        limit_us: bytes over bandwidth; None where they are not the limit.
        vllm_us: of vLLM's kernels; None if they were not run.
        difference: largest difference of the two results, relative to the largest value.
        error: why vLLM's kernels did not run.
    """

    layer: str
    rows: int
    tokens: int
    us: float
    limit_us: float | None
    vllm_us: float | None = None
    difference: float | None = None
    error: str | None = None


def kernel_time(call: Call) -> float:
    """Microseconds that the kernels of a call take, the mean of `CALLS` calls."""
    for number in range(CALLS):
        call(number)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for number in range(CALLS):
            call(number)
        torch.cuda.synchronize()
    times = [float(event.self_device_time_total) for event in profiler.key_averages()]
    return sum(times) / CALLS


def random(*shape: int) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(shape, device="cuda").bfloat16()


@cache
def slots_of(number: int, rows: int) -> Tensor:
    """The slots of a call: other ones than those of the calls before."""
    slots = (torch.arange(rows, device="cuda") + number * rows) % (NUM_SLOTS - 1) + 1
    return slots.int()


def steps() -> Iterator[tuple[int, int]]:
    """Rows and tokens: decode steps, and a prompt."""
    yield from ((rows, rows) for rows in ROWS)
    yield 1, PROMPT


def offsets(rows: int, tokens: int) -> Tensor:
    """The row offsets of rows with equal numbers of tokens."""
    return torch.arange(0, tokens + 1, tokens // rows, device="cuda").int()


# Mixtures of experts


def experts(layer: str, hidden: int, inner: int, count: int, chosen: int) -> Iterator[Case]:
    """The gated layers of all experts, and the weighted sum."""
    up, down = random(count, 2 * inner, hidden) * 0.02, random(count, hidden, inner) * 0.02
    for rows, tokens in steps():
        x = random(tokens, hidden)
        scores = torch.randn(tokens, count, device="cuda").softmax(-1)
        weights, ids = scores.topk(chosen)
        used = len(ids.unique())
        moved = used * 3 * hidden * inner * 2 if tokens == rows else 0

        def ours(
            number: int, x: Tensor = x, weights: Tensor = weights, ids: Tensor = ids
        ) -> Tensor:
            gate = operators.grouped_linear(x, ids, up, activation="silu", gated=True)
            return operators.weighted_sum(operators.grouped_linear(gate, ids, down), weights)

        def peers(x: Tensor = x, weights: Tensor = weights, ids: Tensor = ids) -> Call:
            from vllm.model_executor.layers.fused_moe import fused_experts

            narrow = ids.int()
            return lambda number: fused_experts(x, up, down, weights, narrow)

        yield Case(layer, rows, tokens, moved, ours, peers)


# Recurrences


def scan(layer: str, heads: int, dim: int, size: int) -> Iterator[Case]:
    """The state-space scan of Mamba 2."""
    state = torch.zeros(NUM_SLOTS, heads, dim, size, device="cuda")
    rates, skip = -torch.rand(heads, device="cuda") - 0.1, torch.rand(heads, device="cuda")
    for rows, tokens in steps():
        x, key, query = random(tokens, heads, dim), random(tokens, 1, size), random(tokens, 1, size)
        dt = torch.rand(tokens, heads, device="cuda")
        starts = offsets(rows, tokens)
        moved = 2 * rows * heads * dim * size * 4 if tokens == rows else 0
        decays, skips = rates[:, None, None], skip.bfloat16()
        ours = partial(_scan, x, dt, decays, key, query, skips, state, rows, starts)

        def decode(
            x: Tensor = x,
            dt: Tensor = dt,
            key: Tensor = key,
            query: Tensor = query,
            rows: int = rows,
        ) -> Call:
            from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update

            spread = rates[:, None, None].expand(heads, dim, size)
            steps, out = dt[:, :, None].expand(-1, heads, dim), torch.empty_like(x)
            skips, bias = skip[:, None].expand(heads, dim), torch.zeros(heads, 1, device="cuda")

            def call(number: int) -> Tensor:
                selective_state_update(
                    state, x, steps, spread, key, query, skips, bias.expand(heads, dim),
                    state_batch_indices=slots_of(number, rows), out=out,
                )  # fmt: skip
                return out

            return call

        def prefill(
            x: Tensor = x, dt: Tensor = dt, key: Tensor = key, query: Tensor = query
        ) -> Call:
            from vllm.model_executor.layers.mamba.ops.ssd_combined import (
                mamba_chunk_scan_combined_varlen,
            )

            chunk = 256
            chunks = torch.arange(0, PROMPT + 1, chunk, device="cuda").int()
            out = torch.empty_like(x)
            last = torch.tensor([PROMPT // chunk - 1], device="cuda").int()
            seq = torch.zeros(PROMPT // chunk, device="cuda").int()

            def call(number: int) -> Tensor:
                mamba_chunk_scan_combined_varlen(
                    x, dt, rates, key, query, chunk, cu_seqlens=chunks[[0, -1]],
                    cu_chunk_seqlens=chunks, last_chunk_indices=last, seq_idx=seq, out=out,
                    D=skip, initial_states=state[1:2], state_dtype=torch.float32,
                )  # fmt: skip
                return out

            return call

        peers = decode if tokens == rows else prefill
        yield Case(layer, rows, tokens, moved, ours, peers, (state,))


def _scan(
    x: Tensor,
    dt: Tensor,
    decays: Tensor,
    key: Tensor,
    query: Tensor,
    skip: Tensor,
    state: Tensor,
    rows: int,
    starts: Tensor,
    number: int,
) -> Tensor:
    slots = slots_of(number, rows)
    return operators.selective_scan(x, dt, decays, key, query, skip, state, slots, starts)


def delta(layer: str, heads: int, key_dim: int, value_dim: int) -> Iterator[Case]:
    """The gated delta rule; queries and keys are repeated for all heads of values."""
    state = torch.zeros(NUM_SLOTS, heads, key_dim, value_dim, device="cuda")
    transposed = torch.zeros(NUM_SLOTS, heads, value_dim, key_dim, device="cuda")
    for rows, tokens in steps():
        query, key = (F.normalize(random(tokens, heads, key_dim), dim=-1) for _ in range(2))
        value = random(tokens, heads, value_dim)
        decay = F.logsigmoid(torch.randn(tokens, heads, device="cuda"))
        beta = random(tokens, heads).sigmoid()
        moved = 2 * rows * heads * key_dim * value_dim * 4 if tokens == rows else 0
        inputs = (query, key, value, decay, beta)
        ours = partial(_delta, inputs, state, rows, offsets(rows, tokens))

        def decode(inputs: tuple[Tensor, ...] = inputs, rows: int = rows) -> Call:
            from vllm.third_party.flash_linear_attention.ops import (
                fused_recurrent_gated_delta_rule,
            )

            starts, single = offsets(rows, rows), [each[None] for each in inputs]
            return lambda number: fused_recurrent_gated_delta_rule(
                *single, scale=1.0, initial_state=transposed, cu_seqlens=starts,
                ssm_state_indices=slots_of(number, rows),
            )[0][0]  # fmt: skip

        def prefill(inputs: tuple[Tensor, ...] = inputs) -> Call:
            from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule

            starts, single = offsets(1, PROMPT), [each[None] for each in inputs]
            return lambda number: chunk_gated_delta_rule(
                *single, scale=1.0, initial_state=transposed[1:2], output_final_state=True,
                cu_seqlens=starts,
            )[0][0]  # fmt: skip

        peers = decode if tokens == rows else prefill
        yield Case(layer, rows, tokens, moved, ours, peers, (state, transposed))


def _delta(
    inputs: tuple[Tensor, ...], state: Tensor, rows: int, starts: Tensor, number: int
) -> Tensor:
    query, key, value, decay, beta = inputs
    slots = slots_of(number, rows)
    return operators.delta_rule(query, key, value, decay, beta, state, slots, starts)


def convolution(layer: str, channels: int, width: int) -> Iterator[Case]:
    """The short convolution before a recurrence, with SiLU."""
    state = torch.zeros(NUM_SLOTS, width - 1, channels, device="cuda", dtype=torch.bfloat16)
    weight, bias = random(channels, width), random(channels)
    for rows, tokens in steps():
        x, starts = random(tokens, channels), offsets(rows, tokens)
        moved = (rows * 2 * (width - 1) + tokens * 2) * channels * 2

        def ours(number: int, x: Tensor = x, starts: Tensor = starts, rows: int = rows) -> Tensor:
            slots = slots_of(number, rows)
            return operators.causal_conv1d(x, weight, bias, state, slots, starts, silu=True)

        yield Case(layer, rows, tokens, moved, ours)


LAYERS: dict[str, Callable[[str], Iterator[Case]]] = {
    "Mixtral-8x7B experts": partial(experts, hidden=4096, inner=14336, count=8, chosen=2),
    "Qwen3-30B-A3B experts": partial(experts, hidden=2048, inner=768, count=128, chosen=8),
    "Mamba2-2.7B scan": partial(scan, heads=80, dim=64, size=128),
    "Qwen3-Next delta rule": partial(delta, heads=32, key_dim=128, value_dim=128),
    "Mamba2-2.7B convolution": partial(convolution, channels=5376, width=4),
}


def measure(case: Case, speed: float, *, peer: bool) -> Result:
    """Run a case."""
    result = Result(
        case.layer,
        case.rows,
        case.tokens,
        us=kernel_time(case.ours),
        limit_us=1e6 * case.bytes / speed if case.bytes else None,
    )
    if not peer or case.peers is None:
        return result
    values = asdict(result)
    try:
        call = case.peers()
        values["vllm_us"] = kernel_time(call)
        values["difference"] = _difference(case, call)
    except Exception as error:  # of another project: the other cases go on
        values["error"] = f"{type(error).__name__}: {error}"[:300]
    return Result(**values)


def _difference(case: Case, call: Call) -> float:
    """Of the results of the two, from states of zeros."""
    results = []
    for each in (case.ours, call):
        for state in case.states:
            state.zero_()
        result = each(0)
        assert isinstance(result, Tensor)
        results.append(result.float().flatten())
    return float((results[0] - results[1]).abs().max() / results[1].abs().max())


def main() -> None:
    """Run all cases and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer", choices=["none", "vllm"], default="none")
    parser.add_argument("--only", action="append", choices=LAYERS, help="this layer; repeatable")
    options = parser.parse_args()
    speed = bandwidth()
    head = facts("kernels of operators, one layer", "python -m benchmarks.gpu.operators")
    record: dict[str, Any] = head | {"bandwidth": speed, "states": "float32", "results": []}
    for layer in options.only or LAYERS:
        for case in LAYERS[layer](layer):
            result = measure(case, speed, peer=options.peer == "vllm")
            record["results"].append(asdict(result))
            print(json.dumps(asdict(result)), flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
