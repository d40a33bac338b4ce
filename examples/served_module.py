"""A module of your own, from its code to a served sequence: a smoother whose last value is its state.

What happens: the module says how it reads and updates its state (two operators), is captured and written as a model of a Triton
repository, tritonserver serves it, and a client sends sequences of one number a request.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from inplace.client import Client, Sequence
from inplace.operators import read, update
from inplace.schema.dtypes import Dtype
from inplace.schema.specs import Role, StateSpec, TensorSpec, Update
from inplace_builder import capture_module
from inplace_builder.capture.capture import control_input
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from torch import Tensor

ROWS = 4
"""Sequences that share one step."""


class Smoother(torch.nn.Module):
    """An exponential mean: a tenth of the new value, nine tenths of what was."""

    def forward(self, value: Tensor, slots: Tensor, mean: Tensor) -> Tensor:
        """Values ``[rows, 1]`` of the sequences in ``slots [rows]``; the state ``mean [slots, 1]`` is all sequences' memory."""
        smoothed = torch.lerp(read(mean, slots), value, 0.1)
        update(mean, slots, smoothed)  # in place, in each row's own slot
        return smoothed.clone()  # an output is memory of its own, never the state


def main() -> None:
    """Build, serve, and let two sequences of different numbers take turns."""
    capture = capture_module(
        Smoother(),
        inputs=[
            TensorSpec(name="value", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(1,)),
            control_input("slots", Role.SLOTS),
        ],
        outputs=[TensorSpec(name="smoothed", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(1,))],
        states=[StateSpec(name="mean", shape=(1,), dtype=Dtype.FLOAT32, update=Update.REPLACE)],
        max_rows=ROWS,
    )
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "model_repository"
        repository.mkdir()
        manifest = write_engine(
            capture, repository / "smoother", BuildOptions(slots=16, max_rows=ROWS)
        )
        print("aliases (output@input@kind):", *manifest.program("step").aliases)
        with (
            TritonServer(
                repository, Ports(0, 0, 0), log=Path(folder) / "tritonserver.log"
            ) as server,
            Client(server.grpc_url) as client,
            Sequence(client, "smoother") as low,
            Sequence(client, "smoother") as high,
        ):
            expected = dict.fromkeys((low, high), np.float32(0))
            for _ in range(20):
                for sequence, value in (
                    (low, 1.0),
                    (high, 100.0),
                ):  # only what is new is sent: one number
                    [said] = sequence.step({"value": np.array([value], dtype=np.float32)})[
                        "smoothed"
                    ]
                    expected[sequence] += np.float32(0.1) * (np.float32(value) - expected[sequence])
                    np.testing.assert_allclose(said, expected[sequence], rtol=1e-5)
            print(
                f"after 20 steps: {expected[low]:.4f} and {expected[high]:.2f}, as NumPy computes them"
            )
    print(
        f"a request carried one number and no state; engine {manifest.verified} at the build: no byte outside a step's slots had changed"
    )


if __name__ == "__main__":
    main()
