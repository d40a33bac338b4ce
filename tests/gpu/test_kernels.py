"""The kernels on a GPU equal the operators on the CPU.

Every dtype, wide heads, long slots, CUDA graphs, arenas of more than 2^31 elements.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from inplace.kernels.attention import AttentionSpec
from inplace.operators import attention, read, update
from support.attention_case import Row, bits
from support.kernel_cases import AttentionCase, check_update, no_synchronisation
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

DECODE = [Row(4, 7, 1), Row(0, 0, 1), Row(-1, 3, 1), Row(2, 299, 1), Row(5, 256, 1)]
MIXED = [Row(4, 7, 1), Row(0, 0, 150), Row(-1, 0, 3), Row(3, 5, 0), Row(2, 130, 64), Row(5, 256, 1)]
STEPS = pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def spec(
    heads: int = 8, kv_heads: int = 2, dim: int = 64, value_dim: int | None = None, **options: Any
) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, value_dim or dim, dim**-0.5, **options)


def case(
    spec: AttentionSpec, rows: list[Row], dtype: torch.dtype, capacity: int = 320, **options: Any
) -> AttentionCase:
    return AttentionCase(spec, rows, capacity=capacity, dtype=dtype, device="cuda", **options)


@STEPS
@DTYPES
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256, 512])
def test_head_dimensions(dim: int, dtype: torch.dtype, rows: list[Row]) -> None:
    case(spec(4, 2, dim, rotary=dim), rows, dtype).check()


@STEPS
@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims"),
    [(9, 3, (64, 64)), (4, 4, (64, 32)), (71, 1, (64, 64)), (32, 2, (80, 96))],
)
def test_groups_and_value_widths(
    heads: int, kv_heads: int, dims: tuple[int, int], dtype: torch.dtype, rows: list[Row]
) -> None:
    case(spec(heads, kv_heads, *dims, rotary=32), rows, dtype).check()


@STEPS
@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"window": 40},
        {"window": 1},
        {"softcap": 0.7, "window": 100},
        {"causal": False},
        {"ring": True, "window": 120},
        {"append": False, "causal": False},
        {"sinks": True},
        {"sinks": True, "softcap": 0.7, "window": 100},
        {"sinks": True, "ring": True, "window": 120},
        {"sinks": True, "append": False, "causal": False},
        {"attention_chunk": 64},
        {"attention_chunk": 120, "ring": True},
        {"bias_heads": 1},
        {"bias_heads": 8, "softcap": 0.7, "window": 100},
        {"bias_heads": 8, "causal": False, "sinks": True},
    ],
)
def test_options(options: dict[str, Any], dtype: torch.dtype, rows: list[Row]) -> None:
    if "append" in options:
        rows = [
            replace(row, start=max(1, row.start)) for row in rows
        ]  # softmax over nothing is undefined
    case(spec(**options), rows, dtype).check()
    if "ring" in options:  # wrapped: 280 = window 120 + 161 tokens - 1
        case(
            spec(**options),
            [replace(row, start=row.start + 500) for row in rows],
            dtype,
            capacity=280,
        ).check()


@DTYPES
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("pdl", [False, True])
def test_blocks_that_a_bias_hides_as_a_whole(heads: int, pdl: bool, dtype: torch.dtype) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    decode = [Row(0, 3000, 1), Row(1, 0, 1), Row(2, 255, 1), Row(-1, 700, 1)]
    for rows in (decode, [Row(0, 3000, 512), Row(1, 600, 1)]):
        step = case(spec(bias_heads=heads), rows, dtype, capacity=4096, slots=4, pdl=pdl)
        step.bias[..., torch.arange(4096) // 128 % 3 == 1] = float("-inf")
        step.check()


@DTYPES
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("capacity", [4096, 32768])
def test_long_slots(capacity: int, dim: int, dtype: torch.dtype) -> None:
    length = min(capacity, 9000)
    rows = [Row(0, length - 1, 1), Row(1, 0, 1), Row(2, 255, 1), Row(3, 700, 1)]
    step = case(spec(8, 2, dim, rotary=dim), rows, dtype, capacity=capacity, slots=4)
    assert step.workspace is not None
    step.check()
    expected, before = step.expected(), (step.key_state.clone(), step.value_state.clone())
    step.compare(
        step.launch(), expected, before
    )  # again, with what the first launch left in workspace and locks
    case(
        spec(8, 2, dim, rotary=dim),
        [Row(0, length - 513, 512), Row(1, 600, 1)],
        dtype,
        capacity=capacity,
        slots=4,
    ).check()


LATENTS = pytest.mark.parametrize(
    ("heads", "dims"), [(128, (576, 512)), (16, (576, 512)), (40, (288, 256)), (5, (36, 20))]
)
"""Those of DeepSeek V3, of V2 Lite, of MiniCPM3, and of no power of two."""


@STEPS
@DTYPES
@LATENTS
@pytest.mark.parametrize(
    "options",
    [{}, {"bias_heads": 1}, {"sinks": True, "window": 100}, {"ring": True, "window": 120}],
)
def test_values_that_are_a_part_of_keys(
    options: dict[str, Any],
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    rows: list[Row],
) -> None:
    case(spec(heads, 1, *dims, latent=True, **options), rows, dtype).check()


@DTYPES
@LATENTS
@pytest.mark.parametrize(("pdl", "settled"), [(False, False), (True, False), (True, True)])
def test_long_latents(
    pdl: bool, settled: bool, heads: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    options: dict[str, Any] = {"capacity": 4096, "slots": 5, "pdl": pdl, "settled": settled}
    decode = [Row(0, 4000, 1), Row(1, 0, 1), Row(2, 255, 1), Row(-1, 700, 1), Row(4, 1024, 1)]
    latent = spec(heads, 1, *dims, latent=True)
    step = case(latent, decode, dtype, **options)
    assert step.workspace is not None
    step.check()
    step.check()  # again, with what the first launch left in workspace and locks
    case(latent, [Row(0, 3000, 512), Row(1, 600, 1)], dtype, **options).check()


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (64, 8), (71, 1)])
@pytest.mark.parametrize("window", [0, 700])
def test_sinks_enter_once_where_splits_are_combined(
    window: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    options = spec(heads, kv_heads, rotary=64, window=window, sinks=True)
    rows = [Row(0, 3000, 1), Row(1, 0, 1), Row(2, 255, 1), Row(-1, 700, 1)]
    step = case(options, rows, dtype, capacity=4096, slots=4)
    assert step.workspace is not None
    plain = case(replace(options, sinks=False), rows, dtype, capacity=4096, slots=4).check()
    for _ in range(2):  # again, with what the first launch left in workspace and locks
        assert (step.check() - plain).abs().max() > 0.01, "the sinks make no difference"
    prompt = [Row(0, 3000, 512), Row(1, 600, 1)]
    case(options, prompt, dtype, capacity=4096, slots=4).check()


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sinks_of_another_type_and_a_captured_launch(dtype: torch.dtype, pdl: bool) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    rows = [Row(0, 1500, 1), Row(1, 3, 1), Row(2, 600, 1), Row(-1, 0, 1)]
    step = case(spec(rotary=64, sinks=True), rows, torch.bfloat16, capacity=2048, pdl=pdl)
    step.sinks = step.sinks.to(dtype)
    step.check()
    expected, before = (
        step.expected(),
        (step.key_state.clone(), step.value_state.clone()),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            step.launch()
    step.out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    step.compare(step.out, expected, before)


@STEPS
@DTYPES
def test_the_operator_takes_sinks(dtype: torch.dtype, rows: list[Row]) -> None:
    step = case(spec(sinks=True), rows, dtype, capacity=1024)
    expected, before = step.expected(), (step.key_state.clone(), step.value_state.clone())
    out = attention(
        step.query,
        step.key,
        step.value,
        step.key_state,
        step.value_state,
        *step.control,
        scale=step.spec.scale,
        sinks=step.sinks,
    )
    step.compare(out, expected, before)


@DTYPES
@pytest.mark.parametrize(("pdl", "settled"), [(False, False), (True, False), (True, True)])
def test_a_captured_launch_replays_on_what_its_memory_then_holds(
    pdl: bool, settled: bool, dtype: torch.dtype
) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    first = [Row(0, 1500, 1), Row(1, 3, 1), Row(2, 600, 1), Row(-1, 0, 1)]
    later = [Row(3, 40, 1), Row(-1, 0, 1), Row(0, 1501, 1), Row(1, 2000, 1)]
    captured = case(spec(rotary=64), first, dtype, capacity=2048, pdl=pdl, settled=settled)
    captured.check()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # each launch starts while its predecessor still runs
            captured.launch()
    for seed, rows in enumerate((later, first, later)):
        step = case(spec(rotary=64), rows, dtype, capacity=2048, seed=seed + 1, pdl=pdl)
        captured.rows = rows
        for name in ("merged", "cos", "sin", "key_state", "value_state"):
            getattr(captured, name).copy_(getattr(step, name))
        for bound, new in zip(captured.control, step.control, strict=True):
            bound.copy_(new)
        expected, before = (
            captured.expected(),
            (captured.key_state.clone(), captured.value_state.clone()),
        )
        captured.out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        captured.compare(captured.out, expected, before)


@pytest.mark.parametrize("pdl", [False, True])
def test_a_captured_mixed_step_replays(pdl: bool) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    captured = case(spec(rotary=64), MIXED, torch.bfloat16, pdl=pdl)
    captured.check()
    expected, before = (
        captured.expected(),
        (captured.key_state.clone(), captured.value_state.clone()),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            captured.launch()
    captured.out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    captured.compare(captured.out, expected, before)


@STEPS
@DTYPES
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_the_operator_launches_the_kernels_and_never_synchronises(
    index_dtype: torch.dtype, dtype: torch.dtype, rows: list[Row]
) -> None:
    step = case(spec(), rows, dtype, capacity=1024)
    expected, before = step.expected(), (step.key_state.clone(), step.value_state.clone())
    slots, offsets, starts = (control.to(index_dtype) for control in step.control)

    def run() -> Tensor:
        return attention(
            step.query,
            step.key,
            step.value,
            step.key_state,
            step.value_state,
            slots,
            offsets,
            starts,
            scale=step.spec.scale,
        )

    run()
    torch.cuda.synchronize()
    with no_synchronisation():
        out = run()
    step.compare(out, expected, before)


def test_states_the_kernels_do_not_take_are_refused() -> None:
    step = case(spec(), DECODE, torch.float16)
    with pytest.raises(
        TypeError,
        match=r"query is torch.float32, key_state is torch.float16; they must be the same",
    ):
        attention(
            step.query.float(),
            step.key,
            step.value,
            step.key_state,
            step.value_state,
            *step.control,
            scale=1.0,
        )
    with pytest.raises(ValueError, match="value_state has strides"):
        attention(
            step.query,
            step.key,
            step.value,
            step.key_state,
            step.value_state.transpose(2, 3).contiguous().transpose(2, 3),
            *step.control,
            scale=1.0,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_updates(dtype: torch.dtype) -> None:
    for shape, axis in [
        ((8,), 1),
        ((8, 3), 1),
        ((2, 8, 300), 2),
        ((2, 3, 8), 3),
        ((2, 3, 8, 2), 3),
    ]:
        check_update(
            shape,
            axis,
            [Row(3, 2, 2), Row(-1, 0, 2), Row(0, 5, 2)],
            dtype,
            packed=False,
            device="cuda",
        )
        check_update(
            shape,
            axis,
            [Row(3, 2, 1), Row(2, 0, 0), Row(-1, 0, 3), Row(0, 1, 7)],
            dtype,
            packed=True,
            device="cuda",
        )
        check_update(
            shape, axis, [Row(3, 21, 5), Row(5, 7, 8)], dtype, packed=True, ring=True, device="cuda"
        )
        check_update(
            shape,
            0,
            [Row(3, 0, 1), Row(-1, 0, 1), Row(5, 0, 1)],
            dtype,
            packed=False,
            device="cuda",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(8,), (2, 8, 300)])
def test_the_read_operator_equals_the_cpu_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    state = torch.randint(1, 2 if dtype is torch.bool else 100, (5, *shape)).to(dtype)
    slots = torch.tensor([4, -1, 0, 4], dtype=torch.int32)
    assert torch.equal(read(state.cuda(), slots.cuda()).cpu(), read(state, slots))


@pytest.mark.parametrize("packed", [False, True])
def test_the_update_operator_equals_the_cpu_one_and_never_synchronises(packed: bool) -> None:
    state, starts, slots = (
        torch.randn(5, 2, 8, 3),
        torch.tensor([1, 0, 6]),
        torch.tensor([3, -1, 0]),
    )
    value = torch.randn(6, 2, 3) if packed else torch.randn(3, 2, 2, 3)
    offsets = torch.tensor([0, 2, 4, 6]) if packed else None
    expected = state.clone()
    update(expected, slots, value, offsets, starts, axis=2)
    on_gpu = [None if x is None else x.cuda() for x in (slots, value, offsets, starts)]
    on_gpu_state = state.cuda()
    torch.ops.inplace.update(on_gpu_state.clone(), *on_gpu, 2, False)
    torch.cuda.synchronize()
    with no_synchronisation():
        torch.ops.inplace.update(on_gpu_state, *on_gpu, 2, False)
    assert torch.equal(bits(on_gpu_state.cpu()), bits(expected))


@STEPS
def test_slots_beyond_two_to_the_31_elements(rows: list[Row]) -> None:
    slots, kv_heads, capacity, dim = 20, 8, 32768, 512
    assert slots * kv_heads * capacity * dim > 2**31
    small = AttentionCase(
        AttentionSpec(8, kv_heads, dim, dim, dim**-0.5),
        [replace(row, slot=min(row.slot, 0)) for row in rows if row.slot in (-1, 2)],
        capacity=capacity,
        slots=1,
        dtype=torch.bfloat16,
        device="cuda",
    )
    expected = small.launch().clone()
    states = [
        torch.empty(slots, kv_heads, capacity, dim, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    ]
    for state, source in zip(states, (small.key_state, small.value_state), strict=True):
        state[slots - 2 :].fill_(float("nan"))
        state[slots - 1].copy_(source[0])
    keys, values = small.key_state, small.value_state
    small.control[0].masked_fill_(small.control[0] == 0, slots - 1)
    small.key_state, small.value_state = states
    assert torch.equal(small.launch(), expected)
    for state, source in zip(states, (keys, values), strict=True):
        assert torch.equal(state[slots - 1].view(torch.int16), source[0].view(torch.int16))
        assert state[slots - 2].isnan().all()
