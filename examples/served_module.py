"""A module of your own, from its code to a served sequence: a smoother, its mean a state.

The module reads and updates its state with two operators. It is captured and written as a model of
a Triton repository, tritonserver serves it, and a client sends sequences of one number a request.
"""

import tempfile
from pathlib import Path

import inplace_builder as ib
import numpy as np
import torch
from inplace.client import Client, Sequence
from inplace.operators import read, update
from torch import Tensor

ROWS = 4
"""Maximum number of sequences in one step."""


class Smoother(torch.nn.Module):
    """An exponential mean: a tenth of the new value, nine tenths of the last mean."""

    def forward(self, value: Tensor, slots: Tensor, mean: Tensor) -> Tensor:
        """Smooth one value of each row.

        Args:
            value: ``[rows, 1]`` float32.
            slots: ``[rows]`` int32, the slot of each row's sequence.
            mean: state ``[slots, 1]`` float32, of all sequences.
        """
        smoothed = torch.lerp(read(mean, slots), value, 0.1)
        update(mean, slots, smoothed)  # in place, in each row's own slot
        return smoothed.clone()  # an output must not be the state's own memory


def capture() -> ib.Capture:
    """Capture the module with the descriptions of its inputs, outputs and states."""
    return ib.capture_module(
        Smoother(),
        inputs=[
            ib.TensorSpec(name="value", role=ib.Role.ROW, dtype=ib.Dtype.FLOAT32, shape=(1,)),
            ib.control_input("slots", ib.Role.SLOTS),
        ],
        outputs=[
            ib.TensorSpec(name="smoothed", role=ib.Role.VALUE, dtype=ib.Dtype.FLOAT32, shape=(1,))
        ],
        states=[
            ib.StateSpec(name="mean", shape=(1,), dtype=ib.Dtype.FLOAT32, update=ib.Update.REPLACE)
        ],
        max_rows=ROWS,
    )


def smooth(client: Client) -> None:
    """Send two sequences of different numbers in turns, and compare with NumPy."""
    with Sequence(client, "smoother") as low, Sequence(client, "smoother") as high:
        expected = dict.fromkeys((low, high), np.float32(0))
        for _ in range(20):
            for sequence, value in ((low, np.float32(1)), (high, np.float32(100))):
                outputs = sequence.step({"value": np.array([value])})
                expected[sequence] += np.float32(0.1) * (value - expected[sequence])
                np.testing.assert_allclose(
                    float(outputs["smoothed"][0]), expected[sequence], rtol=1e-5
                )
        print(
            f"after 20 steps: {expected[low]:.4f} and {expected[high]:.2f}, as NumPy computes them"
        )


def main() -> None:
    """Build, serve, and let two sequences take turns."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "model_repository"
        repository.mkdir()
        manifest = ib.write_engine(
            capture(), repository / "smoother", ib.BuildOptions(slots=16, max_rows=ROWS)
        )
        print("aliases (output@input@kind):", *manifest.program("step").aliases)
        log = Path(folder) / "tritonserver.log"
        with (
            ib.TritonServer(repository, ib.Ports(0, 0, 0), log=log) as server,
            Client(server.grpc_url) as client,
        ):
            smooth(client)
    print(
        "a request carried one number and no state; "
        f"the engine was {manifest.verified} at the build: no byte outside a step's slots changed"
    )


if __name__ == "__main__":
    main()
