"""Voice activity in several streams at a time: Silero VAD, built, then fed 32 ms of audio a stream and step.

Usage: python examples/streaming_vad.py [16-kHz mono file.wav …]; without files, recordings of the package pytest-audioeval.
"""

import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import soundfile
import torch
from inplace.errors import InplaceError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace_builder.served.build import write_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from silero import CHUNK, CONTEXT, SAMPLE_RATE, capture_silero, load_silero

STREAMS, THRESHOLD = 3, 0.5
SECONDS = CHUNK / SAMPLE_RATE


def open_model(folder: Path) -> ModelInstance:
    """Build the model, verified, and load what was written, as the server's backend does."""
    write_engine(
        capture_silero(load_silero(), max_rows=STREAMS),
        folder,
        BuildOptions(slots=STREAMS, max_rows=STREAMS, capacity=1),
    )
    return ModelInstance.open(folder / MODEL_VERSION)


def listen(path: Path) -> torch.Tensor:
    """A recording twice, with a second of silence after each, as chunks ``[chunks, 512]``."""
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != SAMPLE_RATE or samples.ndim != 1:
        raise InplaceError(
            f"{path} has {rate} Hz and {samples.ndim} axes; give mono audio of {SAMPLE_RATE} Hz"
        )
    spoken = np.tile(np.pad(samples, (0, SAMPLE_RATE)), 2)
    return torch.from_numpy(np.pad(spoken, (0, -len(spoken) % CHUNK))).view(-1, CHUNK)


def main() -> None:
    """Stream them all at once and print who speaks when."""
    given = [Path(name) for name in sys.argv[1:]]
    recordings = (
        file
        for file in distribution("pytest-audioeval").files or ()
        if file.match("audio/*/*_*.wav")
    )
    files = sorted(given or [Path(str(file.locate())) for file in recordings])[:STREAMS]
    try:
        streams = dict(enumerate(map(listen, files), 1))
    except (InplaceError, soundfile.SoundFileError) as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(Path(folder) / "silero-vad")
        addresses, began, steps = (
            model.arena.addresses(),
            dict.fromkeys(streams, -1),
            max(map(len, streams.values())),
        )
        for index in range(steps + 1):
            live = {stream: audio[index] for stream, audio in streams.items() if index < len(audio)}
            works = [
                model.admit(Request(stream, index == 0, False, {"audio": chunk[None]}))
                for stream, chunk in live.items()
            ]
            if works:
                model.step(works)
            speaking = {
                stream: float(work.outputs["probability"]) >= THRESHOLD
                for stream, work in zip(live, works, strict=True)
            }
            for stream in streams:
                if speaking.get(stream, False) and began[stream] < 0:
                    began[stream] = index
                elif not speaking.get(stream, False) and began[stream] >= 0:
                    print(
                        f"{files[stream - 1].name}: speech from {began[stream] * SECONDS:.2f} to {index * SECONDS:.2f} s"
                    )
                    began[stream] = -1
            for work, chunk in zip(
                works, live.values(), strict=True
            ):  # the proof: the arena itself holds what the step just wrote
                assert torch.equal(
                    model.arena.tensors["context"][work.sequence.slot], chunk[-CONTEXT:]
                )
                model.finish(work)
        assert model.arena.addresses() == addresses
        print(
            f"\n{steps} steps, {len(streams)} streams: {len(addresses)} states stayed where they were; after each step the memory that"
        )
        print(
            "the engine was given at load held the new state, written there by the engine: nothing was handed out or copied back"
        )
        print(
            ", ".join(
                f"{alias.output} is {alias.input} ({alias.kind})" for alias in model.program.aliases
            )
        )


if __name__ == "__main__":
    main()
