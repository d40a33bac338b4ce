"""`inplace::attention` equals a reference in plain PyTorch; the rest of the states is NaN."""

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.attention_case import NAN, RAGGED, Case, Options, Row, bits, place
from torch import Tensor
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.granite_swa import modeling_granite_swa as granite_swa
from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash as mimo_v2_flash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 1)])
def test_ragged_rows_attend_over_their_own_cached_length(
    dtype: torch.dtype, heads: int, kv_heads: int
) -> None:
    Case(RAGGED, heads=heads, kv_heads=kv_heads, dtype=dtype).check()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_indices_are_int32_or_int64(index_dtype: torch.dtype) -> None:
    Case(RAGGED, index_dtype=index_dtype).check()


def test_a_row_does_not_depend_on_its_neighbours_its_slot_or_its_place_in_the_step() -> None:
    together = Case(RAGGED)
    out = together.check()
    for index, row in enumerate(RAGGED):
        alone = Case([Row(3, row.start, row.tokens)])
        first = together.offsets[index]
        alone.query = together.query[first : first + row.tokens]
        assert together.key is not None
        assert together.value is not None
        alone.key, alone.value = (
            together.key[first : first + row.tokens],
            together.value[first : first + row.tokens],
        )
        place(alone.key_state, 3, together.history[index][0], 0)
        place(alone.value_state, 3, together.history[index][1], 0)
        assert torch.equal(alone.run(), out[first : first + row.tokens])


@pytest.mark.parametrize(
    "options", [Options(), Options(append=False, causal=False), Options(window=3, ring=True)]
)
def test_null_rows_write_nothing_and_give_zero(options: Options) -> None:
    case = Case([Row(-1, 3, 2), Row(1, 5, 2), Row(-1, 0, 1)], options)
    case.query[:2] = NAN
    out = case.run()
    assert torch.equal(out[[0, 1, 4]], torch.zeros(3, 4, 6))
    assert out[2:4].abs().min() > 0
    only = Case([Row(-1, 0, 4)], options)
    before = bits(only.key_state), bits(only.value_state)
    assert torch.equal(only.run(), torch.zeros(4, 4, 6))
    assert torch.equal(before[0], bits(only.key_state))
    assert torch.equal(before[1], bits(only.value_state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    "rows", [[Row(4, 7, 1), Row(1, 2, 1), Row(2, 9, 5)], [Row(0, 0, 2), Row(1, 1, 3)]]
)
def test_a_window_hides_what_is_older(dtype: torch.dtype, kv_heads: int, rows: list[Row]) -> None:
    Case(rows, Options(window=3), kv_heads=kv_heads, dtype=dtype).check()


@pytest.mark.parametrize("tokens", [3, 4, 8])
def test_a_window_holds_inside_a_first_prompt_of_grouped_heads(tokens: int) -> None:
    Case([Row(0, 0, tokens)], Options(window=3)).check()


@pytest.mark.parametrize("tokens", [3, 4, 8])
def test_a_window_holds_inside_a_first_prompt_of_heads_of_their_own(tokens: int) -> None:
    Case([Row(0, 0, tokens)], Options(window=3), kv_heads=4).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("start", [0, 3, 6, 7, 8, 9, 20, 37])
def test_a_ring_wraps(start: int, kv_heads: int, dtype: torch.dtype) -> None:
    rows = [
        Row(3, start, 1),
        Row(1, start, 4),
        Row(5, 2 * start, 2),
    ]  # capacity 8 = window 5 + 4 tokens - 1
    Case(rows, Options(window=5, ring=True), capacity=8, kv_heads=kv_heads, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [Options(softcap=0.7), Options(softcap=0.7, window=3), Options(softcap=0.7, causal=False)],
)
def test_softcap_bounds_the_scores(options: Options, dtype: torch.dtype) -> None:
    capped = Case(RAGGED, options, dtype=dtype).check()
    free = Case(RAGGED, Options(causal=options.causal, window=options.window), dtype=dtype).check()
    assert (capped - free).abs().max() > 0.01, "the cap makes no difference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 3, 4, 5, 8, 11])
def test_chunked_attention_sees_from_the_start_of_the_chunk_on(
    start: int, dtype: torch.dtype
) -> None:
    options = Options(attention_chunk=4)
    Case([Row(3, start, 1), Row(1, start, 5), Row(5, 0, 2)], options, dtype=dtype).check()
    Case([Row(3, start, 1), Row(1, 7, 1), Row(-1, 3, 1)], options, dtype=dtype).check()
    Case([Row(0, 0, 9)], options, kv_heads=4, dtype=dtype).check()
    ring = Options(attention_chunk=4, ring=True)  # capacity 8 = chunk 4 + 5 tokens - 1
    Case([Row(3, start, 1), Row(1, 3 * start, 5)], ring, capacity=8, dtype=dtype).check()


def test_tokens_of_a_step_see_each_other_with_lookahead() -> None:
    together = Case([Row(1, 3, 4)], Options(causal=False)).check()
    causal = Case([Row(1, 3, 4)]).check()
    assert torch.equal(together[-1], causal[-1])
    assert (together[:-1] - causal[:-1]).abs().amax((1, 2)).min() > 0.01
    for step in ([Row(4, 7, 1), Row(2, 0, 6), Row(-1, 2, 2)], [Row(4, 7, 1), Row(0, 0, 1)]):
        Case(step, Options(causal=False), kv_heads=4).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(window=5),
        Options(attention_chunk=8),
        Options(causal=False),
        Options(softcap=0.7, sinks=True),
    ],
)
def test_a_bias_is_added_to_the_scores(options: Options, heads: int, dtype: torch.dtype) -> None:
    for step in (RAGGED, [Row(3, 7, 1), Row(0, 0, 1), Row(-1, 2, 1)]):
        changed = Case(step, replace(options, bias_heads=heads), dtype=dtype).check()
        plain = Case(step, options, dtype=dtype).check()
        assert (changed - plain).abs().max() > 0.01, "the bias makes no difference"


def test_a_bias_of_what_no_token_sees_may_be_anything() -> None:
    case = Case(RAGGED, Options(bias_heads=1))
    expected = Case(RAGGED, Options(bias_heads=1)).run()
    for row, first in zip(case.rows, case.offsets[:-1], strict=True):
        for token in range(row.tokens):
            case.bias[first + token, :, row.start + token + 1 :] = NAN
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize(
    "bias",
    [
        torch.zeros(9, 1, 16),
        torch.zeros(10, 2, 16),
        torch.zeros(10, 4, 15),
        torch.zeros(10, 16),
        torch.ones(10, 1, 16, dtype=torch.bool),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(bias: Tensor) -> None:
    case = Case(RAGGED, Options(bias_heads=1))
    case.bias = bias
    with pytest.raises(RuntimeError, match=r"bias must be \[10, 4 or 1, 16\], floating-point"):
        case.run()
    case = Case(RAGGED, Options(bias_heads=1, ring=True))
    with pytest.raises(RuntimeError, match="its states must not be rings"):
        case.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        Options(sinks=True),
        Options(sinks=True, window=3),
        Options(sinks=True, softcap=0.7),
        Options(sinks=True, causal=False),
        Options(sinks=True, window=5, ring=True),
    ],
)
def test_sinks_take_a_part_of_the_softmax(options: Options, dtype: torch.dtype) -> None:
    decode = [Row(3, 7, 1), Row(0, 0, 1), Row(5, 15, 1), Row(-1, 2, 1)]
    rows = RAGGED if not options.ring else [Row(4, 27, 1), Row(0, 0, 5), Row(2, 9, 3)]
    for step in (rows, decode[:3], decode):
        changed = Case(step, options, dtype=dtype).check()
        plain = Case(step, replace(options, sinks=False), dtype=dtype).check()
        assert (changed - plain).abs().max() > 0.01, "the sinks make no difference"


def test_sinks_of_any_size() -> None:
    case = Case(RAGGED, Options(sinks=True))
    plain = Case(RAGGED).run()
    case.sinks.fill_(-1e30)
    torch.testing.assert_close(case.run(), plain)
    case.sinks.fill_(1e4)
    assert torch.equal(case.run(), torch.zeros_like(plain))


EAGER: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "gpt_oss": gpt_oss.eager_attention_forward,
    "granite_swa": granite_swa.eager_attention_forward,
    "mimo_v2_flash": mimo_v2_flash.eager_attention_forward,
}


@pytest.mark.parametrize("name", EAGER)
def test_sinks_are_those_of_transformers(name: str) -> None:
    rows = [Row(4, 7, 1), Row(0, 0, 5), Row(2, 9, 3)]
    case = Case(rows, Options(sinks=True))
    assert case.key is not None
    assert case.value is not None
    out = case.run()
    module = SimpleNamespace(num_key_value_groups=2, sinks=case.sinks, training=False)
    for row, (keys, values), first in zip(rows, case.history, case.offsets[:-1], strict=True):
        own = slice(first, first + row.tokens)
        query, key, value = (
            x.transpose(0, 1)[None]
            for x in (
                case.query[own],
                torch.cat([keys, case.key[own]]),
                torch.cat([values, case.value[own]]),
            )
        )
        hidden = torch.ones(row.tokens, key.shape[2]).triu(row.start + 1).bool()
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        with torch.no_grad():
            expected = EAGER[name](module, query, key, value, mask[None, None], case.scale)[0]
        torch.testing.assert_close(out[own], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sinks", "text"),
    [
        (torch.zeros(2), r"sinks must be \[4\], .* not \[2\] of torch.float32"),
        (torch.zeros(4, dtype=torch.int64), r"sinks must be \[4\], .* of torch.int64"),
    ],
)
def test_sinks_that_do_not_fit_are_refused(sinks: Tensor, text: str) -> None:
    case = Case(RAGGED, Options(sinks=True))
    case.sinks = sinks
    with pytest.raises(RuntimeError, match=text):
        case.run()


def test_without_causality_a_token_sees_its_whole_chunk() -> None:
    assert (Case(RAGGED, Options(causal=False)).check() - Case(RAGGED).check()).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 4])
def test_cross_attention_appends_nothing(heads: int, dtype: torch.dtype) -> None:
    case = Case(
        [Row(4, 7, 1), Row(0, 1, 3), Row(2, 16, 2)],
        Options(append=False, causal=False),
        heads=heads,
        dtype=dtype,
    )
    before = bits(case.key_state), bits(case.value_state)
    case.check()
    assert torch.equal(before[0], bits(case.key_state))
    assert torch.equal(before[1], bits(case.value_state))


@pytest.mark.parametrize("seed", range(40))
def test_any_step_equals_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    ring = rng.random() < 0.4
    window = rng.randint(1, 5) if ring else rng.choice([0, 0, 2, 6])
    chunk, capacity = 4, 12
    owners = rng.sample(range(6), rng.randint(1, 6))
    rows = []
    for slot in owners:
        tokens = rng.randint(1, chunk)
        rows.append(
            Row(
                slot if rng.random() < 0.9 else -1,
                rng.randint(0, 30 if ring else capacity - tokens),
                tokens,
            )
        )
    options = Options(window=window, ring=ring, softcap=rng.choice([0.0, 0.0, 1.5]))
    heads, kv_heads = rng.choice([(4, 2), (6, 2), (3, 1), (2, 2)])
    Case(rows, options, heads=heads, kv_heads=kv_heads, capacity=capacity, seed=seed).check()


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (Row(1, 15, 2), Options(), "rows 15:17 are outside a slot that holds 16"),
        (Row(1, 16, 1), Options(), "rows 16:17 are outside a slot that holds 16"),
        (Row(1, -1, 1), Options(), "rows -1:0 are outside a slot that holds 16"),
        (Row(1, 0, 17), Options(), "rows 0:17 are outside a slot that holds 16"),
        (Row(1, 40, 17), Options(window=4, ring=True), "17 rows do not fit a ring of 16"),
    ],
)
def test_an_append_that_does_not_fit_is_an_index_error_and_writes_nothing(
    row: Row, options: Options, message: str
) -> None:
    case = Case([row], options)
    before = bits(case.key_state), bits(case.value_state)
    with pytest.raises(IndexError, match=message):
        case.run()
    assert torch.equal(before[0], bits(case.key_state))
    assert torch.equal(before[1], bits(case.value_state))


@pytest.mark.parametrize(
    "options", [Options(), Options(window=3), Options(softcap=1.5), Options(window=5, ring=True)]
)
def test_one_token_of_each_of_several_rows(options: Options) -> None:
    """One call appends them all, unless a row is null or a ring wraps."""
    rows = [Row(3, 7, 1), Row(0, 0, 1), Row(5, 15, 1)]
    Case(rows, options).check()
    Case([*rows, Row(-1, 2, 1)], options).check()
    if options.ring:
        Case([*rows, Row(2, 21, 1)], options).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(window=5),
        Options(window=5, ring=True, sinks=True),
        Options(causal=False),
        Options(append=False, causal=False),
        Options(softcap=0.7, bias_heads=1),
    ],
)
def test_values_are_a_part_of_keys(options: Options, kv_heads: int, dtype: torch.dtype) -> None:
    for step in (RAGGED, [Row(3, 7, 1), Row(0, 2, 1), Row(-1, 2, 1)]):
        rows = step if options.append else [replace(row, start=row.start + 1) for row in step]
        Case(rows, replace(options, latent=True), kv_heads=kv_heads, dtype=dtype).check()


def test_exactly_the_capacity_fits() -> None:
    Case([Row(1, 0, 16), Row(2, 15, 1), Row(3, 12, 4)]).check()
