"""Recorded speech, and the results of the PyPI package silero-vad for it."""

import importlib.util
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from silero import CHUNK, SAMPLE_RATE, TORCHSCRIPT, load_silero, packaged, renamed
from torch import Tensor

Samples = NDArray[np.float32]


@cache
def recordings() -> dict[str, Samples]:
    """27 recordings in nine languages, 1 to 5 s at 16 kHz, from the package pytest-audioeval."""
    spec = importlib.util.find_spec("pytest_audioeval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(next(iter(spec.submodule_search_locations))) / "samples" / "audio"
    result = {}
    for path in sorted(folder.glob("*/*.wav")):
        samples, rate = soundfile.read(path, dtype="float32")
        assert rate == SAMPLE_RATE
        result[f"{path.parent.name}/{path.stem}"] = samples
    return result


def chunks(samples: Samples) -> list[Samples]:
    """The recording as requests of 512 samples; the last one is filled up with silence."""
    padded = np.pad(samples, (0, -len(samples) % CHUNK))
    return list(padded.reshape(-1, CHUNK))


@cache
def package_model(weights: str) -> torch.jit.ScriptModule:
    """The package's TorchScript model; ``weights`` other than its own are copied into it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; it is what the package ships
        from silero_vad import load_silero_vad

        model: torch.jit.ScriptModule = load_silero_vad()
    if weights != TORCHSCRIPT:
        other = load_silero(packaged(weights)).state_dict()
        with torch.no_grad():
            for name, tensor in model._model.state_dict().items():
                tensor.copy_(other[renamed(name)])
    return model


@cache
def package_says(recording: str, weights: str = TORCHSCRIPT) -> Tensor:
    """The package's own probabilities over a whole recording, ``[chunks]``."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        result = package_model(weights).audio_forward(
            torch.from_numpy(recordings()[recording])[None], SAMPLE_RATE
        )
    assert isinstance(result, Tensor)
    return result[0]
