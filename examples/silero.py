"""Silero VAD: is somebody speaking? Rebuilt from its weights as a module whose states are not keys and values.

A stream sends 32 ms of audio a request. Between requests it keeps the last samples, which the first window of the next chunk
overlaps, and the two vectors of an LSTM cell. The layers and their names are those of ``silero_vad/tinygrad_model.py`` in the PyPI
package ``silero-vad`` (MIT).

The package has two sets of weights for one architecture, and they do not say the same: ``silero_vad.jit``, which its own
`load_silero_vad` runs, and ``silero_vad_16k.safetensors`` (https://github.com/snakers4/silero-vad/issues/768). Either can be loaded.
"""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from inplace.operators import read, update
from inplace.schema.dtypes import Dtype
from inplace.schema.specs import Role, StateSpec, TensorSpec, Update
from inplace_builder.capture.capture import Capture, capture_module, control_input
from inplace_builder.errors import BuildError, brief
from safetensors.torch import load_file
from torch import Tensor, nn

SAMPLE_RATE = 16_000
"""Samples a second. The package's model for 8 kHz, other weights again, is not built."""


CHUNK = 512
"""Samples of one request: 32 ms."""


CONTEXT = 64
"""Samples of the chunk before that a chunk begins with, and reflected samples it ends with."""


HIDDEN = 128
"""Extent of the LSTM cell's two vectors."""


WINDOW, HOP, BINS = 256, 128, 129
"""The short-time Fourier transform: samples of a window, samples between two, frequencies."""


OWN, SAFETENSORS = "silero_vad.jit", "silero_vad_16k.safetensors"
"""The package's files: the model it runs itself, and the other weights."""


TORCHSCRIPT_NAMES = {
    "stft.forward_basis_buffer": "stft_conv.weight",
    **{f"encoder.{block}.reparam_conv": f"conv{block + 1}" for block in range(4)},
    "decoder.rnn": "lstm_cell",
    "decoder.decoder.2": "final_conv",
}
"""What the TorchScript model calls its layers, and the name of each here."""


class SileroVad(nn.Module):
    """One step of the 16 kHz model for some rows of its states."""

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
        # the reflection at the end as one gather, which every engine has: … n-3, n-2, n-1, n-2, n-3 …
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
            context: state ``[slots, 64]``, the last samples of the chunk before.
            hidden: state ``[slots, 128]``, what the LSTM cell said.
            cell: state ``[slots, 128]``, what it keeps.

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
        """Samples ``[rows, 576]`` to ``[rows, 128]``: magnitudes of four windows, then four convolutions that leave one frame."""
        spectrum: Tensor = self.stft_conv(samples.index_select(1, self.reflected).unsqueeze(1))
        real, imaginary = spectrum[:, :BINS], spectrum[:, BINS:]
        x: Tensor = (real * real + imaginary * imaginary).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolution(x).relu()
        return x.squeeze(-1)

    def _lstm(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """`torch.nn.LSTMCell`'s formula in plain operators: TensorRT has no such layer."""
        weights = self.lstm_cell
        gates = nn.functional.linear(x, weights.weight_ih, weights.bias_ih) + nn.functional.linear(
            hidden, weights.weight_hh, weights.bias_hh
        )
        entered, forgotten, candidate, shown = gates.split(HIDDEN, dim=1)
        cell = forgotten.sigmoid() * cell + entered.sigmoid() * candidate.tanh()
        return shown.sigmoid() * cell.tanh(), cell


def load_silero(path: Path | None = None) -> SileroVad:
    """The model with its weights.

    Args:
        path: a safetensors file with the names of `SileroVad`, or the package's TorchScript file (``.jit``); None is the latter as the
            installed package has it, so that the model says what the package says.

    Raises:
        BuildError: the file is not there, cannot be read, or holds other tensors than the model has.
    """
    path = path if path is not None else packaged(OWN)
    if not path.is_file():
        raise BuildError(
            f"{path} does not exist; give {OWN} or {SAFETENSORS} of the PyPI package silero-vad"
        )
    try:
        weights = torchscript_weights(path) if path.suffix == ".jit" else load_file(path)
    except (
        Exception
    ) as error:  # both readers have errors of their own for each way a file can be damaged
        raise BuildError(
            f"the weights in {path} cannot be read: {brief(error)}; give {OWN} or {SAFETENSORS}"
        ) from error
    model = SileroVad()
    wanted, found = _shapes(model.state_dict()), _shapes(weights)
    if different := sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    ):
        name = different[0]
        raise BuildError(
            f"{path} is not Silero VAD's 16 kHz model: {name} is {found.get(name, 'absent')}, expected {wanted.get(name, 'no such one')} "
            f"({len(different)} tensors differ); take {OWN} or {SAFETENSORS} of silero-vad 6"
        )
    model.load_state_dict(weights)
    return model.eval()


def packaged(name: str) -> Path:
    """A file of the installed package ``silero-vad``, which is not imported: that would change PyTorch's number of threads.

    Raises:
        BuildError: the package is not installed.
    """
    spec = importlib.util.find_spec("silero_vad")
    if spec is None or spec.origin is None:
        raise BuildError(
            "the package silero-vad is not installed; `pip install silero-vad`, or give the path of its weights"
        )
    return Path(spec.origin).parent / "data" / name


def torchscript_weights(path: Path) -> dict[str, Tensor]:
    """The 16 kHz weights of the package's TorchScript model, by the names of `SileroVad`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; the file is what it is
        module = torch.jit.load(path, map_location="cpu")
    return {renamed(name): tensor for name, tensor in module._model.state_dict().items()}


def renamed(name: str) -> str:
    """A name of the TorchScript model as `SileroVad` has it; one that it lacks stays."""
    for theirs, ours in TORCHSCRIPT_NAMES.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def capture_silero(model: SileroVad, *, max_rows: int = 64) -> Capture:
    """Capture one step of at most ``max_rows`` streams: 512 samples each to the probability of speech.

    Raises:
        BuildError: torch.export cannot capture it.
    """
    return capture_module(
        model,
        inputs=[
            TensorSpec(name="audio", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(CHUNK,)),
            control_input("slots", Role.SLOTS),
        ],
        outputs=[TensorSpec(name="probability", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(1,))],
        states=[
            StateSpec(name=name, shape=(extent,), dtype=Dtype.FLOAT32, update=Update.REPLACE)
            for name, extent in (("context", CONTEXT), ("hidden", HIDDEN), ("cell", HIDDEN))
        ],
        max_rows=max_rows,
    )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{list(tensor.shape)} {tensor.dtype}" for name, tensor in weights.items()}
