"""A stream in chunks whose last one is shorter: an input has each row's valid length."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from inplace.errors import RequestError
from inplace.runtime.requests import Request
from inplace_builder import BuildOptions, RowOptions, capture_exported_rows, write_engine
from inplace_builder.errors import BuildError
from support.models import open_instance
from torch import Tensor, nn

CHUNK, WIDTH, CONTEXT, CAPACITY = 8, 6, 3, 48
LENGTHS = {1: [8, 8, 3], 2: [8, 1], 3: [5], 4: [8, 8, 8, 7]}
"""Valid entries of each chunk of each stream; they take turns in one step."""


class Recurrent(nn.Module):
    """A convolution with its context and an LSTM cell; a chunk has any length in eager mode."""

    context: Tensor
    hidden: Tensor
    cell: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, CONTEXT + 1)
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)
        self.register_buffer("context", torch.zeros(1, CONTEXT, WIDTH))
        for name in ("hidden", "cell"):
            self.register_buffer(name, torch.zeros(1, WIDTH))

    def forward(self, frames: Tensor, length: Tensor) -> Tensor:
        whole = torch.cat([self.context, frames], 1)
        self.context.copy_(whole.index_select(1, torch.arange(CONTEXT) + length))
        features = self.conv(whole.transpose(1, 2)).transpose(1, 2)
        hidden, cell, outputs = self.hidden, self.cell, []
        for index in range(frames.shape[1]):
            valid = index < length
            new, new_cell = self.lstm(features[:, index], (hidden, cell))
            hidden, cell = torch.where(valid, new, hidden), torch.where(valid, new_cell, cell)
            outputs.append(hidden)
        self.hidden.copy_(hidden)
        self.cell.copy_(cell)
        return torch.stack(outputs, 1)


class Cached(nn.Module):
    """Attends to all valid entries so far; padding is overwritten by the next chunk."""

    keys: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("keys", torch.zeros(1, CAPACITY, WIDTH))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

    def forward(self, frames: Tensor, length: Tensor) -> Tensor:
        places = self.count + torch.arange(frames.shape[1])
        self.keys.index_copy_(1, places, self.key(frames))
        visible = torch.arange(CAPACITY) <= places[:, None]
        scores = self.query(frames) @ self.keys.transpose(1, 2)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        self.count.add_(length)
        result: Tensor = weights @ self.keys
        return result


@pytest.mark.slow
@pytest.mark.parametrize("make", [Recurrent, Cached])
def test_a_shorter_chunk_gives_what_the_module_gives_for_its_valid_entries(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = make().eval()
    capture = capture_exported_rows(
        make_copy(module),
        RowOptions(4, max_requests=16, outputs=("y",), limits={"length": (1, CHUNK)}),
        (torch.zeros(1, CHUNK, WIDTH), torch.ones(1, dtype=torch.int64)),
    )
    write_engine(capture, tmp_path / "model", BuildOptions(slots=5, max_rows=4, capacity=16))
    instance = open_instance(tmp_path / "model")
    alone = {stream: make_copy(module) for stream in LENGTHS}
    for index in range(4):
        frames = {
            stream: torch.randn(1, CHUNK, WIDTH)
            for stream, lengths in LENGTHS.items()
            if index < len(lengths)
        }
        admitted = {
            stream: instance.admit(
                Request(
                    stream,
                    index == 0,
                    False,
                    {"frames": chunk, "length": torch.tensor([[LENGTHS[stream][index]]])},
                )
            )
            for stream, chunk in frames.items()
        }
        instance.step(list(admitted.values()))
        for stream, active in admitted.items():
            assert active.error is None, active.error
            length = LENGTHS[stream][index]
            with torch.no_grad():
                expected = alone[stream](frames[stream][:, :length], torch.tensor([length]))
            torch.testing.assert_close(active.outputs["y"][0, :length], expected[0])
            instance.finish(active)
            for name, buffer in alone[stream].named_buffers():
                memory = instance.arena.tensors[name][active.sequence.slot].reshape(buffer.shape)
                if name == "keys":
                    seen = sum(LENGTHS[stream][: index + 1])
                    memory, buffer = memory[:, :seen], buffer[:, :seen]
                torch.testing.assert_close(memory, buffer)
    for wrong in (0, CHUNK + 1):
        inputs = {"frames": torch.zeros(1, CHUNK, WIDTH), "length": torch.tensor([[wrong]])}
        with pytest.raises(RequestError, match=f"'length' holds {wrong}; expected values from 1"):
            instance.admit(Request(9, True, False, inputs))


def make_copy(module: nn.Module) -> nn.Module:
    """A module with these weights and states of its own."""
    copy = type(module)()
    copy.load_state_dict(module.state_dict())
    return copy.eval()


@pytest.mark.parametrize("limits", [{"frames": (0, 1)}, {"other": (0, 1)}, {"length": (2, 1)}])
def test_limits_that_no_input_can_have_are_refused(limits: dict[str, tuple[int, int]]) -> None:
    examples = (torch.zeros(1, CHUNK, WIDTH), torch.ones(1, dtype=torch.int64))
    with pytest.raises(BuildError, match=r"limits were given for|which no value is within"):
        capture_exported_rows(Recurrent(), RowOptions(4, limits=limits), examples)
