"""Voice activity in several streams at once: Silero VAD, fed 32 ms of audio a stream and step.

Usage: python examples/streaming_vad.py [16-kHz mono file.wav …]; without files it uses recordings
of the package pytest-audioeval.
"""

import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import inplace
import inplace_builder as ib
import numpy as np
import soundfile
import torch
from silero import CHUNK, CONTEXT, SAMPLE_RATE, capture_silero, load_silero

STREAMS, THRESHOLD = 3, 0.5
SECONDS = CHUNK / SAMPLE_RATE


def open_model(folder: Path) -> inplace.ModelInstance:
    """Build the model, and load it from its files as the server's backend does."""
    ib.write_engine(
        capture_silero(load_silero(), max_rows=STREAMS),
        folder,
        ib.BuildOptions(slots=STREAMS, max_rows=STREAMS, capacity=1),
    )
    return inplace.ModelInstance.open(folder / "1")


def recordings() -> list[Path]:
    """Files of the command line, or of the package pytest-audioeval; at most `STREAMS`."""
    given = [Path(name) for name in sys.argv[1:]]
    packaged = [
        Path(str(file.locate()))
        for file in distribution("pytest-audioeval").files or ()
        if file.match("audio/*/*_*.wav")
    ]
    return sorted(given or packaged)[:STREAMS]


def load_chunks(path: Path) -> torch.Tensor:
    """A recording twice, with a second of silence after each, as chunks ``[chunks, 512]``."""
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLE_RATE or samples.ndim != 1:
        raise inplace.InplaceError(
            f"{path} has {rate} Hz and {samples.ndim} axes; give mono audio of {SAMPLE_RATE} Hz"
        )
    padded = np.tile(np.pad(samples, (0, SAMPLE_RATE)), 2)
    return torch.from_numpy(np.pad(padded, (0, -len(padded) % CHUNK))).view(-1, CHUNK)


def step(
    model: inplace.ModelInstance, index: int, chunks: dict[int, torch.Tensor]
) -> dict[int, bool]:
    """Feed one chunk of each stream in one step; whether each has speech."""
    requests = [
        model.admit(inplace.Request(stream, index == 0, False, {"audio": chunk[None]}))
        for stream, chunk in chunks.items()
    ]
    if requests:
        model.step(requests)
    for request, chunk in zip(requests, chunks.values(), strict=True):
        # the arena itself has the state that the step wrote
        context = model.arena.tensors["context"][request.sequence.slot]
        assert torch.equal(context, chunk[-CONTEXT:])
        model.finish(request)
    return {
        stream: float(request.outputs["probability"]) >= THRESHOLD
        for stream, request in zip(chunks, requests, strict=True)
    }


def main() -> None:
    """Stream all recordings at once and print when there is speech."""
    files = recordings()
    try:
        streams = dict(enumerate(map(load_chunks, files), 1))
    except (inplace.InplaceError, soundfile.SoundFileError) as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(Path(folder) / "silero-vad")
        addresses = model.arena.addresses()
        began: dict[int, int] = {}  # of streams with speech: the step when it began
        steps = max(map(len, streams.values()))
        for index in range(steps + 1):
            chunks = {
                stream: audio[index] for stream, audio in streams.items() if index < len(audio)
            }
            speech = step(model, index, chunks)
            for stream in streams:
                if speech.get(stream, False):
                    began.setdefault(stream, index)
                elif stream in began:
                    start, end = began.pop(stream) * SECONDS, index * SECONDS
                    print(f"{files[stream - 1].name}: speech from {start:.2f} to {end:.2f} s")
        assert model.arena.addresses() == addresses
    print(
        f"\n{steps} steps, {len(streams)} streams: {len(addresses)} states stayed where they were; "
        "after each step\ntheir memory had the new state, written there by the engine: nothing was "
        "copied\n"
        + ", ".join(
            f"{alias.output} is {alias.input} ({alias.kind})" for alias in model.program.aliases
        )
    )


if __name__ == "__main__":
    main()
