"""Step times of transformers' Llama with its static cache, for comparison with our engines.

    python -m benchmarks.gpu.baseline --shape 1b --rows 8 --capacity 4096 --length 600 \
        --engine torch_compile

One case a process, one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from transformers import AttentionInterface, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.gpu.measurement import Measurement
from benchmarks.gpu.shapes import SHAPES, cache_bytes, random_model, weight_bytes

ENGINES = {
    "torch_compile": "torch.compile",
    "torch_compile_tuned": "torch.compile-tuned",
    "torch_graph": "torch-cuda-graph",
    "hf_static": "torch-eager",
    "prefill_compile": "torch.compile",
}
"""Names on the command line to names in the results."""
REPEATS, STEPS, WARM_UP = 5, 100, 10
CAUSAL = "sdpa_causal"


class Decoder:
    """A decode step of `rows` sequences with `length` cached positions each.

    The next token replaces the one before. Everything a step writes (the token, the caches, their
    lengths) has a fixed address and is marked so: a captured step needs no copy in or out. The
    caches are filled with normal values.
    """

    def __init__(self, model: LlamaForCausalLM, rows: int, capacity: int, length: int) -> None:
        """Raises ValueError if the caches have no room for the steps between two `rewind`s."""
        if length + STEPS > capacity:
            raise ValueError(
                f"{STEPS} steps from length {length} do not fit a capacity of {capacity}; "
                "give a shorter length"
            )
        self.model, self.length = model, length
        self.cache = static_cache(model, rows, capacity)
        for layer in self.cache.layers:
            layer.keys[:, :, :length].normal_()
            layer.values[:, :, :length].normal_()
        self.token = torch.randint(0, model.config.vocab_size, (rows, 1), device=model.device)
        torch._dynamo.mark_static_address(self.token)
        self.rewind()

    def step(self) -> None:
        """Decode one token a row, greedily."""
        logits = self.model(
            input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self.token.copy_(logits.argmax(-1))

    def rewind(self) -> None:
        """Let every sequence hold `length` positions again."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)


class Prefill:
    """The first tokens of one sequence. Attention is causal without a mask, SDPA's fastest case."""

    def __init__(self, model: LlamaForCausalLM, capacity: int, tokens: int) -> None:
        """Raises ValueError where the prompt is longer than the cache."""
        if tokens > capacity:
            raise ValueError(f"a prompt of {tokens} tokens does not fit a capacity of {capacity}")
        # transformers makes a mask only for attention functions that have one registered; without
        # it SDPA is called with is_causal. With a mask it would attend over the whole capacity, on
        # a slower kernel.
        AttentionInterface.register(CAUSAL, sdpa_attention_forward)
        model.set_attn_implementation(CAUSAL)
        self.model = model
        self.cache = static_cache(model, 1, capacity)
        self.prompt = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        for tensor in (self.prompt, self.token):
            torch._dynamo.mark_static_address(tensor)

    def step(self) -> None:
        """Fill the empty cache with the prompt, and return the next token."""
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()
        logits = self.model(
            input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self.token.copy_(logits.argmax(-1))

    def rewind(self) -> None:
        """Nothing: every step starts at an empty cache."""


def static_cache(model: LlamaForCausalLM, rows: int, capacity: int) -> StaticCache:
    """The static cache of transformers, allocated, zero, its addresses marked static."""
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    cache.early_initialization(
        rows, model.config.num_key_value_heads, model.config.head_dim, model.dtype, model.device
    )
    return cache


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of ``step``, which must have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def microseconds(
    step: Callable[[], None], rewind: Callable[[], None], steps: int = STEPS, repeats: int = REPEATS
) -> list[float]:
    """Microseconds a step, once each repeat, by CUDA events; ``rewind`` is not timed."""
    times = []
    for _ in range(repeats):
        rewind()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / steps)
    return times


@dataclass(frozen=True)
class Prepared:
    """A step that is compiled and warm.

    Attributes:
        step: runs it.
        seconds: what compiling and warming up took.
        skipped: graphs that the compiler ran without a CUDA graph though asked for one.
    """

    step: Callable[[], None]
    seconds: float
    skipped: int


def prepared(decode: Decoder | Prefill, engine: str) -> Prepared:
    """Compile or capture the step for this engine, and run it until all is compiled."""
    before = time.perf_counter()
    step = decode.step
    if engine in ("torch_compile", "torch_compile_tuned"):
        # also lets the compiler turn products with one row into reductions that it can tune
        inductor.coordinate_descent_tuning = engine == "torch_compile_tuned"
        step = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
    elif engine == "prefill_compile":
        step = torch.compile(step, fullgraph=True, dynamic=False)
    for _ in range(WARM_UP):
        step()
    if engine == "torch_graph":
        step = captured(step)
    decode.rewind()
    torch.cuda.synchronize()
    return Prepared(step, time.perf_counter() - before, counters["inductor"]["cudagraph_skips"])


def measured(what: Measurement, engine: str) -> Measurement:
    """``what`` with its times filled in."""
    model = random_model(what.shape, torch.bfloat16, "cuda")
    torch.manual_seed(0)
    decode = (
        Decoder(model, what.rows, what.capacity, what.length)
        if what.kind == "decode"
        else Prefill(model, what.capacity, what.tokens)
    )
    ready = prepared(decode, engine)
    steps = STEPS // 5 if engine == "hf_static" else STEPS  # 20 to 40 ms each
    times, notes = microseconds(ready.step, decode.rewind, steps), []
    if engine == "prefill_compile":
        replays = microseconds(captured(ready.step), decode.rewind)
        called, replayed = statistics.median(times), statistics.median(replays)
        notes.append(
            f"called {called:.0f} µs, replayed as a CUDA graph {replayed:.0f} µs; the faster counts"
        )
        times = min(times, replays, key=statistics.median)
    if ready.skipped:
        notes.append(f"the compiler made no CUDA graph of {ready.skipped} graphs")
    return replace(
        what,
        us=statistics.median(times),
        us_min=min(times),
        repeats=len(times),
        memory={
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
        },
        build_s=round(ready.seconds, 1),
        notes="; ".join(notes) or None,
        error=None,
    )


def described(shape: str, rows: int, capacity: int, length: int, engine: str) -> Measurement:
    """The measurement of these arguments, without a time. A prefill's length is its prompt's."""
    prefill = engine == "prefill_compile"
    cached, tokens = (0, length) if prefill else (length, rows)
    positions = rows * cached + tokens
    return Measurement(
        engine=ENGINES[engine],
        shape=shape,
        rows=rows,
        capacity=capacity,
        length=cached,
        tokens=tokens,
        kind="prefill" if prefill else "decode",
        weight_bytes=weight_bytes(shape),
        cache_bytes_read=cache_bytes(shape, positions),
        error="not run",
    )


def main() -> None:
    """Measure one case and print its line; a failure is printed as one too, and raised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument(
        "--length",
        type=int,
        default=600,
        help="positions each sequence holds; for a prefill, tokens of the prompt",
    )
    parser.add_argument("--engine", required=True, choices=ENGINES)
    given = parser.parse_args()
    if given.engine == "prefill_compile" and given.rows != 1:
        parser.error(f"a prefill has one row, not {given.rows}")
    what = described(given.shape, given.rows, given.capacity, given.length, given.engine)
    try:
        with torch.no_grad():
            done = measured(what, given.engine)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        print(
            json.dumps(replace(what, error=f"{type(error).__name__}: {first}").record()), flush=True
        )
        raise
    print(json.dumps(done.record()), flush=True)


if __name__ == "__main__":
    main()
