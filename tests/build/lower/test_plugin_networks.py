"""Networks of the mechanism ``plugin``: convolutions and recurrences are plugins in them.

The networks are defined and interpreted as `support.plugin_networks` says; the plugins compute with
the operators of the CPU. `tests/gpu/test_recurrent_plugins.py` runs plans.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from inplace.trt import TensorRT
from inplace_builder import Capture, DecoderOptions, capture_decoder
from inplace_builder.fusion.fuse import bindable_weights, fuse
from inplace_builder.lower import LoweredNetwork, choose_mechanisms, lower, lowerable
from inplace_builder.lower.recurrences import NAMES
from support.long import long_except
from support.lowering import greedy_rows
from support.network_interpreter import interpret
from support.plugin_networks import tensorrt_with_plugins
from support.recurrent_case import CHECKS, Operator, Operators
from support.recurrent_models import MODELS, recurrent_model
from support.recurrent_networks import RecurrenceNetwork
from torch import Tensor


@pytest.fixture(scope="module")
def tensorrt() -> TensorRT:
    return tensorrt_with_plugins()


def networks(tensorrt: TensorRT, made: list[LoweredNetwork]) -> Operators:
    """Functions with the operators' names that compute with a network."""

    def operator(name: str) -> Operator:
        cache: dict[object, RecurrenceNetwork] = {}

        def call(*arguments: Any, **options: Any) -> Tensor:
            key = tuple(x if x is None else (x.dtype, x.shape[1:]) for x in arguments)
            if key not in cache:
                cache[key] = RecurrenceNetwork.of(tensorrt, name, list(arguments), options)
                made.append(cache[key].lowered)
            network = cache[key]
            out = interpret(network.lowered, network.inputs(list(arguments)))
            assert out["state_updated"].data_ptr() == arguments[-3].data_ptr()
            return out["out"]

        return call

    return {name: operator(name) for name in NAMES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_a_recurrence_is_one_plugin_on_the_state_itself(
    tensorrt: TensorRT, name: str, dtype: torch.dtype
) -> None:
    made: list[LoweredNetwork] = []
    CHECKS[name](networks(tensorrt, made), dtype, 2e-5 if dtype is torch.float32 else 1e-2)
    (lowered,) = made
    (layer,) = lowered.network.plugins
    assert layer.operation.aliases[1] == layer.operation.first_state
    kinds = {
        lowered.network.get_layer(index).type.name for index in range(lowered.network.num_layers)
    }
    assert kinds <= {"CONSTANT", "IDENTITY", "CAST"}, "everything is computed by the plugin"


SLOTS, NULL = (4, 1), 2
"""The slots of two sequences, and the tokens of the null row that is between them."""
STEPS = ((4, 1), (3, 4), (1, 1), (1, 3), (1, 1))
"""Tokens of both sequences in each step."""


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(["lfm2", "mamba2"], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_computes_ragged_rows_with_plugins(tensorrt: TensorRT, name: str) -> None:
    """Prompts in chunks beside single tokens and a null row; other slots are NaN and stay so."""
    model = recurrent_model(name)
    capture = capture_decoder(model, DecoderOptions(32, 3, 4))
    network = _plugin_network(capture, tensorrt)
    kinds = {type(layer.operation).__name__ for layer in network.network.plugins}
    assert kinds & {"CausalConv1dOperation", "SelectiveScanOperation", "DeltaRuleOperation"}
    memory = {
        state.name: torch.full((5, *state.shape), float("nan"), dtype=state.dtype.as_torch)
        for state in capture.states
    }
    for state in memory.values():
        state[list(SLOTS)] = 0
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    starts = [0, 0]
    for counts in STEPS:
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        outputs = _step(network, memory, ids, starts, ends)
        for row in (0, 1):
            with torch.no_grad():
                expected = model(input_ids=ids[row : row + 1, : ends[row]]).logits[0, -1]
            actual = outputs["logits"][2 * row]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        starts = ends
    for state in memory.values():
        assert state[[0, 2, 3]].isnan().all()


def _plugin_network(capture: Capture, tensorrt: TensorRT) -> LoweredNetwork:
    """As a build makes it."""
    records = choose_mechanisms(capture.exported.graph, capture.states, tensorrt)
    assert {record.kind for record in records} == {"plugin"}
    kinds = {record.state: record.kind for record in records}
    graph = fuse(lowerable(capture.exported, kinds))
    return lower(
        graph,
        outputs=[spec.name for spec in capture.program.outputs],
        states=capture.states,
        kinds=kinds,
        tensorrt=tensorrt,
        bind=bindable_weights(graph),
    )


def _step(
    network: LoweredNetwork,
    memory: Mapping[str, Tensor],
    ids: Tensor,
    starts: list[int],
    ends: list[int],
) -> dict[str, Tensor]:
    """A step of the first sequence, a null row and the second sequence; memory is updated."""
    parts = [ids[row, starts[row] : ends[row]] for row in (0, 1)]
    offsets = torch.tensor([0, len(parts[0]), NULL, len(parts[1])]).cumsum(0).int()
    positions = [torch.arange(starts[row], ends[row]) for row in (0, 1)]
    inputs = {
        "input_ids": torch.cat([parts[0], torch.tensor([7] * NULL), parts[1]]),
        "positions": torch.cat([positions[0], torch.arange(NULL), positions[1]]).int(),
        "row_offsets": offsets,
        "last_tokens": offsets[1:] - 1,
        "slots": torch.tensor([SLOTS[0], -1, SLOTS[1]], dtype=torch.int32),
        "write_indices": torch.tensor([starts[0], 0, starts[1]], dtype=torch.int32),
        **greedy_rows(3),
        **memory,
        **network.bound_weights,
    }
    outputs = interpret(network, {name: inputs[name] for name in network.inputs})
    for name, output in network.state_outputs.items():
        assert outputs[output].data_ptr() == memory[name].data_ptr()
    return outputs
