"""Small modules on the state operators, each with steps to run.

The CPU tests compile them, the GPU tests run them beside PyTorch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from inplace.operators import attention, read, update
from inplace.schema.specs import Dtype, StateSpec, Update
from inplace_builder.graph.export import size_oblivious
from inplace_builder.lower.compile import Range
from torch import Tensor, nn
from torch.export import Dim

from support.operator_case import TOLERANCE

HEADS, KV_HEADS, DIM, CAPACITY, ROWS = 4, 2, 8, 12, 3
MAX_TOKENS = 4
"""Most tokens of one row in one step."""
STEPS: tuple[tuple[int, tuple[int, ...]], ...] = ((4, (0, 3, 6)), (1, (4, 7, 10)), (1, (5, 8, 11)))
"""Tokens of each row, and its cached length before; the last step fills a slot to its end."""
RING_STEPS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (4, (0, 9, 23)),
    (1, (4, 13, 27)),
    (3, (5, 14, 28)),
)
CROSS_STEPS: tuple[tuple[int, tuple[int, ...]], ...] = ((4, (5, 3, 12)), (1, (5, 3, 12)))
"""Nothing is appended: the lengths do not change."""
SLOTS = (0, -1, 2)
"""Row r is slot r, or a null row."""


class Attend(nn.Module):
    def __init__(self, sinks: bool = False, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.sinks = nn.Parameter(torch.linspace(-2.0, 3.0, HEADS)) if sinks else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        row_offsets: Tensor,
        write_indices: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        appends = self.options.get("append", True)
        new_key, new_value = (key, value) if appends else (None, None)
        return attention(
            query,
            new_key,
            new_value,
            keys,
            values,
            slots,
            row_offsets,
            write_indices,
            scale=0.3,
            sinks=self.sinks,
            bias=bias,
            **self.options,
        )


class AttendWithBias(Attend):
    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        row_offsets: Tensor,
        write_indices: Tensor,
        bias: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        rows = slots, row_offsets, write_indices
        return super().forward(query, key, value, *rows, keys, values, bias)


class AppendPacked(nn.Module):
    def __init__(self, axis: int, ring: bool = False) -> None:
        super().__init__()
        self.axis, self.ring = axis, ring

    def forward(
        self,
        value: Tensor,
        slots: Tensor,
        row_offsets: Tensor,
        write_indices: Tensor,
        memory: Tensor,
    ) -> Tensor:
        update(memory, slots, value, row_offsets, write_indices, axis=self.axis, ring=self.ring)
        return value + 1


class AppendRows(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(
        self, rectangle: Tensor, slots: Tensor, write_indices: Tensor, memory: Tensor
    ) -> Tensor:
        update(memory, slots, rectangle, None, write_indices, axis=self.axis)
        return rectangle + 1


class Accumulate(nn.Module):
    def forward(self, row: Tensor, slots: Tensor, memory: Tensor) -> Tensor:
        total = read(memory, slots) + row
        update(memory, slots, total)
        return total * 2


@dataclass(frozen=True, eq=False)
class StateCase:
    """A module on states.

    Attributes:
        name: what it tests.
        module: takes its inputs by name, then the states.
        states: its states.
        steps: the steps to run, see `STEPS`.
    """

    name: str
    module: nn.Module
    states: tuple[StateSpec, ...]
    steps: tuple[tuple[int, tuple[int, ...]], ...] = STEPS
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    """Extents of the inputs.

    ``t``: tokens of all rows; ``r``: rows; ``b``: rows and one; ``m``: tokens of a row.
    """

    @property
    def dtype(self) -> torch.dtype:
        return self.states[0].dtype.as_torch

    def memory(self) -> dict[str, Tensor]:
        """States before the first step.

        Floating-point states are NaN beyond the cached length, and in the slot of the null row.
        """
        generator = torch.Generator().manual_seed(7)
        memory = {}
        for state in self.states:
            x = _random((ROWS, *state.shape), state.dtype.as_torch, generator)
            if state.axis is not None and x.is_floating_point():
                for row, start in enumerate(self.steps[0][1]):
                    cached = 0 if SLOTS[row] < 0 else min(start, state.shape[state.axis])
                    x[row].narrow(state.axis, cached, state.shape[state.axis] - cached).fill_(
                        float("nan")
                    )
            memory[state.name] = x
        return memory

    def inputs(self, tokens: int, starts: tuple[int, ...]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(tokens + 31 * starts[0])
        known = {
            "slots": torch.tensor(SLOTS, dtype=torch.int32),
            "row_offsets": torch.arange(ROWS + 1, dtype=torch.int32) * tokens,
            "write_indices": torch.tensor(starts, dtype=torch.int32),
        }
        sizes = {"t": ROWS * tokens, "r": ROWS, "b": ROWS + 1, "m": tokens}
        return {
            name: known.get(name, _random(_sized(shape, sizes), self.dtype, generator))
            for name, shape in self.shapes.items()
        }

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        rows: Any = Dim("rows", min=1, max=8)
        dims = {
            "t": Dim("tokens", min=1, max=64),
            "r": rows,
            "b": rows + 1,
            "m": Dim("each", min=1, max=8),
        }
        shapes: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            shapes[name] = {
                axis: dims[extent] for axis, extent in enumerate(shape) if isinstance(extent, str)
            }
        shapes |= {state.name: {0: Dim("slots", min=1)} for state in self.states}
        arguments = self.inputs(2, (0,) * ROWS) | {
            state.name: torch.zeros(ROWS, *state.shape, dtype=self.dtype) for state in self.states
        }
        with torch.no_grad(), size_oblivious():
            return torch.export.export(self.module, (), arguments, dynamic_shapes=shapes)

    def check(
        self,
        step: Callable[[dict[str, Tensor], dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
    ) -> None:
        """Run every step and compare with the operators: outputs are close, states equal.

        ``step`` takes inputs and states and returns the output and the states afterwards.
        """
        expected_memory, memory = self.memory(), self.memory()
        limit = TOLERANCE.get(self.dtype, 0.0)
        for tokens, starts in self.steps:
            inputs = self.inputs(tokens, starts)
            with torch.no_grad():
                expected = self.module(**inputs, **expected_memory)
            out, memory = step(inputs, memory)
            torch.testing.assert_close(out.cpu(), expected, rtol=limit, atol=limit)
            for name, x in memory.items():
                torch.testing.assert_close(
                    x.cpu(), expected_memory[name], rtol=0, atol=0, equal_nan=True
                )

    def profile(self) -> dict[str, Range]:
        ends = (
            {"t": 1, "r": 1, "b": 2, "m": 1},
            {"t": 3, "r": 3, "b": 4, "m": 1},
            {"t": 12, "r": 3, "b": 4, "m": MAX_TOKENS},
        )

        def ranged(shape: tuple[int | str, ...]) -> Range:
            return (_sized(shape, ends[0]), _sized(shape, ends[1]), _sized(shape, ends[2]))

        arena: dict[str, tuple[int | str, ...]] = {
            state.name: ("r", *state.shape) for state in self.states
        }
        return {name: ranged(shape) for name, shape in [*self.shapes.items(), *arena.items()]}


def _sized(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[extent] if isinstance(extent, str) else extent for extent in shape)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-9, 9, shape, generator=generator).to(dtype)


CONTROLS: dict[str, tuple[int | str, ...]] = {
    "slots": ("r",),
    "row_offsets": ("b",),
    "write_indices": ("r",),
}


def _attend(
    name: str,
    dtype: Dtype = Dtype.FLOAT32,
    kv_heads: int = KV_HEADS,
    capacity: int = CAPACITY,
    bias_heads: int = 0,
    **options: Any,
) -> StateCase:
    kind = Update.RING if options.get("ring") else Update.APPEND
    states = tuple(
        StateSpec(
            name=part,
            shape=(kv_heads, capacity, DIM),
            dtype=dtype,
            update=kind,
            axis=1,
            reset=False,
        )
        for part in ("keys", "values")
    )
    new: tuple[int | str, ...] = ("t", kv_heads, DIM)
    shapes = {"query": ("t", HEADS, DIM), "key": new, "value": new, **CONTROLS}
    steps = (
        RING_STEPS if kind is Update.RING else STEPS if options.get("append", True) else CROSS_STEPS
    )
    if bias_heads:
        shapes["bias"] = ("t", bias_heads, capacity)
        return StateCase(name, AttendWithBias(**options), states, steps, shapes)
    return StateCase(name, Attend(**options), states, steps, shapes)


def _memory(
    shape: tuple[int, ...], kind: Update, axis: int | None, dtype: Dtype = Dtype.FLOAT32
) -> tuple[StateSpec]:
    return (StateSpec(name="memory", shape=shape, dtype=dtype, update=kind, axis=axis),)


STATE_CASES = [
    _attend("causal"),
    _attend("causal-bfloat16", Dtype.BFLOAT16),
    _attend("causal-float16", Dtype.FLOAT16),
    _attend("not-grouped", kv_heads=HEADS),
    _attend("one-kv-head", kv_heads=1),
    _attend("window", window=5),
    _attend("softcap", softcap=2.0),
    _attend("sinks", sinks=True),
    _attend("sinks-bfloat16", Dtype.BFLOAT16, window=5, sinks=True),
    _attend("sinks-softcap", kv_heads=HEADS, softcap=2.0, sinks=True),
    _attend("not-causal", causal=False),
    _attend("not-causal-one-kv-head", kv_heads=1, causal=False, sinks=True),
    _attend("attention-chunk", attention_chunk=3),
    _attend("attention-chunk-not-grouped", kv_heads=HEADS, attention_chunk=4),
    _attend("bias", bias_heads=HEADS),
    _attend("bias-not-grouped", kv_heads=HEADS, bias_heads=HEADS, sinks=True),
    _attend("bias-of-all-heads", bias_heads=1, window=5),
    _attend("bias-bfloat16", Dtype.BFLOAT16, bias_heads=1),
    _attend("cross", append=False, causal=False),
    _attend("ring", capacity=8, window=5, ring=True),
    _attend("ring-sinks", capacity=8, window=5, ring=True, sinks=True),
    _attend("ring-chunk", capacity=8, attention_chunk=5, ring=True),
    StateCase(
        "packed-append",
        AppendPacked(2),
        _memory((2, CAPACITY, 4), Update.APPEND, 1),
        shapes={"value": ("t", 2, 4), **CONTROLS},
    ),
    StateCase(
        "packed-first-axis",
        AppendPacked(1),
        _memory((CAPACITY, 4), Update.APPEND, 0),
        shapes={"value": ("t", 4), **CONTROLS},
    ),
    StateCase(
        "packed-ring",
        AppendPacked(3, ring=True),
        _memory((2, 4, 8), Update.RING, 2),
        RING_STEPS,
        shapes={"value": ("t", 2, 4), **CONTROLS},
    ),
    StateCase(
        "append-rows",
        AppendRows(2),
        _memory((2, CAPACITY, 4), Update.APPEND, 1),
        shapes={"rectangle": ("r", 2, "m", 4), "slots": ("r",), "write_indices": ("r",)},
    ),
    StateCase(
        "replace",
        Accumulate(),
        _memory((3, 5), Update.REPLACE, None),
        shapes={"row": ("r", 3, 5), "slots": ("r",)},
    ),
    StateCase(
        "replace-int32",
        Accumulate(),
        _memory((4,), Update.REPLACE, None, Dtype.INT32),
        shapes={"row": ("r", 4), "slots": ("r",)},
    ),
]
