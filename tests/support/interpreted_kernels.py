"""The kernels in Triton's interpreter; `tests/unit/test_kernels.py` runs this file.

fp32 and fp16 only: the interpreter's `tl.dot` is wrong for bf16 (Triton 3.6).
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inplace.kernels.attention import AttentionSpec, attention_workspace
from inplace.kernels.linear import (
    GemvBlocks,
    LinearBlocks,
    LinearSpec,
    PipelinedBlocks,
    SlicedKBlocks,
    choose_blocks,
    linear,
)
from inplace.operators import linear as reference_linear
from inplace.operators.attention import _attention_on_gpu
from inplace.operators.state import _update_on_gpu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from support.attention_case import Row
from support.kernel_cases import AttentionCase, check_update, rotate
from support.long import long_except

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
)  # Triton's own

DECODE = [Row(4, 7, 1), Row(0, 0, 1), Row(-1, 3, 1), Row(2, 47, 1), Row(5, 16, 1)]
MIXED = [Row(4, 7, 1), Row(0, 0, 21), Row(-1, 0, 3), Row(3, 5, 0), Row(2, 30, 17), Row(5, 16, 1)]
"""Decode, a prompt, a null row, an empty row, a later chunk of a prompt, decode.

Together more tokens than a block of queries has.
"""
BIASED = {"bias_heads": 1, "window": 20}
OPTIONS: list[dict[str, Any]] = [
    {"window": 3},
    {"window": 20},
    {"softcap": 0.7},
    {"softcap": 0.7, "window": 5},
    {"causal": False},
    {"bias_heads": 1},
    {"bias_heads": 4},
    {"attention_chunk": 12},
    {"bias_heads": 1, "causal": False},
    {"bias_heads": 4, "window": 5, "softcap": 0.7, "sinks": True},
]
STEPS = pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])


def spec(
    heads: int = 4, kv_heads: int = 2, dim: int = 32, value_dim: int | None = None, **options: Any
) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, value_dim or dim, dim**-0.5, **options)


@STEPS
@pytest.mark.parametrize(
    ("dim", "dtype"),
    long_except(
        [(32, torch.float32), (80, torch.float16), (256, torch.float16)],
        product([32, 64, 80, 96, 128, 256], [torch.float32, torch.float16]),
    ),
)
def test_head_dimensions(dim: int, dtype: torch.dtype, rows: list[Row]) -> None:
    AttentionCase(spec(2, 1, dim, rotary=dim // 4 * 2), rows, dtype=dtype).check()


@STEPS
@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    long_except([(9, 3)], [(2, 2), (9, 3), (4, 1), (17, 1), (40, 1)]),
)
def test_groups_of_any_size(heads: int, kv_heads: int, rows: list[Row]) -> None:
    AttentionCase(spec(heads, kv_heads, rotary=32), rows).check()


@STEPS
@pytest.mark.parametrize(
    ("dims", "options"),
    long_except(
        [((36, 20), BIASED), ((36, 20), {"sinks": True}), ((576, 512), {})],
        product([(36, 20), (576, 512)], [{}, BIASED, {"sinks": True}]),
    ),
)
def test_values_that_are_a_part_of_keys(
    dims: tuple[int, int], options: dict[str, Any], rows: list[Row]
) -> None:
    AttentionCase(spec(9, 1, *dims, latent=True, **options), rows).check()


def test_latents_whose_splits_are_combined_and_that_wrap() -> None:
    rows = [Row(3, 1030, 1), Row(1, 70, 1), Row(0, 0, 1), Row(-1, 9, 1), Row(2, 1099, 1)]
    biased = spec(6, 1, 48, 32, latent=True, bias_heads=6)
    AttentionCase(biased, rows, capacity=1100).check()
    whole_blocks = [Row(3, 127, 1), Row(1, 128, 1), Row(0, 256, 1), Row(2, 1024, 1)]
    AttentionCase(spec(6, 1, 48, 32, latent=True), whole_blocks, capacity=1100).check()
    ring = spec(6, 1, 48, 32, latent=True, window=20, ring=True)
    AttentionCase(ring, [Row(3, 33, 1), Row(1, 5, 13), Row(5, 66, 2)], capacity=32).check()


@STEPS
@pytest.mark.parametrize(
    ("dim", "value_dim"), long_except([(20, 10)], [(32, 64), (80, 48), (20, 10)])
)
def test_values_of_another_width(dim: int, value_dim: int, rows: list[Row]) -> None:
    AttentionCase(spec(4, 2, dim, value_dim), rows, dtype=torch.float16).check()


@STEPS
@pytest.mark.parametrize("options", long_except(OPTIONS[1::6], OPTIONS))
def test_options_of_the_mask_and_of_the_scores(options: dict[str, Any], rows: list[Row]) -> None:
    plain = AttentionCase(spec(), rows).check()
    changed = AttentionCase(spec(**options), rows).check()
    is_same = rows is DECODE and options == {"causal": False}  # one token sees all positions anyway
    assert is_same or (plain - changed).abs().max() > 0.01, "the option makes no difference"


@STEPS
@pytest.mark.parametrize(
    "options",
    long_except(
        [{"window": 5, "softcap": 0.7}], [{}, {"window": 5, "softcap": 0.7}, {"causal": False}]
    ),
)
@pytest.mark.parametrize("heads", long_except([10], [4, 10]))
def test_sinks_take_a_part_of_the_softmax(
    heads: int, options: dict[str, Any], rows: list[Row]
) -> None:
    plain = AttentionCase(spec(heads, **options), rows).check()
    changed = AttentionCase(spec(heads, sinks=True, **options), rows).check()
    assert (plain - changed).abs().max() > 0.01, "the sinks make no difference"


def test_sinks_enter_once_where_splits_are_combined() -> None:
    rows = [Row(3, 1030, 1), Row(1, 70, 1), Row(0, 0, 1), Row(-1, 9, 1)]
    for options in (spec(6, 2, rotary=32, sinks=True), spec(window=700, sinks=True)):
        case = AttentionCase(options, rows, capacity=1100)
        assert case.workspace is not None
        case.check()
    ring = [Row(3, 1090, 1), Row(1, 450, 1), Row(0, 5000, 1)]
    AttentionCase(spec(window=700, ring=True, sinks=True), ring, capacity=710).check()


@pytest.mark.parametrize("start", long_except([9, 100], [0, 3, 9, 31, 32, 33, 100]))
def test_a_ring_wraps(start: int) -> None:
    options = spec(window=20, ring=True, rotary=16)  # capacity 32 = window 20 + 13 tokens - 1
    AttentionCase(
        options, [Row(1, start, 1), Row(3, 2 * start, 1), Row(-1, start, 1)], capacity=32
    ).check()
    AttentionCase(
        options,
        [Row(3, start, 1), Row(1, start, 13), Row(-1, start, 2), Row(5, 2 * start, 2)],
        capacity=32,
    ).check()


def test_a_ring_without_a_window_holds_the_newest() -> None:
    AttentionCase(
        spec(ring=True), [Row(1, 100, 1), Row(2, 31, 1), Row(3, 3, 1)], capacity=32
    ).check()
    AttentionCase(
        spec(ring=True), [Row(1, 100, 1), Row(2, 31, 1), Row(3, 3, 9)], capacity=32
    ).check()


@STEPS
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_appends_nothing(causal: bool, rows: list[Row]) -> None:
    cached = [
        replace(row, start=max(1, row.start)) for row in rows
    ]  # softmax over nothing is undefined
    AttentionCase(spec(append=False, causal=causal), cached, dtype=torch.float16).check()


@STEPS
def test_nothing_cached_gives_zero(rows: list[Row]) -> None:
    case = AttentionCase(spec(append=False, causal=False), [replace(row, start=0) for row in rows])
    assert torch.equal(case.launch(), torch.zeros_like(case.out))


@pytest.mark.parametrize("start", long_except([128], [0, 127, 128, 129, 513, 1030]))
def test_splits_are_combined_and_leave_the_locks_at_zero(start: int) -> None:
    case = AttentionCase(
        spec(6, 2, rotary=32),
        [Row(3, start, 1), Row(1, 1099 - start, 1), Row(-1, 9, 1)],
        capacity=1100,
    )
    assert case.workspace is not None
    case.check()
    expected, before = case.expected(), (case.key_state.clone(), case.value_state.clone())
    case.compare(
        case.launch(), expected, before
    )  # again, with what the first launch left in workspace and locks


@pytest.mark.parametrize("ring", long_except([True], [True, False]))
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_splits_of_a_window_and_of_a_ring(kind: str, ring: bool) -> None:
    rows = [Row(3, 1090, 1), Row(1, 450, 1)]
    if ring:
        rows.append(Row(0, 5000, 1))
    if ring and kind == "chunk":
        rows += [Row(2, 699, 1), Row(5, 1400, 1)]
    options = spec(window=700) if kind == "window" else spec(attention_chunk=700)
    options = replace(options, ring=ring)
    AttentionCase(options, rows, capacity=710 if ring else 1100).check()


BIASES = [spec(bias_heads=1), spec(6, 2, rotary=32, bias_heads=6, sinks=True)]


@pytest.mark.parametrize("options", long_except(BIASES[1:], BIASES), ids=["plain", "all"])
def test_splits_with_a_bias(options: AttentionSpec) -> None:
    rows = [Row(3, 1090, 1), Row(1, 450, 1), Row(0, 0, 1), Row(-1, 9, 1)]
    case = AttentionCase(options, rows, capacity=1100)
    assert case.workspace is not None
    case.check()


@STEPS
def test_a_bias_of_what_no_token_sees_may_be_anything(rows: list[Row]) -> None:
    case = AttentionCase(spec(bias_heads=1), rows)
    expected, before = case.expected(), (case.key_state.clone(), case.value_state.clone())
    for row, first in zip(case.rows, case.offsets[:-1], strict=True):
        for token in range(row.tokens):
            case.bias[first + token, :, row.start + token + 1 :] = float("nan")
    case.compare(case.launch(), expected, before)


@pytest.mark.parametrize("heads", long_except([1], [1, 4]))
def test_blocks_that_a_bias_hides_as_a_whole_are_not_loaded(heads: int) -> None:
    for rows in ([Row(3, 1090, 1), Row(1, 450, 1), Row(0, 90, 1)], [Row(3, 900, 40), Row(1, 5, 2)]):
        case = AttentionCase(spec(bias_heads=heads), rows, capacity=1100)
        plain = case.expected()
        hidden = torch.arange(1100) // 128 % 3 == 1
        case.bias[..., hidden] = float("-inf")
        expected, before = case.expected(), (case.key_state.clone(), case.value_state.clone())
        assert (expected[0] - plain[0]).abs().max() > 0.01
        case.compare(case.launch(), expected, before)


def test_more_splits_than_one_combining_pass_takes() -> None:
    case = AttentionCase(
        spec(16, 1, 256), [Row(0, 2500, 1)], capacity=2600, slots=1, dtype=torch.float16
    )
    assert attention_workspace(case.spec, 1, 1, 2600) // (16 * 257 * 4) > 4096 // (16 * 256)
    case.check()


def test_masked_and_unmasked_blocks_of_a_long_prompt() -> None:
    AttentionCase(
        spec(2, 1), [Row(0, 70, 70), Row(1, 0, 40)], capacity=140, dtype=torch.float16
    ).check()
    AttentionCase(
        spec(2, 1, window=33), [Row(0, 70, 70), Row(1, 0, 40)], capacity=140, dtype=torch.float16
    ).check()


def test_every_row_null_touches_nothing() -> None:
    for rows in ([Row(-1, 0, 1)] * 3, [Row(-1, 0, 5), Row(-1, 2, 0)]):
        case = AttentionCase(spec(), rows)
        case.check()
        assert torch.equal(case.out, torch.zeros_like(case.out))


def test_the_rotation_is_transformers() -> None:
    case = AttentionCase(spec(rotary=32), DECODE)
    query, key = apply_rotary_pos_emb(
        case.query[None].transpose(1, 2),
        case.key[None].transpose(1, 2),
        case.cos[None],
        case.sin[None],
    )
    torch.testing.assert_close(rotate(case.query, case.cos, case.sin), query[0].transpose(0, 1))
    case.check()
    torch.testing.assert_close(case.key_state[4, :, 7], key[0, :, 0], rtol=1e-6, atol=1e-6)


@settings(
    max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_step_equals_the_reference(data: st.DataObject) -> None:
    ring = data.draw(st.booleans())
    window = data.draw(st.integers(1, 24)) if ring else data.draw(st.sampled_from([0, 0, 1, 9, 40]))
    decode = data.draw(st.booleans())
    rows = []
    for slot in data.draw(st.lists(st.integers(-1, 8), min_size=1, max_size=6, unique=True)):
        tokens = 1 if decode else data.draw(st.integers(0, 17))
        rows.append(Row(slot, data.draw(st.integers(0, 200 if ring else 40 - tokens)), tokens))
    if not decode and sum(row.tokens for row in rows) <= len(rows):
        rows[0] = replace(rows[0], start=min(rows[0].start, 20), tokens=17)
    heads, kv_heads = data.draw(st.sampled_from([(4, 2), (6, 2), (3, 1), (2, 2), (5, 5)]))
    dim, value_dim = data.draw(st.sampled_from([(32, 32), (16, 24), (40, 40)]))
    options = spec(
        heads,
        kv_heads,
        dim,
        value_dim,
        window=window,
        ring=ring,
        softcap=data.draw(st.sampled_from([0.0, 1.5])),
        rotary=data.draw(st.sampled_from([0, 8, 16])),
        sinks=data.draw(st.booleans()),
        attention_chunk=data.draw(st.sampled_from([0, 0, 1, 7, 24] if not ring else [0])),
        bias_heads=0 if ring else data.draw(st.sampled_from([0, 0, 1, heads])),
    )
    AttentionCase(options, rows, capacity=40, seed=data.draw(st.integers(0, 99))).check()


APPEND = [Row(3, 2, 2), Row(-1, 0, 2), Row(0, 5, 2)]
SHAPES = [((8,), 1), ((8, 3), 1), ((2, 8, 3), 2), ((2, 3, 8), 3), ((2, 3, 8, 2), 3)]
DTYPES = [torch.float32, torch.float16, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", long_except([torch.float16, torch.bool], DTYPES))
@pytest.mark.parametrize(("shape", "axis"), long_except(SHAPES[::3], SHAPES))
def test_an_append_along_any_axis(shape: tuple[int, ...], axis: int, dtype: torch.dtype) -> None:
    check_update(shape, axis, APPEND, dtype, packed=False)
    check_update(
        shape, axis, [Row(3, 2, 1), Row(2, 0, 0), Row(-1, 0, 3), Row(0, 1, 7)], dtype, packed=True
    )
    check_update(shape, axis, [Row(3, 21, 5), Row(5, 7, 8)], dtype, packed=True, ring=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 300)])
def test_replacing_whole_slots(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_update(shape, 0, APPEND, dtype, packed=False)


@STEPS
def test_the_operator_for_gpus_equals_the_one_for_cpus(rows: list[Row]) -> None:
    case = AttentionCase(spec(), rows, capacity=300)
    control = [x.long() for x in case.control]
    expected, before = case.expected(), (case.key_state.clone(), case.value_state.clone())
    query = (
        case.query.transpose(0, 1).contiguous().transpose(0, 1)
    )  # heads outside: not a slice of a projection
    out = _attention_on_gpu(
        query,
        case.key,
        case.value,
        case.key_state,
        case.value_state,
        *control,
        scale=case.spec.scale,
    )
    case.compare(out, expected, before)


@pytest.mark.parametrize("packed", [False, True])
def test_the_update_for_gpus_equals_the_one_for_cpus(packed: bool) -> None:
    state, starts, slots = (
        torch.randn(5, 2, 8, 3),
        torch.tensor([1, 0, 6]),
        torch.tensor([3, -1, 0]),
    )
    value = torch.randn(2, 6, 3).transpose(0, 1) if packed else torch.randn(3, 2, 2, 3)
    offsets = torch.tensor([0, 2, 4, 6]) if packed else None
    expected, replaced = state.clone(), torch.randn(3, 2, 8, 3)
    torch.ops.inplace.update(expected, slots, value, offsets, starts, 2)
    _update_on_gpu(state, slots, value, offsets, starts, 2)
    assert torch.equal(state, expected)
    torch.ops.inplace.update(expected, slots, replaced)
    _update_on_gpu(state, slots, replaced)
    assert torch.equal(state, expected)


LINEAR = [
    LinearSpec(192, 80, norm=True, eps=1e-5),
    LinearSpec(256, 48, residual=True),
    LinearSpec(72, 64, norm=True, eps=1e-5, activation="silu", gated=True),
    LinearSpec(520, 40, bias=True, norm=True, residual=True, eps=1e-5, activation="gelu"),
    LinearSpec(136, 72, bias=True, activation="gelu_tanh", gated=True, residual=True),
    LinearSpec(64, 100, norm=True, eps=1e-6, activation="relu", float_out=True),
]


def check_linear(
    spec: LinearSpec, tokens: int, dtype: torch.dtype, blocks: LinearBlocks | None
) -> None:
    """Compare one launch with the operator in float64; memory after the result stays as it was."""
    torch.manual_seed(0)
    x, weight = (
        torch.randn(tokens, spec.inputs).to(dtype),
        (torch.randn(spec.outputs, spec.inputs) / spec.inputs**0.5).to(dtype),
    )
    bias = torch.randn(spec.outputs).to(dtype) if spec.bias else None
    norm = torch.randn(spec.inputs).to(dtype) if spec.norm else None
    residual = torch.randn(tokens, spec.width).to(dtype) if spec.residual else None
    out = torch.full(
        (tokens + 1, spec.width), float("nan"), dtype=torch.float32 if spec.float_out else dtype
    )
    linear(
        spec,
        x=x,
        weight=weight,
        bias=bias,
        norm=norm,
        residual=residual,
        out=out,
        workspace=0,
        tokens=tokens,
        blocks=blocks,
    )
    wide = [None if part is None else part.double() for part in (x, weight, bias, norm, residual)]
    expected = reference_linear(*wide, eps=spec.eps, activation=spec.activation, gated=spec.gated)  # type: ignore[arg-type]
    assert float((out[:tokens].double() - expected).norm() / expected.norm()) < (
        2e-6 if dtype is torch.float32 else 2e-3
    )
    assert out[tokens].isnan().all()


LAUNCHES = [
    (1, GemvBlocks(16, 64, 2)),
    (1, GemvBlocks(8, 512, 4)),
    (2, SlicedKBlocks(16, 16, 2)),
    (8, SlicedKBlocks(32, 32, 4)),
    (11, SlicedKBlocks(16, 64, 4)),
    (3, PipelinedBlocks(16, 64, 4, 3)),
    (40, PipelinedBlocks(64, 32, 4, 2)),
    *((tokens, None) for tokens in (1, 2, 16)),
]
LAYERS = [(spec, *launch) for spec in LINEAR for launch in LAUNCHES]


def _id(value: object) -> str:
    return f"{value.inputs}x{value.outputs}" if isinstance(value, LinearSpec) else str(value)


@pytest.mark.parametrize(("spec", "tokens", "blocks"), long_except(LAYERS[::9], LAYERS), ids=_id)
def test_a_linear_layer_of_few_rows(
    spec: LinearSpec, tokens: int, blocks: LinearBlocks | None
) -> None:
    check_linear(spec, tokens, torch.float16, blocks)
    if blocks is None:
        check_linear(spec, tokens, torch.float32, blocks)


def test_a_head_of_many_rows_is_streamed() -> None:
    spec = replace(LINEAR[-1], outputs=300)
    assert isinstance(choose_blocks(spec, 64, 2), PipelinedBlocks)
    check_linear(spec, 33, torch.float16, None)
