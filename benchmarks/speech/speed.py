"""Whisper's speed beside transformers: so many windows of 30 s at once, from audio to tokens.

    python -m benchmarks.speech.speed [--sizes base] [--streams 1,16,64]

Weights are random in the published sizes, and every window has the same number of tokens: the end
token is suppressed, and the length limited, for both. The real-time factor is the time from the
audio of all windows to the last token, divided by the length of all audio. The engine is called as
the server calls it; transformers makes features and generates for all windows in one batch, on the
same device and in the same type. Writes one JSON, after each line that is measured.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inplace.protocol import AUDIO, SAMPLE_RATE
from inplace.runtime.requests import Request
from inplace.runtime.schedules import ScheduledInstance
from inplace.schema.specs import Dtype
from inplace_builder.served.choose import build_with_best_engine, first_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from numpy.typing import NDArray
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from benchmarks.phases import Phases
from benchmarks.record import facts

RATE, WINDOW = 16000, 30
START, NO_TIMESTAMPS, END = 50257, 50362, 50256
"""Tokens of the English vocabulary."""


@dataclass(frozen=True)
class Size:
    """A published size: width, layers of encoder and decoder, heads, for English alone."""

    width: int
    layers: int
    heads: int


SIZES = {
    "tiny": Size(384, 4, 6),
    "base": Size(512, 6, 8),
    "small": Size(768, 12, 12),
}

Line = dict[str, Any]
Transcribe = Callable[[list[NDArray[np.float32]]], list[list[int]]]


def random_whisper(size: Size, tokens: int) -> WhisperForConditionalGeneration:
    """A random model that answers each window with so many tokens."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51864,
        d_model=size.width,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * size.width,
        decoder_ffn_dim=4 * size.width,
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
        init_std=0.1,  # with 0.02 the answer is one token over and over
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        max_length=tokens,
        suppress_tokens=[END, *range(START, config.vocab_size)],
        no_timestamps_token_id=NO_TIMESTAMPS,
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        bos_token_id=END,
        return_timestamps=False,
        is_multilingual=False,
    )
    return model


def windows(count: int) -> list[NDArray[np.float32]]:
    """So many windows of sound, each different."""
    seconds = np.arange(WINDOW * RATE) / RATE
    result = []
    for number in range(count):
        generator = np.random.default_rng(number)
        pitches = generator.uniform(100, 3000, (4, 1))
        changes = np.sin(generator.uniform(1, 9, (4, 1)) * seconds)
        sound = (changes * np.sin(2 * np.pi * pitches * seconds)).sum(0) / 8
        noise = 0.02 * generator.standard_normal(len(seconds))
        result.append((sound + noise).astype(np.float32))
    return result


class Engine:
    """The windows through an engine, without a server.

    Args:
        folder: its version folder.

    Attributes:
        calls: of each program so far.
    """

    def __init__(self, folder: Path) -> None:
        self.instance = ScheduledInstance.open(folder, idle_timeout=float("inf"))
        self.calls: Counter[str] = Counter()

    def __call__(self, given: list[NDArray[np.float32]]) -> list[list[int]]:
        """The tokens of each window."""
        with self.instance.engine.on_stream():
            active = [
                self.instance.admit(
                    Request(
                        number + 1,
                        start=True,
                        end=True,
                        inputs={AUDIO: torch.from_numpy(samples)[None]},
                        parameters={SAMPLE_RATE: RATE},
                    )
                )
                for number, samples in enumerate(given)
            ]
            waiting = list(active)
            while waiting:
                rows = self.instance.next_rows(waiting)
                assert rows[0].progress is not None
                self.calls[rows[0].progress.next_call.program] += 1
                self.instance.step(rows)
                called = set(rows)
                waiting = [each for each in waiting if each not in called] + [
                    each for each in rows if not each.finished
                ]
            for each in active:
                if each.error is not None:
                    raise each.error
            answers = [each.outputs["tokens"][0].tolist() for each in active]
            for each in active:
                self.instance.finish(each)
        return answers


def stock(folder: Path, device: str, dtype: torch.dtype) -> Transcribe:
    """Transformers' features and ``generate``, all windows in one batch."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)

    def transcribe(given: list[NDArray[np.float32]]) -> list[list[int]]:
        features = extractor(given, sampling_rate=RATE, return_tensors="pt", device=device)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens = model.generate(
                features.input_features.to(device, dtype), force_unique_generate_call=True
            )
        return [[token for token in row if token < END] for row in tokens.tolist()]

    return transcribe


def timed(
    transcribe: Transcribe, given: list[NDArray[np.float32]], repeats: int
) -> tuple[float, list[list[int]]]:
    """The median of the seconds, after one that does not count; and the tokens."""
    tokens, seconds = transcribe(given), []
    for _ in range(repeats):
        begin = time.perf_counter()
        tokens = transcribe(given)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), tokens


def beside(engine: Engine, theirs: Transcribe, streams: int, repeats: int) -> Line:
    """Both with so many windows at once."""
    given, before = windows(streams), Counter(engine.calls)
    own_seconds, own = timed(engine, given, repeats)
    calls = engine.calls - before
    their_seconds, expected = timed(theirs, given, repeats)
    pairs = [
        one == other
        for row, reference in zip(own, expected, strict=True)
        for one, other in zip(row, reference, strict=False)
    ]
    audio = streams * WINDOW
    return {
        "streams": streams,
        "seconds": own_seconds,
        "transformers_seconds": their_seconds,
        "real_time_factor": own_seconds / audio,
        "transformers_real_time_factor": their_seconds / audio,
        "times_as_fast": their_seconds / own_seconds,
        "calls_of_a_run": {name: count / (repeats + 1) for name, count in calls.items()},
        "tokens_of_a_window": statistics.mean(map(len, own)),
        "transformers_tokens_of_a_window": statistics.mean(map(len, expected)),
        "equal_tokens_percent": 100 * sum(pairs) / max(1, len(pairs)),
    }


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="base", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--tokens", type=int, default=96, help="of a window")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--engine", choices=("auto", "torch"), default="auto")
    parser.add_argument("--engines", type=Path, help="keep engines here, and take what is kept")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for all of it")
    parser.add_argument("--out", type=Path, default=Path("build/gpu/gpu_whisper.json"))
    given = parser.parse_args()
    begin = time.monotonic()
    document = facts(__doc__.partition("\n")[0], "python -m benchmarks.speech.speed") | {
        "tokens": given.tokens,
        "lines": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)

    def save(line: Line) -> None:
        print(json.dumps(line), flush=True)
        document["lines"].append(line)
        given.out.write_text(json.dumps(document, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as scratch:
        for name in given.sizes.split(","):
            _measure(name, given, given.engines or Path(scratch), begin + given.limit, save)
    print(f"written to {given.out}")


def _measure(
    name: str,
    given: argparse.Namespace,
    engines: Path,
    until: float,
    save: Callable[[Line], None],
) -> None:
    """All lines of one size."""
    counts = [int(count) for count in given.streams.split(",")]
    source, output = engines / f"source-{name}", engines / f"whisper-{name}"
    dtype = Dtype.BFLOAT16 if given.device == "cuda" else Dtype.FLOAT32
    about: Line = {"size": name, "dtype": dtype.value}
    if not (output / MODEL_VERSION).is_dir():
        phases = Phases()
        phases("make a random model")
        random_whisper(SIZES[name], given.tokens).to(dtype.as_torch).save_pretrained(source)
        WhisperFeatureExtractor().save_pretrained(source)
        options = BuildOptions(
            dtype=dtype,
            device=given.device,
            slots=max(counts),
            max_rows=max(counts),
            engine="torch" if given.engine == "torch" else first_engine(given.device),
        )
        manifest = build_with_best_engine(source, output, options, phases, phases)
        phases("done")
        notes = {key: note for key, note in manifest.built_with.items() if "verified" in key}
        save(about | {"build_seconds": phases.seconds, **notes})
    if given.build_only:
        return
    engine = Engine(output / MODEL_VERSION)
    about["engine"] = engine.instance.manifest.programs[0].engine.kind
    theirs = stock(source, given.device, dtype.as_torch)
    for count in counts:
        if time.monotonic() > until:
            break
        save(about | beside(engine, theirs, count, given.repeats))


if __name__ == "__main__":
    main()
