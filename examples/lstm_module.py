"""A module of your own with an LSTM, from its code to served sequences.

It takes the states of one sequence and returns them; the engine keeps those of several in place.
"""

import tempfile
from pathlib import Path

import inplace_builder as ib
import numpy as np
import torch
from inplace.client import Client, Sequence
from numpy.typing import NDArray
from torch import Tensor, nn

CHUNK, FEATURES, HIDDEN = 8, 6, 16


class Detector(nn.Module):
    """Scores each frame of a chunk with an LSTM of two layers."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, num_layers=2, batch_first=True)
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, frames: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """Score ``frames [1, CHUNK, FEATURES]``; the states are ``[2, 1, HIDDEN]``."""
        features, (hidden, cell) = self.lstm(frames, (hidden, cell))
        return torch.sigmoid(self.score(features)), hidden, cell


def states() -> list[Tensor]:
    """What the LSTM's states begin with."""
    return [torch.zeros(2, 1, HIDDEN), torch.zeros(2, 1, HIDDEN)]


def serve(client: Client, streams: list[Tensor]) -> list[list[NDArray[np.generic]]]:
    """The scores of each chunk of each stream ``[chunks, CHUNK, FEATURES]``, in turns."""
    sequences = [Sequence(client, "detector") for _ in streams]
    scores: list[list[NDArray[np.generic]]] = [[] for _ in streams]
    for index in range(max(map(len, streams))):
        for sequence, stream, row in zip(sequences, streams, scores, strict=True):
            if index < len(stream):
                row.append(sequence.step({"frames": stream[index].numpy()})["score"])
    for sequence in sequences:
        sequence.close()
    return scores


def main() -> None:
    """Capture, write, serve, and compare with the module."""
    torch.manual_seed(0)
    module, streams = Detector().eval(), [torch.randn(n, CHUNK, FEATURES) for n in (5, 2, 4)]
    capture = ib.capture_exported_rows(
        module,
        ib.RowOptions(max_rows=4, outputs=("score",)),
        (torch.zeros(1, CHUNK, FEATURES), *states()),
        states={"hidden": 1, "cell": 2},  # the input's name: the place of its new value
    )
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "model_repository"
        ib.write_engine(capture, repository / "detector", ib.BuildOptions(slots=16, max_rows=4))
        with (
            ib.TritonServer(repository, ib.Ports(0, 0, 0), log=Path(folder) / "log") as server,
            Client(server.grpc_url) as client,
        ):
            served = serve(client, streams)
    for stream, scores in zip(streams, served, strict=True):
        memory = states()
        for chunk, row in zip(stream, scores, strict=True):
            expected, *memory = module(chunk[None], *memory)
            torch.testing.assert_close(torch.from_numpy(row), expected[0], rtol=0, atol=1e-5)
    print("three streams in turns: each chunk's scores are those of the module")


if __name__ == "__main__":
    main()
