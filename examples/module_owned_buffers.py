"""Buffers of a module: they become the engine's own states, and are saved with it."""

import tempfile
from pathlib import Path

import inplace
import inplace_builder as ib
import torch
from torch import Tensor, nn


class Smoother(nn.Module):
    """An LSTM cell over frames of audio, and a running count, kept in buffers."""

    hidden: Tensor
    cell: Tensor
    frames: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(width, width)
        self.register_buffer("hidden", torch.zeros(1, width))
        self.register_buffer("cell", torch.zeros(1, width))
        self.register_buffer("frames", torch.zeros((), dtype=torch.int64))

    def forward(self, frame: Tensor) -> Tensor:
        """Take one frame ``[1, width]``."""
        hidden, cell = self.lstm(frame, (self.hidden, self.cell))
        self.hidden.copy_(hidden)
        self.cell.copy_(cell)
        self.frames += 1
        smoothed: Tensor = hidden / self.frames
        return smoothed


def main() -> None:
    """Build, stream, save in the middle, continue in a second engine, and compare the states."""
    torch.manual_seed(0)
    module = Smoother(8).eval()
    frames = torch.randn(10, 1, 8)
    with tempfile.TemporaryDirectory() as folder:
        engine = ib.build(module, (frames[0],), path=Path(folder) / "engine")
        print("aliases (output@input@kind):", *engine.manifest.aliases)
        addresses = {name: tensor.data_ptr() for name, tensor in engine.states.items()}
        with torch.no_grad():
            expected = [module(frame) for frame in frames]
        for frame, output in zip(frames[:5], expected[:5], strict=True):
            torch.testing.assert_close(engine(frame), output)
        engine.save(Path(folder) / "saved")
        second = inplace.load(Path(folder) / "saved")
        for frame, output in zip(frames[5:], expected[5:], strict=True):
            torch.testing.assert_close(engine(frame), output)
            torch.testing.assert_close(second(frame), output)
    for name, tensor in engine.states.items():
        torch.testing.assert_close(tensor, module.get_buffer(name))
        assert tensor.data_ptr() == addresses[name]
        assert tensor.data_ptr() != second.states[name].data_ptr()
        print(
            f"state {name}: at {tensor.data_ptr():#x} before and after {len(frames)} calls, "
            "equal to the module's buffer"
        )
    print(
        "nothing was copied: the engine wrote into its own states; "
        "the second engine, loaded from the saved one, has its own"
    )


if __name__ == "__main__":
    main()
