"""Convolutions and recurrences become plain operators for TensorRT, which compute the same."""

from collections.abc import Mapping

import pytest
import torch
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder import Capture, DecoderOptions, capture_decoder
from inplace_builder.lower import LoweredNetwork, choose_mechanisms
from inplace_builder.lower.recurrences import EXPANSIONS, NAMES
from support.long import long_except
from support.lowering import greedy_rows, lowered
from support.network_interpreter import interpret
from support.recurrent_case import CHECKS, Operators
from support.recurrent_models import MODELS, recurrent_model
from torch import Tensor

ROWS, CHUNK = 3, 4
EXPANDED: Operators = dict(zip(NAMES, EXPANSIONS.values(), strict=True))


@pytest.mark.parametrize("name", CHECKS)
def test_the_plain_operators_continue_each_row_from_its_slot(name: str) -> None:
    CHECKS[name](EXPANDED)


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    return load_tensorrt("tensorrt_rtx")


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(["lfm2", "mamba2"], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_a_network_computes_what_the_model_computes(rtx: TensorRT, name: str) -> None:
    """A prompt in two chunks, then single tokens beside a sequence that starts, and a null row."""
    model = recurrent_model(name)
    capture = capture_decoder(model, DecoderOptions(32, ROWS, CHUNK))
    records = choose_mechanisms(capture.exported.graph, capture.states, rtx, order=("copy",))
    assert {record.kind for record in records} == {"copy"}
    network = lowered(capture, "copy", rtx)
    memory = {state.name: torch.zeros(ROWS, *state.shape) for state in capture.states}
    ids = torch.randint(3, 128, (11,), generator=torch.Generator().manual_seed(1)).tolist()
    written: list[list[int]] = [[], [], []]
    steps = [{0: ids[:4]}, {0: ids[4:7]}, {0: ids[7:8], 2: ids[:1]}, {0: ids[8:9], 2: ids[5:6]}]
    for step in steps:
        outputs = _run(capture, network, memory, written, step)
        for number, row in enumerate(step):
            written[row] += step[row]
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([written[row]])).logits[0, -1]
            actual = outputs["logits"][row if len(step) > 1 else number]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _run(
    capture: Capture,
    network: LoweredNetwork,
    memory: dict[str, Tensor],
    written: list[list[int]],
    step: Mapping[int, list[int]],
) -> dict[str, Tensor]:
    """A step: a prompt is alone in it, else every row has one token and a missing one is null."""
    rows = range(ROWS) if len(step) > 1 else list(step)
    parts = [step.get(row, [7]) for row in rows]
    starts = [len(written[row]) for row in rows]
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0).int()
    inputs = {
        "input_ids": torch.tensor([token for part in parts for token in part]),
        "positions": torch.cat(
            [torch.arange(at, at + len(part)) for part, at in zip(parts, starts, strict=True)]
        ).int(),
        "row_offsets": offsets,
        "last_tokens": offsets[1:] - 1,
        "slots": torch.tensor([row if row in step else -1 for row in rows], dtype=torch.int32),
        "write_indices": torch.tensor(starts, dtype=torch.int32),
        **greedy_rows(len(parts)),
    }
    bound = {name: state[list(rows)] for name, state in memory.items()}
    given = {name: x for name, x in (inputs | bound).items() if name in network.inputs}
    outputs = interpret(network, given)
    for name, output in network.state_outputs.items():
        memory[name][list(rows)] = outputs[output]
    return outputs
