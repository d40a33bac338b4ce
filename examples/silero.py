"""Silero VAD, a voice activity detector, rebuilt from its weights as a module with states.

A stream sends 32 ms of audio a request. Its states are the last samples, which the first window of
the next chunk overlaps, and the two vectors of an LSTM cell. The layers and their names are those
of ``silero_vad/tinygrad_model.py`` in the PyPI package ``silero-vad`` (MIT).

The package has two sets of weights for one architecture, with different results:
``silero_vad.jit``, which its own ``load_silero_vad`` uses, and ``silero_vad_16k.safetensors``
(https://github.com/snakers4/silero-vad/issues/768). Either can be loaded.
"""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import inplace_builder as ib
import torch
from inplace.operators import read, update
from safetensors.torch import load_file
from torch import Tensor, nn

SAMPLE_RATE = 16_000
"""Samples a second. The package's model for 8 kHz has other weights and is not built."""


CHUNK = 512
"""Samples of one request: 32 ms."""


CONTEXT = 64
"""Samples of the last chunk that precede a chunk, and reflected samples that follow it."""


HIDDEN = 128
"""Extent of the LSTM cell's two vectors."""


WINDOW, HOP, BINS = 256, 128, 129
"""The short-time Fourier transform: samples of a window, samples between windows, frequencies."""


TORCHSCRIPT, SAFETENSORS = "silero_vad.jit", "silero_vad_16k.safetensors"
"""Files of the package: the TorchScript model that it uses itself, and the other weights."""


TORCHSCRIPT_NAMES = {
    "stft.forward_basis_buffer": "stft_conv.weight",
    **{f"encoder.{block}.reparam_conv": f"conv{block + 1}" for block in range(4)},
    "decoder.rnn": "lstm_cell",
    "decoder.decoder.2": "final_conv",
}
"""Names of layers in the TorchScript model, and here."""


class SileroVad(nn.Module):
    """One step of the 16 kHz model for several rows."""

    reflected: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(
            1, 2 * BINS, WINDOW, stride=HOP, bias=False
        )  # real parts, then imaginary ones
        self.conv1 = nn.Conv1d(BINS, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, HIDDEN, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(HIDDEN, HIDDEN)
        self.final_conv = nn.Conv1d(HIDDEN, 1, 1)
        length = CONTEXT + CHUNK
        # the reflection at the end as one gather, an operator of every engine: … n-2, n-1, n-2 …
        indices = torch.cat(
            [torch.arange(length), torch.arange(length - 2, length - 2 - CONTEXT, -1)]
        )
        self.register_buffer("reflected", indices, persistent=False)

    def forward(
        self, audio: Tensor, slots: Tensor, context: Tensor, hidden: Tensor, cell: Tensor
    ) -> Tensor:
        """Probability that a chunk holds speech.

        Args:
            audio: ``[rows, 512]`` float32, 16 kHz, between -1 and 1.
            slots: ``[rows]`` int32.
            context: state ``[slots, 64]``, the last samples of the last chunk.
            hidden: state ``[slots, 128]``, the LSTM cell's output.
            cell: state ``[slots, 128]``, the LSTM cell's memory.

        Returns:
            ``[rows, 1]`` float32, between 0 and 1.
        """
        samples = torch.cat([read(context, slots), audio], dim=1)
        update(context, slots, samples[:, -CONTEXT:])
        new_hidden, new_cell = self._lstm(
            self._features(samples), read(hidden, slots), read(cell, slots)
        )
        update(hidden, slots, new_hidden)
        update(cell, slots, new_cell)
        score: Tensor = self.final_conv(new_hidden.relu().unsqueeze(-1))
        return score.sigmoid().squeeze(-1)

    def _features(self, samples: Tensor) -> Tensor:
        """Samples ``[rows, 576]`` to ``[rows, 128]``.

        The magnitudes of four windows, then four convolutions that leave one frame.
        """
        spectrum: Tensor = self.stft_conv(samples.index_select(1, self.reflected).unsqueeze(1))
        real, imaginary = spectrum[:, :BINS], spectrum[:, BINS:]
        x: Tensor = (real * real + imaginary * imaginary).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolution(x).relu()
        return x.squeeze(-1)

    def _lstm(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """The formula of ``torch.nn.LSTMCell`` in plain operators: TensorRT has no such layer."""
        weights = self.lstm_cell
        gates = nn.functional.linear(x, weights.weight_ih, weights.bias_ih) + nn.functional.linear(
            hidden, weights.weight_hh, weights.bias_hh
        )
        input_gate, forget_gate, candidate, output_gate = gates.split(HIDDEN, dim=1)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell


def load_silero(path: Path | str | None = None) -> SileroVad:
    """Load the model with its weights.

    Args:
        path: a safetensors file with the names of `SileroVad`, or the package's TorchScript file
            (``.jit``). None is the TorchScript file of the installed package, which gives the
            package's results.

    Raises:
        BuildError: the file does not exist, cannot be read, or has other tensors than the model.
    """
    path = Path(path) if path is not None else packaged(TORCHSCRIPT)
    if not path.is_file():
        raise ib.BuildError(
            f"{path} does not exist; "
            f"give {TORCHSCRIPT} or {SAFETENSORS} of the PyPI package silero-vad"
        )
    try:
        weights = torchscript_weights(path) if path.suffix == ".jit" else load_file(path)
    except Exception as error:  # both readers raise many types for a damaged file
        raise ib.BuildError(
            f"the weights in {path} cannot be read ({type(error).__name__}); "
            f"give {TORCHSCRIPT} or {SAFETENSORS}"
        ) from error
    model = SileroVad()
    expected, shapes = _shapes(model.state_dict()), _shapes(weights)
    if different := sorted(
        name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)
    ):
        name = different[0]
        raise ib.BuildError(
            f"{path} is not Silero VAD's 16 kHz model: {name} is {shapes.get(name, 'absent')}, "
            f"expected {expected.get(name, 'no such tensor')} ({len(different)} tensors differ); "
            f"give {TORCHSCRIPT} or {SAFETENSORS} of silero-vad 6"
        )
    model.load_state_dict(weights)
    return model.eval()


def packaged(name: str) -> Path:
    """The path of a file of the installed package ``silero-vad``.

    The package is not imported, because that changes PyTorch's number of threads.

    Raises:
        BuildError: the package is not installed.
    """
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        raise ib.BuildError(
            "the package silero-vad is not installed; `pip install silero-vad`, "
            "or give the path of its weights"
        )
    return Path(spec.origin).parent / "data" / name


def torchscript_weights(path: Path) -> dict[str, Tensor]:
    """The 16 kHz weights of the package's TorchScript model, by the names of `SileroVad`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but the file is TorchScript
        module = torch.jit.load(path, map_location="cpu")
    return {renamed(name): tensor for name, tensor in module._model.state_dict().items()}


def renamed(name: str) -> str:
    """The name in `SileroVad` for a name of the TorchScript model; others are not changed."""
    for theirs, ours in TORCHSCRIPT_NAMES.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def capture_silero(model: SileroVad, *, max_rows: int = 64) -> ib.Capture:
    """Capture one step of at most ``max_rows`` streams: 512 samples each in, a probability out.

    Raises:
        BuildError: torch.export cannot capture it.
    """
    return ib.capture_module(
        model,
        inputs=[
            ib.TensorSpec(name="audio", role=ib.Role.ROW, dtype=ib.Dtype.FLOAT32, shape=(CHUNK,)),
            ib.control_input("slots", ib.Role.SLOTS),
        ],
        outputs=[
            ib.TensorSpec(
                name="probability", role=ib.Role.VALUE, dtype=ib.Dtype.FLOAT32, shape=(1,)
            )
        ],
        states=[
            ib.StateSpec(
                name=name, shape=(extent,), dtype=ib.Dtype.FLOAT32, update=ib.Update.REPLACE
            )
            for name, extent in (("context", CONTEXT), ("hidden", HIDDEN), ("cell", HIDDEN))
        ],
        max_rows=max_rows,
    )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in weights.items()}
