"""Networks of the mechanism ``plugin``: convolutions and recurrences are plugins in them.

The networks are defined and interpreted as `support.plugin_networks` says; the plugins compute with
the operators of the CPU. `tests/gpu/test_recurrent_plugins.py` runs plans.
"""

from typing import Any

import pytest
import torch
from inplace.trt import TensorRT
from inplace_builder import DecoderOptions, capture_decoder
from inplace_builder.lower import LoweredNetwork
from inplace_builder.lower.recurrences import NAMES
from support.long import long_except
from support.network_interpreter import interpret
from support.plugin_decoders import TwoSequences
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


STEPS = ((4, 1), (3, 4), (1, 1), (1, 3), (1, 1))
"""Tokens of both sequences in each step."""


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(["lfm2", "mamba2"], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_computes_ragged_rows_with_plugins(tensorrt: TensorRT, name: str) -> None:
    """Prompts in chunks beside single tokens and a null row; other slots are NaN and stay so."""
    model = recurrent_model(name)
    sequences = TwoSequences(capture_decoder(model, DecoderOptions(32, 3, 4)), tensorrt)
    kinds = {type(layer.operation).__name__ for layer in sequences.network.network.plugins}
    assert kinds & {"CausalConv1dOperation", "SelectiveScanOperation", "DeltaRuleOperation"}
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    starts = [0, 0]
    for counts in STEPS:
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        outputs = sequences.step(*(ids[row, starts[row] : ends[row]].tolist() for row in (0, 1)))
        for row in (0, 1):
            with torch.no_grad():
                expected = model(input_ids=ids[row : row + 1, : ends[row]]).logits[0, -1]
            torch.testing.assert_close(outputs[row]["logits"], expected, rtol=1e-4, atol=1e-4)
        starts = ends
