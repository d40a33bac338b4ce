"""What `inplace transcribe` reads, and where it divides a recording."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from inplace.client.recordings import AudioFormat, cut, read_recording
from inplace.errors import InplaceError

RATE = 1000
WINDOWS = AudioFormat(RATE, samples=10 * RATE, is_stream=False)
STREAM = AudioFormat(RATE, samples=80, is_stream=True)


def test_windows_end_where_it_is_quiet() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 23 * RATE).astype(np.float32)
    pauses = (8000, 15500)
    for pause in pauses:
        samples[pause : pause + 300] = 0
    parts = cut(samples, WINDOWS, WINDOWS.samples)
    assert np.array_equal(np.concatenate(parts), samples)
    assert max(map(len, parts)) <= WINDOWS.samples
    ends = np.cumsum([len(part) for part in parts])[:-1]
    for end, pause in zip(ends, pauses, strict=True):
        assert pause <= end <= pause + 300


def test_a_stream_is_divided_evenly() -> None:
    parts = cut(np.zeros(200, np.float32), STREAM, STREAM.part_samples(None, realtime=True))
    assert [len(part) for part in parts] == [80, 80, 40]


def test_words_are_wanted_soon_in_realtime() -> None:
    assert WINDOWS.part_samples(None, realtime=False) == 10 * RATE
    assert WINDOWS.part_samples(None, realtime=True) == 5 * RATE
    assert WINDOWS.part_samples(30, realtime=True) == 10 * RATE  # a window is the most
    assert STREAM.part_samples(30, realtime=False) == 30 * RATE


def test_channels_are_averaged_and_another_rate_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    soundfile.write(path, np.array([[0.5, 0.25], [0.0, -0.5]]), RATE, subtype="FLOAT")
    assert read_recording(path, RATE).tolist() == [0.375, -0.25]
    with pytest.raises(InplaceError, match="1000 samples in a second, the model takes 16000"):
        read_recording(path, 16000)
    path.write_bytes(b"no sound")
    with pytest.raises(InplaceError, match="cannot be read as audio"):
        read_recording(path, RATE)
