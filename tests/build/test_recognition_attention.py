"""Scaled dot-product attention behind caches: which becomes `inplace::attention`, which stays explicit, both equal to eager."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inplace_builder.capture.exported import capture_exported
from support.state_modules import compare, operators
from torch import Tensor, nn
from torch.fx import Interpreter

HEADS, KV_HEADS, CAPACITY, DIM = 4, 2, 12, 8


class Block(nn.Module):
    """Projections, caches and attention as models write them."""

    def __init__(
        self,
        *,
        write: str = "index_copy",
        mask: str = "compare",
        repeat: str = "expand",
        window: int = 0,
    ) -> None:
        super().__init__()
        self.write, self.mask, self.repeat, self.window = write, mask, repeat, window
        self.query = nn.Linear(16, HEADS * DIM)
        self.key = nn.Linear(16, KV_HEADS * DIM)
        self.value = nn.Linear(16, KV_HEADS * DIM)
        self.register_buffer("causal", torch.ones(CAPACITY, CAPACITY, dtype=torch.bool).tril())

    def forward(self, keys: Tensor, values: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        tokens = x.shape[1]
        query = self.query(x).view(1, tokens, HEADS, DIM).transpose(1, 2)
        places = pos if tokens == 1 else pos + torch.arange(tokens)
        for cache, layer in ((keys, self.key), (values, self.value)):
            self.put(cache, places, layer(x).view(1, tokens, KV_HEADS, DIM).transpose(1, 2))
        key, value = self.heads(keys), self.heads(values)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.visible(places), enable_gqa=self.repeat == "gqa"
        )
        return out.transpose(1, 2).reshape(1, tokens, -1)

    def put(self, cache: Tensor, places: Tensor, new: Tensor) -> None:
        if self.write == "index_copy":
            cache.index_copy_(2, places, new)
        elif self.write == "assign":
            cache[:, :, places] = new
        else:
            start: Any = places[0].item()
            torch._check(start >= 0)
            torch._check(start + new.shape[2] <= CAPACITY)
            cache[:, :, start : start + new.shape[2]] = new

    def heads(self, cache: Tensor) -> Tensor:
        if self.repeat == "gqa":
            return cache
        if self.repeat == "interleave":
            return cache.repeat_interleave(HEADS // KV_HEADS, 1)
        if self.repeat == "tile":
            return cache.repeat(1, HEADS // KV_HEADS, 1, 1)
        return (
            cache[:, :, None]
            .expand(1, KV_HEADS, HEADS // KV_HEADS, CAPACITY, DIM)
            .reshape(1, HEADS, CAPACITY, DIM)
        )

    def visible(self, places: Tensor) -> Tensor:
        columns = torch.arange(CAPACITY)
        if self.mask == "buffer":
            causal: Tensor = self.get_buffer("causal")
            return causal[None, None, places]
        if self.mask == "off by one":
            return (columns <= places[:, None] + 1)[None, None]
        mask = columns <= places[:, None]
        if self.window:
            mask &= columns > places[:, None] - self.window
        if self.mask == "additive":
            return torch.where(mask, 0.0, -math.inf)[None, None]
        if self.mask == "bias":
            return torch.where(mask, 0.1, -math.inf)[None, None] * 1.0 + columns * 0.01
        return mask[None, None]


def steps(tokens: int) -> Any:
    def inputs(step: int) -> tuple[Tensor, Tensor]:
        return torch.randn(
            1, tokens, 16, generator=torch.Generator().manual_seed(step)
        ), torch.tensor([step])

    return inputs


def caches() -> list[Tensor]:
    return [torch.zeros(1, KV_HEADS, CAPACITY, DIM) for _ in range(2)]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("write", ["index_copy", "assign", "slice"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": "buffer", "repeat": "gqa"},
        {"mask": "additive", "repeat": "interleave", "window": 4},
    ],
)
def test_attention_behind_caches_is_one_operator(
    write: str, tokens: int, options: dict[str, Any]
) -> None:
    capture = compare(
        Block(write=write, **options), caches(), steps(tokens), steps=CAPACITY - tokens + 1
    )
    assert operators(capture) == {"attention": 1}
    assert all(state.operators == ("attention",) for state in capture.states)
    (call,) = [
        node
        for node in capture.exported.graph.nodes
        if node.target is torch.ops.inplace.attention.default
    ]
    assert call.kwargs.get("window", 0) == options.get("window", 0)


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"mask": "off by one"}, "neither causal nor a sliding window"),
        ({"mask": "bias"}, "its mask is a bias"),
    ],
)
def test_attention_that_is_not_provably_ours_stays_explicit(
    options: dict[str, Any], because: str
) -> None:
    capture = compare(Block(**options), caches(), steps(1), steps=CAPACITY)
    assert operators(capture) == {"update": 2, "read": 2}
    assert all(state.is_matched and because in state.reason for state in capture.states)


def test_tiled_heads_are_no_grouped_heads() -> None:
    """``repeat`` puts head h onto h modulo the cached heads: another attention."""
    capture = compare(Block(repeat="tile"), caches(), steps(1), steps=CAPACITY)
    assert operators(capture) == {"update": 2, "read": 2}


class Counted(nn.Module):
    """The module counts its own positions, and what it returns is the attention itself."""

    keys: Tensor
    values: Tensor
    count: Tensor

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.register_buffer("keys", torch.zeros(1, KV_HEADS, CAPACITY, DIM))
        self.register_buffer("values", torch.zeros(1, KV_HEADS, CAPACITY, DIM))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.keys.index_copy_(2, self.count, x)
        self.values[:, :, self.count] = x * 2
        mask = (torch.arange(CAPACITY) <= self.count)[None, None]
        self.count.add_(1)
        return F.scaled_dot_product_attention(
            x, self.keys, self.keys if self.shared else self.values, attn_mask=mask
        )


def test_a_module_that_counts_for_itself() -> None:
    capture = compare(
        Counted(), [], lambda step: (torch.randn(1, KV_HEADS, 1, DIM),), steps=CAPACITY
    )
    assert operators(capture) == {"attention": 1, "read": 1, "update": 1}


def test_one_cache_for_keys_and_values_stays_explicit() -> None:
    capture = compare(
        Counted(shared=True), [], lambda step: (torch.randn(1, KV_HEADS, 1, DIM),), steps=CAPACITY
    )
    assert "attention" not in operators(capture)
    assert any("keys and values are one cache" in state.reason for state in capture.states)


def test_a_stock_static_cache_as_transformers_exports_it() -> None:
    """Both layers' attention is recognised in the program that transformers itself exports; logits equal the model's own."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.executorch import convert_and_export_with_cache

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 16, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capture = capture_exported(convert_and_export_with_cache(model))
    assert operators(capture)["attention"] == config.num_hidden_layers
    caches = [state for state in capture.states if state.operators == ("attention",)]
    assert len(caches) == 2 * config.num_hidden_layers
    tokens = torch.randint(0, 64, (1, 12))
    memory = [torch.cat([state.bound_initial()] * 3) for state in capture.states]
    graph = capture.exported.module()
    assert isinstance(graph, torch.fx.GraphModule)
    with torch.no_grad():
        wanted = model(tokens).logits
        for step in range(tokens.shape[1]):
            arguments = {
                "input_ids": tokens[:, step : step + 1],
                "cache_position": torch.tensor([step]),
            }
            named = [arguments[name] for name in capture.inputs]
            (logits,) = torch.utils._pytree.tree_leaves(
                Interpreter(graph).run(*named, torch.tensor([1], dtype=torch.int32), *memory)
            )
            torch.testing.assert_close(logits[:, -1], wanted[:, step], rtol=1e-4, atol=1e-5)
    for state, arena in zip(capture.states, memory, strict=True):
        assert torch.equal(arena[[0, 2]], torch.cat([state.bound_initial()] * 2)), state.name
