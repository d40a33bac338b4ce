"""The three operators against references written out in plain PyTorch, over states whose untouched parts are NaN."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from inplace.operators import attention, read, update
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

NAN = float("nan")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest relative error of a row's output: a few roundings of the dtype."""


def bits(tensor: Tensor) -> Tensor:
    """A copy to compare bit for bit: NaN equals NaN only with the same payload."""
    return tensor.detach().clone().contiguous().view(torch.uint8)


def indices(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@dataclass(frozen=True)
class Row:
    """One row of a step: its slot, its cached length, and how many tokens it brings."""

    slot: int
    start: int
    tokens: int


@dataclass(frozen=True)
class Options:
    append: bool = True
    causal: bool = True
    window: int = 0
    ring: bool = False
    softcap: float = 0.0


@dataclass
class Case:
    """A step of `attention`: random histories, states that are NaN wherever no history lies, and new tokens."""

    rows: list[Row]
    options: Options = field(default_factory=Options)
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 6
    capacity: int = 16
    slots: int = 6
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        tokens = sum(row.tokens for row in self.rows)
        self.scale = self.dim**-0.5
        self.query = draw(tokens, self.heads, self.dim)
        self.key = draw(tokens, self.kv_heads, self.dim) if self.options.append else None
        self.value = draw(tokens, self.kv_heads, self.value_dim) if self.options.append else None
        self.key_state = torch.full((self.slots, self.kv_heads, self.capacity, self.dim), NAN, dtype=self.dtype)
        self.value_state = torch.full((self.slots, self.kv_heads, self.capacity, self.value_dim), NAN, dtype=self.dtype)
        self.history = [(draw(row.start, self.kv_heads, self.dim), draw(row.start, self.kv_heads, self.value_dim)) for row in self.rows]
        for row, (keys, values) in zip(self.rows, self.history, strict=True):
            if row.slot >= 0:
                place(self.key_state, row.slot, keys, 0)
                place(self.value_state, row.slot, values, 0)
        self.offsets = [0]
        for row in self.rows:
            self.offsets.append(self.offsets[-1] + row.tokens)

    def run(self) -> Tensor:
        return attention(
            self.query,
            self.key,
            self.value,
            self.key_state,
            self.value_state,
            indices(*[row.slot for row in self.rows], dtype=self.index_dtype),
            indices(*self.offsets, dtype=self.index_dtype),
            indices(*[row.start for row in self.rows], dtype=self.index_dtype),
            scale=self.scale,
            append=self.options.append,
            causal=self.options.causal,
            window=self.options.window,
            ring=self.options.ring,
            softcap=self.options.softcap,
        )

    def reference(self) -> Tensor:
        """Every token and head by itself, over keys gathered from the row's whole history, in float64."""
        out = torch.zeros(len(self.query), self.heads, self.value_dim, dtype=torch.float64)
        for row, (keys, values), first in zip(self.rows, self.history, self.offsets[:-1], strict=True):
            if row.slot < 0:
                continue
            if self.key is not None and self.value is not None:
                keys = torch.cat([keys, self.key[first : first + row.tokens]])
                values = torch.cat([values, self.value[first : first + row.tokens]])
            for token in range(row.tokens):
                own = row.start + token
                seen = [
                    position
                    for position in range(len(keys))
                    if (not self.options.causal or position <= own) and (not self.options.window or position > own - self.options.window)
                ]
                for head in range(self.heads):
                    shared = head // (self.heads // self.kv_heads)
                    query = self.query[first + token, head].double()
                    scores = torch.stack([(query * keys[position, shared].double()).sum() for position in seen]) * self.scale
                    if self.options.softcap:
                        scores = self.options.softcap * torch.tanh(scores / self.options.softcap)
                    weights = torch.exp(scores - scores.max())
                    weights = weights / weights.sum()
                    out[first + token, head] = sum(
                        weight * values[position, shared].double() for weight, position in zip(weights, seen, strict=True)
                    )
        return out

    def check(self) -> Tensor:
        """The outputs are the reference's, only the appended rows changed, and nothing moved; returns the outputs."""
        addresses = (self.key_state.data_ptr(), self.value_state.data_ptr())
        allowed = (self.key_state.clone(), self.value_state.clone())
        if self.key is not None and self.value is not None:
            for row, first in zip(self.rows, self.offsets[:-1], strict=True):
                if row.slot >= 0:
                    place(allowed[0], row.slot, self.key[first : first + row.tokens], row.start)
                    place(allowed[1], row.slot, self.value[first : first + row.tokens], row.start)
        out, expected = self.run(), self.reference()
        assert (self.key_state.data_ptr(), self.value_state.data_ptr()) == addresses
        assert torch.equal(bits(self.key_state), bits(allowed[0]))
        assert torch.equal(bits(self.value_state), bits(allowed[1]))
        assert out.dtype == self.dtype
        assert torch.isfinite(out).all()
        for first, end in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            error = (out[first:end].double() - expected[first:end]).norm()
            assert error <= TOLERANCE[self.dtype] * expected[first:end].norm().clamp(min=1e-9)
        return out


def place(state: Tensor, slot: int, entries: Tensor, start: int) -> None:
    """Entries ``[count, kv_heads, dim]`` at positions ``start…`` of a slot, one by one, modulo the capacity."""
    for index, entry in enumerate(entries):
        state[slot, :, (start + index) % state.shape[2]] = entry


RAGGED = [Row(4, 7, 1), Row(0, 0, 5), Row(2, 9, 3), Row(5, 0, 1)]
"""Decode one sequence, prefill a second, continue a third with a chunk, begin a fourth, in one step."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 1)])
def test_ragged_rows_attend_over_their_own_cached_length(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
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
        alone.key, alone.value = together.key[first : first + row.tokens], together.value[first : first + row.tokens]
        place(alone.key_state, 3, together.history[index][0], 0)
        place(alone.value_state, 3, together.history[index][1], 0)
        assert torch.equal(alone.run(), out[first : first + row.tokens])


@pytest.mark.parametrize("options", [Options(), Options(append=False, causal=False), Options(window=3, ring=True)])
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
@pytest.mark.parametrize("rows", [[Row(4, 7, 1), Row(1, 2, 1), Row(2, 9, 5)], [Row(0, 0, 2), Row(1, 1, 3)]])
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
    rows = [Row(3, start, 1), Row(1, start, 4), Row(5, 2 * start, 2)]  # capacity 8 = window 5 + 4 tokens - 1
    Case(rows, Options(window=5, ring=True), capacity=8, kv_heads=kv_heads, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [Options(softcap=0.7), Options(softcap=0.7, window=3), Options(softcap=0.7, causal=False)])
def test_softcap_bounds_the_scores(options: Options, dtype: torch.dtype) -> None:
    capped = Case(RAGGED, options, dtype=dtype).check()
    free = Case(RAGGED, Options(causal=options.causal, window=options.window), dtype=dtype).check()
    assert (capped - free).abs().max() > 0.01  # the case is one where it matters


def test_without_causality_a_token_sees_its_whole_chunk() -> None:
    assert (Case(RAGGED, Options(causal=False)).check() - Case(RAGGED).check()).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [2, 4])
def test_cross_attention_appends_nothing(heads: int, dtype: torch.dtype) -> None:
    case = Case([Row(4, 7, 1), Row(0, 1, 3), Row(2, 16, 2)], Options(append=False, causal=False), heads=heads, dtype=dtype)
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
        rows.append(Row(slot if rng.random() < 0.9 else -1, rng.randint(0, 30 if ring else capacity - tokens), tokens))
    options = Options(window=window, ring=ring, softcap=rng.choice([0.0, 0.0, 1.5]))
    heads, kv_heads = rng.choice([(4, 2), (6, 2), (3, 1), (2, 2)])
    Case(rows, options, heads=heads, kv_heads=kv_heads, capacity=capacity, seed=seed).check()


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        (Row(1, 15, 2), Options(), "rows 15:17 are outside a slot that holds 16"),
        (Row(1, 16, 1), Options(), "rows 16:17 are outside a slot that holds 16"),
        (Row(1, 0, 17), Options(), "rows 0:17 are outside a slot that holds 16"),
        (Row(1, 40, 17), Options(window=4, ring=True), "17 rows do not fit a ring of 16"),
    ],
)
def test_an_append_that_does_not_fit_is_an_index_error_and_writes_nothing(row: Row, options: Options, says: str) -> None:
    case = Case([row], options)
    before = bits(case.key_state), bits(case.value_state)
    with pytest.raises(IndexError, match=says):
        case.run()
    assert torch.equal(before[0], bits(case.key_state))
    assert torch.equal(before[1], bits(case.value_state))


def test_exactly_the_capacity_fits() -> None:
    Case([Row(1, 0, 16), Row(2, 15, 1), Row(3, 12, 4)]).check()


# --- read ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_read_gathers_the_slots_into_new_memory_and_null_rows_are_zero(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = torch.randint(1, 2 if dtype is torch.bool else 100, (5, *shape)).to(dtype)
    if dtype.is_floating_point:
        state[[1, 2]] = NAN  # slots nobody asks for
    before = bits(state)
    out = read(state, indices(4, -1, 0, 4))
    assert torch.equal(out, torch.stack([state[4], torch.zeros_like(state[0]), state[0], state[4]]))
    assert out.dtype == dtype
    out.fill_(0)
    assert torch.equal(bits(state), before)
    with pytest.raises(IndexError, match="out of range"):
        read(state, indices(5))


def test_a_null_row_reads_zero_where_slot_zero_is_nan() -> None:
    assert torch.equal(read(torch.full((2, 3), NAN), indices(-1, -1)), torch.zeros(2, 3))


# --- update ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_replace_writes_whole_slots_in_place(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = torch.full((5, *shape), NAN).to(dtype) if dtype.is_floating_point else torch.ones((5, *shape), dtype=dtype)
    value = torch.randint(0, 2, (3, *shape)).to(dtype)
    expected, address = state.clone(), state.data_ptr()
    expected[3], expected[1] = value[0], value[2]
    update(state, indices(3, -1, 1), value)
    assert torch.equal(bits(state), bits(expected))
    assert state.data_ptr() == address
    with pytest.raises(IndexError):
        update(state, indices(5, 0, 1), value)


APPENDED = {  # shape of a slot → the axis that grows, counted with the slot axis
    "vector": ((8,), 1),
    "first": ((8, 3), 1),
    "middle": ((2, 8, 3), 2),
    "last": ((2, 3, 8), 3),
    "four": ((2, 3, 8, 2), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(("shape", "axis"), APPENDED.values(), ids=APPENDED)
@pytest.mark.parametrize("ring", [False, True])
def test_a_packed_append_writes_each_rows_tokens_at_its_index(shape: tuple[int, ...], axis: int, dtype: torch.dtype, ring: bool) -> None:
    rest = [extent for index, extent in enumerate(shape) if index != axis - 1]
    starts = [6, 13, 2, 0] if ring else [6, 3, 2, 0]
    counts = [2, 5, 1, 8]
    slots = [4, 1, -1, 2]
    state = torch.full((5, *shape), NAN).to(dtype) if dtype.is_floating_point else torch.full((5, *shape), -7).to(dtype)
    value = torch.randint(0, 100, (sum(counts), *rest)).to(dtype)
    expected, address = state.clone(), state.data_ptr()
    token = 0
    for slot, start, count in zip(slots, starts, counts, strict=True):
        for offset in range(count):
            if slot >= 0:
                expected[slot].select(axis - 1, (start + offset) % 8).copy_(value[token])
            token += 1
    update(state, indices(*slots), value, indices(0, 2, 7, 8, 16), indices(*starts), axis=axis, ring=ring)
    assert torch.equal(bits(state), bits(expected))
    assert state.data_ptr() == address
    says = "9 rows do not fit a ring of 8" if ring else "rows 0:9 are outside a slot that holds 8"
    with pytest.raises(IndexError, match=says):
        update(state, indices(0), value[:9], indices(0, 9), indices(0), axis=axis, ring=ring)
    assert torch.equal(bits(state), bits(expected))


@pytest.mark.parametrize(("shape", "axis"), APPENDED.values(), ids=APPENDED)
@pytest.mark.parametrize("ring", [False, True])
def test_a_rectangular_append_writes_along_the_axis_of_the_value(shape: tuple[int, ...], axis: int, ring: bool) -> None:
    starts = [7, 21, 0] if ring else [5, 2, 0]
    slots = [4, 1, -1]
    state = torch.full((5, *shape), NAN)
    value = torch.randn(3, *[3 if index == axis - 1 else extent for index, extent in enumerate(shape)])
    expected, address = state.clone(), state.data_ptr()
    for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        for offset in range(3):
            if slot >= 0:
                expected[slot].select(axis - 1, (start + offset) % 8).copy_(value[row].select(axis - 1, offset))
    update(state, indices(*slots), value, None, indices(*starts), axis=axis, ring=ring)
    assert torch.equal(bits(state), bits(expected))
    assert state.data_ptr() == address
    if not ring:
        with pytest.raises(IndexError, match="rows 6:9 are outside a slot that holds 8"):
            update(state, indices(0), value[:1], None, indices(6), axis=axis)
        assert torch.equal(bits(state), bits(expected))


# --- what a trace sees ---


def test_fakes_give_the_shape_and_dtype_of_the_real_operators() -> None:
    real = Case(RAGGED, dtype=torch.bfloat16).run()
    with FakeTensorMode():
        traced = Case(RAGGED, dtype=torch.bfloat16).run()
        assert (traced.shape, traced.dtype) == (real.shape, real.dtype)
        rows = read(torch.zeros(5, 2, 3, dtype=torch.int8), indices(1, 2))
        assert (rows.shape, rows.dtype) == ((2, 2, 3), torch.int8)


def test_fake_read_refuses_slots_that_are_no_list() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"slots must be \[rows\], got \(1, 2\)"):
        read(torch.zeros(5, 3), torch.zeros(1, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("value", "axis", "says"),
    [
        (torch.zeros(2, 4, 3, dtype=torch.float64), None, r"value is torch.float64, the state is torch.float32"),
        (torch.zeros(2, 4, 1), None, r"value \(2, 4, 1\) must be \[rows, ...\] with the extents of the state \(5, 4, 3\)"),
        (torch.zeros(2, 3), None, r"value \(2, 3\) must be"),
        (torch.zeros(2, 3, dtype=torch.float16), 1, r"value is torch.float16, the state is torch.float32"),
        (torch.zeros(2, 3), 0, r"axis 0 is no axis of a slot of \(5, 4, 3\)"),
        (torch.zeros(2, 3), 3, r"axis 3 is no axis of a slot of \(5, 4, 3\)"),
    ],
)
def test_fake_update_refuses_what_cannot_be_written(value: Tensor, axis: int | None, says: str) -> None:
    offsets, starts = (None, None) if axis is None else (indices(0, 1, 2), indices(0, 0))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=says):
        update(torch.zeros(5, 4, 3), indices(0, 1), value, offsets, starts, axis=axis or 0)


def test_fake_attention_refuses_what_does_not_fit_its_states() -> None:
    with FakeTensorMode():
        case = Case(RAGGED)
        case.query = case.query[0]
        with pytest.raises(RuntimeError, match=r"query must be \[tokens, heads, dim\], states \[slots, kv_heads, capacity, dim\]"):
            case.run()
        case = Case(RAGGED, heads=3)
        with pytest.raises(RuntimeError, match="3 query heads do not divide over 2 kv heads"):
            case.run()
        case = Case(RAGGED)
        case.key = None
        with pytest.raises(RuntimeError, match="append needs key and value; without append there are none"):
            case.run()
        case = Case(RAGGED, Options(append=False, causal=False))
        case.key, case.value = Case(RAGGED).key, Case(RAGGED).value
        with pytest.raises(RuntimeError, match="append needs key and value; without append there are none"):
            case.run()
        for wrong in ("key", "value"):
            case = Case(RAGGED)
            setattr(case, wrong, getattr(case, wrong).to(torch.bfloat16))
            with pytest.raises(RuntimeError, match="keys and values must have their state's dtype"):
                case.run()


def test_opcheck_accepts_read() -> None:
    torch.library.opcheck(torch.ops.inplace.read.default, (torch.randn(5, 3), indices(1, -1)))


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((torch.zeros(5, 3), indices(1, -1), torch.randn(2, 3)), {}),
        ((torch.zeros(5, 8, 3), indices(1, -1), torch.randn(3, 3), indices(0, 2, 3), indices(4, 0)), {"axis": 1}),
        ((torch.zeros(5, 8, 3), indices(1, 0), torch.randn(2, 2, 3), None, indices(7, 0)), {"axis": 1, "ring": True}),
    ],
    ids=["replace", "packed", "rectangular ring"],
)
def test_opcheck_accepts_update(arguments: tuple[Tensor | None, ...], keywords: dict[str, object]) -> None:
    torch.library.opcheck(torch.ops.inplace.update.default, arguments, keywords)


@pytest.mark.parametrize("append", [True, False])
def test_opcheck_accepts_attention(append: bool) -> None:
    case = Case(RAGGED, Options(append=append, causal=append))
    arguments = (
        case.query,
        case.key,
        case.value,
        case.key_state.nan_to_num(),
        case.value_state.nan_to_num(),
        indices(*[row.slot for row in RAGGED]),
        indices(*case.offsets),
        indices(*[max(1, row.start) for row in RAGGED]),
    )
    torch.library.opcheck(torch.ops.inplace.attention.default, arguments, {"scale": 0.3, "append": append, "causal": append})
