"""One tensor that holds a state for each of several layers: each writes what it writes, and the tensor stays whole for its owner."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import inplace
import pytest
import torch
from inplace_builder import (
    DecoderOptions,
    RowOptions,
    capture_exported_decoder,
    capture_exported_rows,
    inline_lifted_buffers,
)
from inplace_builder.capture.exported import capture_exported
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.standalone.build import build
from inplace_builder.standalone.serialize import serialize
from support.exported_decoders import rows_say
from support.models import open_instance
from support.standalone_modules import CAPACITY, CASES, Layers, noise
from support.state_modules import Inputs, compare, operators
from support.streams import prompt
from torch import Tensor, nn

CASE = next(case for case in CASES if case.name == "layers")


def test_each_layer_s_cache_is_a_view_of_the_caller_s_tensor_and_attention_is_found_behind_it(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    module = CASE.module().eval()
    engine = build(module, (*CASE.states(), *CASE.inputs(0)), path=tmp_path / "engine", strict=True)
    assert [state.selection for state in engine.manifest.states] == [
        ((0, layer), (0, which)) for layer in range(2) for which in range(2)
    ]
    assert all(
        "the attention over it is causal" in record.reason for record in engine.manifest.lowering
    )
    (mine,), (theirs,) = CASE.states(), CASE.states()
    address = mine.data_ptr()
    for step in range(CAPACITY):
        before = mine.clone()
        with torch.no_grad():
            expected = module(theirs, *CASE.inputs(step))
        torch.testing.assert_close(engine(mine, *CASE.inputs(step)), expected)
        torch.testing.assert_close(mine, theirs)
        assert torch.equal(mine[..., :step, :], before[..., :step, :]) and torch.equal(
            mine[..., step + 1 :, :], before[..., step + 1 :, :]
        )
    assert mine.data_ptr() == address


class Owning(nn.Module):
    """Layers of a recurrent network, and of a cache, in one buffer each; the cache is returned too, and looked at by `unbind`."""

    cells: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        self.register_buffer("cells", torch.zeros(3, 1, 4))
        self.register_buffer(
            "cache", torch.arange(3.0)[None, :, None, None].repeat(1, 1, CAPACITY, 4)
        )

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        for layer, mix in enumerate(self.mix):
            self.cells[layer] = mix(torch.cat([x, self.cells[layer]], 1)).tanh()
            self.cache[:, layer].index_copy_(1, pos, self.cells[layer][None])
            x = x + self.cells[layer] + self.cache[:, layer].sum(1)
        first, _, last = self.cache.unbind(1)
        return x + first.amax(1) - last.amax(1), self.cache


def owning(step: int) -> tuple[Tensor, Tensor]:
    return noise(step, 1, 4), torch.tensor([step])


def test_a_module_s_own_tensors_stay_whole_for_whoever_looks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Owning()
    engine = build(eager, owning(0), path=tmp_path / "engine", strict=True)
    patterns = {
        record.state: record.reason.partition(":")[0] for record in engine.manifest.lowering
    }
    assert patterns == {"b_cells": "select_scatter"} | {
        f"b_cache_{layer}": "index_copy" for layer in range(3)
    }
    assert {name: tuple(tensor.shape) for name, tensor in engine.states.items()} == {
        "cells": (3, 1, 4),
        "cache": (1, 3, CAPACITY, 4),
    }
    reference = deepcopy(eager)
    for step in range(6):
        with torch.no_grad():
            expected = reference(*owning(step))
        found = engine(*owning(step))
        torch.testing.assert_close(found, expected)
        assert (
            found[1].data_ptr() != engine.states["cache"].data_ptr()
        )  # what is returned is a value of its own
        torch.testing.assert_close(dict(engine.states), dict(reference.named_buffers()))
        if step == 2:
            engine.save(tmp_path / "saved")
            engine = inplace.load(tmp_path / "saved")


def test_a_program_of_such_an_engine_holds_each_tensor_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CASE.module().eval()
    engine = build(module, (*CASE.states(), *CASE.inputs(0)), path=tmp_path / "engine")
    program = torch.export.export(engine, (*CASE.states(), *CASE.inputs(0)))
    (call,) = [
        node for node in program.graph.nodes if node.target is torch.ops.inplace.execute.default
    ]
    assert len(call.args[4]) == 1
    (mine,), (theirs,) = CASE.states(), CASE.states()
    for step in range(3):
        with torch.no_grad():
            torch.testing.assert_close(
                program.module()(mine, *CASE.inputs(step)), module(theirs, *CASE.inputs(step))
            )
        torch.testing.assert_close(mine, theirs)


def test_who_manages_memory_binds_the_parts() -> None:
    made = serialize(Layers(), (*CASE.states(), *CASE.inputs(0)))
    (cache,) = CASE.states()
    assert [binding.shape for binding in made.states] == [(1, 2, CAPACITY, 8)] * 4
    assert [record.view(cache).data_ptr() for record in made.records] == [
        cache[i, j].data_ptr() for i in range(2) for j in range(2)
    ]
    assert all(
        torch.equal(made.initial[record.name], record.view(cache)) for record in made.records
    )


def test_lifted_parts_can_be_put_back() -> None:
    torch.manual_seed(0)
    module = Owning()
    plain = inline_lifted_buffers(capture_exported(module, owning(0)))
    buffers = dict(plain.named_buffers())
    assert {"cells", "cache_0", "cache_1", "cache_2"} < set(buffers)
    for step in range(4):
        with torch.no_grad():
            torch.testing.assert_close(plain(*owning(step)), module(*owning(step)))
        assert all(
            torch.equal(buffers[f"cache_{layer}"], module.cache[:, layer]) for layer in range(3)
        )


class Whole(nn.Module):
    """A tensor of layers that cannot be divided, each for another reason."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        cache[1].index_copy_(1, pos, x)
        if self.how == "looked at whole":
            return cache.sum(2)
        if self.how == "index that varies":
            return cache.index_select(0, pos % 3)
        if self.how == "two axes":
            return cache[:, 0] + cache[0]
        cache[:, :, 3] = x[:, 0]
        return cache[0]


@pytest.mark.parametrize(
    "how", ["looked at whole", "index that varies", "two axes", "written whole"]
)
def test_what_is_not_used_by_layers_alone_stays_one_state(how: str) -> None:
    capture = compare(
        Whole(how),
        [torch.zeros(3, 3, CAPACITY, 4)],
        lambda step: (noise(step, 3, 1, 4), torch.tensor([step])),
        steps=6,
    )
    assert [state.name for state in capture.states] == ["cache"]


def test_parts_that_lie_closer_than_an_engine_can_be_bound_to_stay_one_state() -> None:
    arguments = (torch.zeros(2, 2, 1, 2, 5, 6), noise(0, 1, 1, 12), torch.tensor([0]))
    assert len(capture_exported(Layers(6), arguments, alignment=16).states) == 4
    assert (
        len(capture_exported(Layers(6), arguments, alignment=32).states) == 2
    )  # keys and values, 240 bytes apart, together
    assert len(capture_exported(Layers(6), arguments, alignment=256).states) == 1


class Exchanging(nn.Module):
    """Layers take each other's values."""

    def forward(self, cache: Tensor, x: Tensor, pos: Tensor) -> Tensor:
        old = cache[0].clone()
        cache[0] = cache[1]
        cache[1] = old * 0.5
        cache[1].index_copy_(1, pos, x)
        return cache[0].sum(1) - cache[-1].sum(1)


def test_layers_that_exchange_their_values() -> None:
    inputs: Inputs = lambda step: (noise(step, 1, 1, 4), torch.tensor([step]))  # noqa: E731
    capture = compare(
        Exchanging(), [torch.arange(2 * CAPACITY * 4.0).reshape(2, 1, CAPACITY, 4)], inputs
    )
    assert [state.name for state in capture.states] == ["cache_0", "cache_1"]


def test_names_that_are_taken_are_not_given_again() -> None:
    class Taken(nn.Module):
        def forward(self, cache: Tensor, cache_0: Tensor, pos: Tensor) -> Tensor:
            cache[0].index_copy_(1, pos, cache_0)
            return cache[1].sum(1)

    inputs: Inputs = lambda step: (noise(step, 1, 1, 4), torch.tensor([step]))  # noqa: E731
    capture = compare(Taken(), [torch.zeros(2, 1, CAPACITY, 4)], inputs)
    assert next(state.name for state in capture.states) == "cache_0_"


def test_a_row_for_each_sequence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CASE.module().eval()
    options = RowOptions(max_rows=3, positions="position", outputs=("out",))
    capture = capture_exported_rows(module, options, (*CASE.states(), *CASE.inputs(0)))
    assert operators(capture)["attention"] == 2 and len(capture.states) == 4
    assert {spec.shape for spec in capture.states} == {(2, CAPACITY, 8)}
    write_engine(
        capture, tmp_path / "model", BuildOptions(slots=3, max_rows=3, capacity=CAPACITY)
    )  # verified there, against the module
    open_instance(tmp_path / "model")


class Decoder(nn.Module):
    """A small decoder of the user's own: one buffer holds the caches of all layers, keys and values."""

    cache: Tensor

    def __init__(self, layers: int = 2, heads: int = 2, dim: int = 8, vocabulary: int = 50) -> None:
        super().__init__()
        self.heads, width = heads, heads * dim
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.places = nn.Embedding(CAPACITY, width)
        self.projects = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.register_buffer("cache", torch.zeros(layers, 2, 1, heads, CAPACITY, dim))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(positions)
        seen = torch.arange(CAPACITY) <= positions[:, None]
        for layer, project in enumerate(self.projects):
            query, key, value = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in project(x).chunk(3, -1)
            )
            keys, values = self.cache[layer, 0], self.cache[layer, 1]
            keys.index_copy_(2, positions, key)
            values.index_copy_(2, positions, value)
            x = x + nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=seen[None, None]
            ).transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x)
        return logits


def test_a_decoder_whose_layers_share_one_buffer_serves_ragged_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Decoder().eval()
    tokens = torch.export.Dim("tokens", min=1, max=CAPACITY)
    arguments = (torch.zeros(1, 3, dtype=torch.int64), torch.arange(3))
    options = DecoderOptions(max_rows=4, capacity=CAPACITY, chunk=5)
    shapes: Any = ({1: tokens}, {0: tokens})
    capture = capture_exported_decoder(
        module, options, arguments, dynamic_shapes=shapes, assume_consecutive=["positions"]
    )
    assert operators(capture)["attention"] == 2
    write_engine(
        capture, tmp_path / "model", BuildOptions(slots=4, max_rows=4, capacity=CAPACITY, chunk=5)
    )
    prompts = [prompt(seed, 3 + 2 * seed) for seed in range(4)]
    prompts = [[token % 50 for token in one] for one in prompts]
    found = rows_say(open_instance(tmp_path / "model"), prompts, 8)
    for one, said in zip(prompts, found, strict=True):
        known = list(one)
        for _ in range(8):
            module.cache.zero_()
            with torch.no_grad():
                known.append(
                    int(module(torch.tensor([known]), torch.arange(len(known)))[0, -1].argmax())
                )
        assert said == known[len(one) :]


class Views(nn.Module):
    """Layers hold views of one buffer: registered, as plain attributes, and a view of a view."""

    cache: Tensor
    keys: Tensor

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("cache", torch.zeros(2, 3, 1, CAPACITY, 4))
        self.register_buffer("keys", self.cache[0])
        self.first = self.keys[0]
        self.values = self.cache[1, 2]

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        self.first.index_copy_(1, pos, x)
        self.values[:, pos] = x * 2
        self.keys[2, :, pos] = x + 1
        return (
            self.cache.sum((0, 1, 3))
            if self.whole
            else self.first.sum(1) + self.values.amax(1) - self.keys[2].sum(1)
        )


@pytest.mark.parametrize("whole", [False, True])
def test_views_of_one_buffer_that_a_module_holds_are_that_buffer(
    whole: bool, tmp_path: Path
) -> None:
    capture = compare(
        Views(whole=whole), [], lambda step: (noise(step, 1, 1, 4), torch.tensor([step]))
    )
    assert {state.tensor.module_tensor.source for state in capture.states} == {"cache"}
    written = {state.tensor.selects: state.pattern for state in capture.states}
    assert whole or (
        written[(0, 0), (0, 0)] == "index_copy"
        and written[(0, 1), (0, 2)] == written[(0, 0), (0, 2)] == "index_put"
    )
    engine = build(
        Views(whole=whole), (noise(0, 1, 1, 4), torch.tensor([0])), path=tmp_path / "engine"
    )
    assert list(engine.states) == ["cache"]
