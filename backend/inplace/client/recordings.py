"""Recordings as requests to a served speech model, and the words of its answers."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient

from inplace.client.requests import decode_text
from inplace.client.sync_client import Sequence
from inplace.errors import InplaceError
from inplace.protocol import AUDIO, CHUNK_SAMPLES, SAMPLE_RATE, TEXT_OUTPUT, WINDOW_SAMPLES

Samples = NDArray[np.float32]

PART_SECONDS = 5.0
"""Most seconds of a request, where words are wanted before a whole window is recorded."""

SEARCHED_SECONDS = 5.0
"""At the end of a window that is not the last: where a quiet place to cut is searched."""

QUIET_SECONDS = 0.2
"""Length of the quiet place."""


@dataclass(frozen=True)
class AudioFormat:
    """What a speech model takes, from its config.pbtxt.

    Attributes:
        rate: samples in a second.
        samples: those of a window, which a request has at most, or of a stream's chunk.
        is_stream: requests are parts of one stream; else each is a window of its own.
    """

    rate: int
    samples: int
    is_stream: bool

    def part_samples(self, seconds: float | None, *, realtime: bool) -> int:
        """Most samples of a request that `cut` makes.

        Args:
            seconds: as asked for; None for a whole window, or `PART_SECONDS` of it where words are
                wanted soon or the model takes a stream.
            realtime: whether audio is sent at its own pace; of a stream, a chunk at a time then.
        """
        if self.is_stream and realtime and seconds is None:
            return self.samples
        if seconds is None:
            seconds = PART_SECONDS if realtime or self.is_stream else self.samples / self.rate
        samples = max(1, round(seconds * self.rate))
        return samples if self.is_stream else min(samples, self.samples)

    @classmethod
    def of(cls, client: InferenceServerClient, model: str) -> "AudioFormat":
        """From a server.

        Raises:
            InplaceError: it is not a speech model.
            tritonclient.utils.InferenceServerException: the server does not serve it.
        """
        made = cls.of_config(client.get_model_config(model).config)
        if made is None:
            raise InplaceError(f"model {model} takes no audio: it was not built as a speech model")
        return made

    @classmethod
    def of_config(cls, config: Any) -> "AudioFormat | None":
        """From Triton's ModelConfig message; None where the model takes no audio."""
        parameters = config.parameters
        for name in (CHUNK_SAMPLES, WINDOW_SAMPLES):
            if name in parameters and SAMPLE_RATE in parameters:
                return cls(
                    int(parameters[SAMPLE_RATE].string_value),
                    int(parameters[name].string_value),
                    name == CHUNK_SAMPLES,
                )
        return None


def read_recording(path: Path, rate: int) -> Samples:
    """The samples of a file, one channel.

    Args:
        path: a WAV, FLAC, Ogg or MP3 file.
        rate: the rate that it must have.

    Raises:
        InplaceError: it cannot be read, or has another rate.
    """
    import soundfile

    try:
        samples, its_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InplaceError(f"{path} cannot be read as audio: {error}") from error
    if its_rate != rate:
        raise InplaceError(
            f"{path} has {its_rate} samples in a second, the model takes {rate}: resample it, for "
            f"example with `ffmpeg -i {path.name} -ar {rate} resampled.wav`"
        )
    if not len(samples):
        raise InplaceError(f"{path} has no audio")
    return np.ascontiguousarray(samples.mean(1))


def cut(samples: Samples, format: AudioFormat, longest: int) -> list[Samples]:
    """A recording as requests.

    Chunks of a stream are of equal length. Windows end in quiet places, where no word is cut.

    Args:
        samples: the recording.
        format: what the model takes.
        longest: most samples of a request.
    """
    parts = []
    while len(samples) > longest:
        end = longest if format.is_stream else _quiet_place(samples[:longest], format.rate)
        parts.append(samples[:end])
        samples = samples[end:]
    return [*parts, samples]


def _quiet_place(window: Samples, rate: int) -> int:
    """The middle of the quietest part near the end of a window."""
    size = max(1, min(round(QUIET_SECONDS * rate), len(window) // 2))
    begin = max(len(window) // 2, len(window) - round(SEARCHED_SECONDS * rate))
    energy = np.concatenate([[0.0], np.cumsum(np.square(window[begin:], dtype=np.float64))])
    sums = energy[size:] - energy[:-size]
    return begin + int(sums.argmin()) + size // 2


def words(
    sequence: Sequence,
    parts: list[Samples],
    rate: int,
    options: Mapping[str, str],
    *,
    realtime: bool,
) -> Iterator[str]:
    """Send the parts of a recording, and yield pieces of its text as they come.

    Args:
        sequence: of the served model.
        parts: from `cut`.
        rate: samples in a second.
        options: further request parameters, such as ``language``.
        realtime: send a part when its last sample would have been recorded.
    """
    began, sent = time.monotonic(), 0
    for place, part in enumerate(parts):
        sent += len(part)
        if realtime:
            time.sleep(max(0.0, began + sent / rate - time.monotonic()))
        parameters: dict[str, int | str] = {SAMPLE_RATE: rate, **options}
        end = place == len(parts) - 1
        for outputs in sequence.stream({AUDIO: part}, end=end, parameters=parameters):
            if piece := decode_text(outputs, TEXT_OUTPUT):
                yield piece
