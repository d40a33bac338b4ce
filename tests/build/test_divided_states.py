"""One tensor that is a state for each of several layers, and stays whole for its owner."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import inplace
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
from support.comparing import operators
from support.corpus import CORPUS
from support.corpus.case import noise
from support.corpus.layers import CAPACITY, Layers, Owning, Views, one_token
from support.exported_decoders import generate_as_rows
from support.models import open_instance
from support.streams import prompt
from torch import Tensor, nn

CASE = CORPUS["layers"]


def test_each_layer_s_cache_is_a_view_of_the_caller_s_tensor_and_attention_is_found_behind_it(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    module = CASE.module().eval()
    engine = build(module, CASE.example(), path=tmp_path / "engine", strict=True)
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


def owning(step: int) -> tuple[Tensor, Tensor]:
    return noise(step, 1, 4), torch.tensor([step])


def test_a_module_s_own_tensors_stay_whole_for_their_callers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = Owning()
    engine = build(eager, owning(0), path=tmp_path / "engine", strict=True)
    patterns = {
        record.state: record.reason.partition(":")[0] for record in engine.manifest.lowering
    }
    assert patterns == {"cells": "select_scatter"} | {
        f"cache_{layer}": "index_copy" for layer in range(3)
    }
    assert {name: tuple(tensor.shape) for name, tensor in engine.states.items()} == {
        "cells": (3, 1, 4),
        "cache": (1, 3, CAPACITY, 4),
    }
    reference = deepcopy(eager)
    for step in range(6):
        with torch.no_grad():
            expected = reference(*owning(step))
        result = engine(*owning(step))
        torch.testing.assert_close(result, expected)
        assert (
            result[1].data_ptr() != engine.states["cache"].data_ptr()
        )  # what is returned is a value of its own
        torch.testing.assert_close(dict(engine.states), dict(reference.named_buffers()))
        if step == 2:
            engine.save(tmp_path / "saved")
            engine = inplace.load(tmp_path / "saved")


def test_a_program_of_such_an_engine_holds_each_tensor_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CASE.module().eval()
    engine = build(module, CASE.example(), path=tmp_path / "engine")
    program = torch.export.export(engine, CASE.example())
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
    made = serialize(Layers(), CASE.example())
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


def test_parts_that_lie_closer_than_an_engine_can_be_bound_to_stay_one_state() -> None:
    arguments = (torch.zeros(2, 2, 1, 2, 5, 6), noise(0, 1, 1, 12), torch.tensor([0]))
    assert len(capture_exported(Layers(6), arguments, alignment=16).states) == 4
    assert (
        len(capture_exported(Layers(6), arguments, alignment=32).states) == 2
    )  # keys and values, 240 bytes apart, together
    assert len(capture_exported(Layers(6), arguments, alignment=256).states) == 1


def test_a_row_for_each_sequence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = CASE.module().eval()
    options = RowOptions(max_rows=3, positions="position", outputs=("out",))
    capture = capture_exported_rows(module, options, CASE.example())
    assert operators(capture)["attention"] == 2 and len(capture.states) == 4
    assert {spec.shape for spec in capture.states} == {(2, CAPACITY, 8)}
    write_engine(
        capture, tmp_path / "model", BuildOptions(slots=3, max_rows=3, capacity=CAPACITY)
    )  # verified there, against the module
    open_instance(tmp_path / "model")


class Decoder(nn.Module):
    """A small decoder of the user's own: one buffer has the keys and values of all layers."""

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
    result = generate_as_rows(open_instance(tmp_path / "model"), prompts, 8)
    for one, generated in zip(prompts, result, strict=True):
        known = list(one)
        for _ in range(8):
            module.cache.zero_()
            with torch.no_grad():
                known.append(
                    int(module(torch.tensor([known]), torch.arange(len(known)))[0, -1].argmax())
                )
        assert generated == known[len(one) :]


def test_views_of_one_buffer_are_states_of_that_buffer(tmp_path: Path) -> None:
    module, example = Views(whole=False), one_token(0)
    states = capture_exported(module, example).states
    assert {state.tensor.module_tensor.source for state in states} == {"cache"}
    written = {state.tensor.selects: state.pattern for state in states}
    assert written[(0, 0), (0, 0)] == "index_copy"
    assert written[(0, 1), (0, 2)] == written[(0, 0), (0, 2)] == "index_put"
    engine = build(Views(whole=False), example, path=tmp_path / "engine")
    assert list(engine.states) == ["cache"]
