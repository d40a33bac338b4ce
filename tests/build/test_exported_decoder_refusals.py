"""Decoders of packed rows that are not written as transformers', and modules that are none."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inplace_builder import Capture, DecoderOptions, capture_exported_decoder
from inplace_builder.errors import BuildError
from support.comparing import operators
from support.long import long_except
from support.lowering import greedy_rows
from torch import Tensor, nn
from torch.export import Dim

pytestmark = pytest.mark.slow

VOCABULARY, HEADS, DIM, CAPACITY = 32, 2, 8, 16
WIDTH = HEADS * DIM
OPTIONS = DecoderOptions(CAPACITY, max_rows=4, chunk=4)


class Plain(nn.Module):
    """One layer, its attention written out; a subclass changes one thing.

    ``forward(ids [1, tokens], pos [1] or [tokens], keys, values [1, heads, capacity, dim])``
    returns scores ``[1, tokens, vocabulary]``.
    """

    softcap, window = 0.0, 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("table", torch.randn(CAPACITY, WIDTH))

    def forward(self, ids: Tensor, pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens = ids.shape[1]
        places = pos[0] + torch.arange(tokens)
        x = self.embedded(ids, places)
        query, key, value = (
            part.view(1, tokens, HEADS, DIM).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        keys.index_copy_(2, places, key)
        values[:, :, places] = value
        out = self.attend(query, keys, values, places)
        return self.scores(x + out.transpose(1, 2).reshape(1, tokens, WIDTH))

    def embedded(self, ids: Tensor, places: Tensor) -> Tensor:
        x: Tensor = self.embed(ids) + self.get_buffer("table")[places]
        return x

    def visible(self, places: Tensor) -> Tensor:
        columns = torch.arange(CAPACITY)
        mask = columns <= places[:, None]
        return mask & (columns > places[:, None] - self.window) if self.window else mask

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        scores = query @ keys.transpose(-1, -2) / math.sqrt(DIM)
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~self.visible(places), torch.finfo(scores.dtype).min)
        return F.softmax(scores, dim=-1) @ values

    def scores(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


class Capped(Plain):
    softcap, window = 5.0, 4


class Biased(Plain):
    def attend(self, query: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        mask = torch.where(self.visible(places), 0.0, -math.inf)
        weights = torch.softmax(query @ keys.transpose(2, 3) * 0.3 + mask, -1)
        return torch.matmul(weights, values)


class Sunk(Plain):
    """Each head has a sink, written as gpt-oss writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([0.5, 2.0]))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        mask = torch.where(self.visible(places), 0.0, torch.finfo(torch.float32).min)
        scores = torch.matmul(query, keys.transpose(2, 3)) * 0.3 + mask
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
        both = torch.cat([scores, self.logits(sinks, query)], dim=-1)
        both = both - both.max(dim=-1, keepdim=True).values
        weights = F.softmax(both, dim=-1, dtype=both.dtype)[..., :-1]
        return torch.matmul(F.dropout(weights, 0.0, training=self.training), values)

    def logits(self, sinks: Tensor, query: Tensor) -> Tensor:
        return sinks


class SunkWindow(Sunk):
    """The same, more briefly, in a window."""

    window = 4

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        scores = query @ keys.transpose(-1, -2) * 0.3
        scores = scores.masked_fill(~self.visible(places), -math.inf)
        sinks = self.sinks[:, None, None].expand(1, HEADS, query.shape[2], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)
        return weights[..., :CAPACITY] @ values


class Chosen(Plain):
    """The mask is a part of a table; only the last token's scores are returned."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        table = torch.ones(CAPACITY, CAPACITY, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=table[places])

    def scores(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)[:, -1]
        return out


class Counting(Plain):
    """It counts its own positions."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, ids: Tensor, pos: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = super().forward(ids, self.count, keys, values)
        self.count.add_(ids.shape[1])
        return out


def capture(module: nn.Module, tokens: int = 3, *, dynamic: bool = True, **options: Any) -> Capture:
    caches = [torch.zeros(1, HEADS, CAPACITY, DIM) for _ in range(2)]
    arguments = (
        torch.zeros(1, tokens, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        *caches,
    )
    shapes = ({1: Dim("tokens", min=1, max=CAPACITY)}, None, None, None) if dynamic else None
    return capture_exported_decoder(
        module, options.pop("options", OPTIONS), arguments, dynamic_shapes=shapes, **options
    )


@pytest.mark.parametrize(
    ("module", "dynamic"),
    long_except(
        [
            (Biased, True),
            (SunkWindow, False),
            (Chosen, False),
            (Counting, False),
        ],
        product([Plain, Capped, Biased, Sunk, SunkWindow, Chosen, Counting], [True, False]),
    ),
)
def test_two_rows_of_different_lengths_say_what_the_module_says_of_each(
    module: type[Plain], dynamic: bool
) -> None:
    result = capture(module(), 3 if dynamic else 1, dynamic=dynamic)
    assert operators(result) == {"attention": 1, "sample": 1}
    (attention,) = [
        node
        for node in result.exported.graph.nodes
        if node.target is torch.ops.inplace.attention.default
    ]
    assert attention.kwargs.get("softcap", 0.0) == pytest.approx(module.softcap)
    assert attention.kwargs.get("window", 0) == module.window
    rows = [torch.randint(0, VOCABULARY, (count,)) for count in (4, 9)]
    memory = [torch.full((3, *state.shape), float("nan")) for state in result.states]
    graph, cached = result.exported.module(check_guards=False), [0, 0]
    for counts in ((3, 4), (1, 2), (0, 3)):
        parts = [
            row[start : start + count]
            for row, start, count in zip(rows, cached, counts, strict=True)
        ]
        offsets = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        starts = torch.tensor(cached, dtype=torch.int32)
        with torch.no_grad():
            _, logits, *_ = graph(
                torch.cat(parts),
                torch.cat(
                    [
                        torch.arange(start, start + count)
                        for start, count in zip(cached, counts, strict=True)
                    ]
                ).int(),
                offsets,
                (offsets[1:] - 1).clamp(min=0),
                torch.tensor([2, 0], dtype=torch.int32),
                starts,
                *greedy_rows(2, VOCABULARY).values(),
                *memory,
            )
        cached = [start + count for start, count in zip(cached, counts, strict=True)]
        for row, (count, end) in enumerate(zip(counts, cached, strict=True)):
            if count:
                expected = result.reference([{"input_ids": rows[row][:end]}])
                torch.testing.assert_close(logits[row], expected["logits"], rtol=1e-4, atol=1e-5)
    assert all(bool(tensor[1].isnan().all()) for tensor in memory), "the slot of no row"


class Varying(Sunk):
    def logits(self, sinks: Tensor, query: Tensor) -> Tensor:
        return sinks * query[..., :1]


class Averaging(Plain):
    def scores(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x - x.mean(1, keepdim=True))
        return out


class Reversing(Plain):
    def scores(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.flip(1))
        return out


class Numbering(Plain):
    def embedded(self, ids: Tensor, places: Tensor) -> Tensor:
        x: Tensor = self.embed(ids) + self.get_buffer("table")[torch.arange(ids.shape[1])]
        return x


class Everything(Plain):
    def visible(self, places: Tensor) -> Tensor:
        return (torch.arange(CAPACITY) >= 0) & (places[:, None] >= 0)


class Remembering(Plain):
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(WIDTH))

    def scores(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x + self.last)
        self.last.copy_(x[0, -1])
        return out


class Two(Plain):
    def scores(self, x: Tensor) -> Any:
        return self.head(x), x


class Floating(Plain):
    def embedded(self, ids: Tensor, places: Tensor) -> Tensor:
        x: Tensor = self.qkv.weight[:1] * ids[..., None].float()
        return x


REFUSED = [
    (Averaging, r"aten\.mean\.dim works along the token axis at .*self\.scores"),
    (Reversing, r"aten\.flip\.default has no rule that keeps tokens apart at .*self\.scores"),
    (Numbering, "depends on the number of tokens of a step"),
    (
        Everything,
        "not provably causal attention over its own cache: its mask is neither causal "
        "nor a sliding window",
    ),
    (
        Varying,
        "not provably causal attention over its own cache: its sinks are computed from inputs "
        "or states",
    ),
    (Remembering, r"state last is not a cache of an attention, but read at .*self\.scores"),
    (Two, "a decoder returns its scores alone, this module returns 2 outputs"),
    (Floating, "input ids is not a tensor of token ids: it indexes no embedding"),
]


@pytest.mark.parametrize(("module", "reason"), long_except(REFUSED[::2], REFUSED))
def test_what_is_no_decoder_of_packed_rows_is_refused(module: type[Plain], reason: str) -> None:
    with pytest.raises(BuildError, match=reason):
        capture(module())


def test_a_fixed_number_of_tokens_is_refused() -> None:
    with pytest.raises(
        BuildError,
        match="exported for steps of 3 tokens; export it for one token, or for a dynamic number",
    ):
        capture(Plain(), 3, dynamic=False)


def test_a_capacity_beyond_the_proof_is_refused() -> None:
    with pytest.raises(
        BuildError, match="a capacity of 17 is more than the 16 positions of the module's caches"
    ):
        capture(Plain(), options=DecoderOptions(17, max_rows=4, chunk=4))


def test_promises_name_inputs() -> None:
    with pytest.raises(
        BuildError, match=r"assume_consecutive names \['position'\], which are not inputs"
    ):
        capture(Plain(), assume_consecutive=["position"])
