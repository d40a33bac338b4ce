"""A tiny Whisper with random weights, as a folder of transformers, and what ``generate`` gives."""

import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from inplace_builder import BuildOptions, build_model
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from support.engines import Engines
from support.models import VOCABULARY
from support.vocabulary import tiny_tokenizer

RATE, SECONDS, MAX_TOKENS = 16000, 1, 24
KEPT = 64
"""Of the text tokens one in so many is not suppressed, so that the end token is often the best."""
LANGUAGES, TASKS = ("en", "de", "fr"), ("translate", "transcribe")
SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in LANGUAGES),
    *(f"<|{task}|>" for task in TASKS),
    "<|notimestamps|>",
)
IDS = {name: VOCABULARY + place for place, name in enumerate(SPECIAL)}
TIMES = [f"<|{place / 50:.2f}|>" for place in range(50 * SECONDS + 1)]

Samples = NDArray[np.float32]


def extractor() -> WhisperFeatureExtractor:
    """Of windows of one second."""
    return WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS)


def generation_config(*, multilingual: bool = True, **changes: object) -> GenerationConfig:
    """As the published models have it."""
    end, start = IDS["<|endoftext|>"], IDS["<|startoftranscript|>"]
    fields: dict[str, object] = {
        "max_length": MAX_TOKENS,
        "suppress_tokens": [
            *(token for token in range(VOCABULARY) if token % KEPT),
            *(token for token in IDS.values() if token != end),
        ],
        "begin_suppress_tokens": [KEPT, end],
        "no_timestamps_token_id": IDS["<|notimestamps|>"],
        "max_initial_timestamp_index": 20,
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "bos_token_id": end,
        "return_timestamps": False,
        "is_multilingual": multilingual,
    }
    if multilingual:
        fields["lang_to_id"] = {f"<|{name}|>": IDS[f"<|{name}|>"] for name in LANGUAGES}
        fields["task_to_id"] = {name: IDS[f"<|{name}|>"] for name in TASKS}
    return GenerationConfig(**fields | changes)


def tiny_whisper(
    *, multilingual: bool = True, **changes: object
) -> WhisperForConditionalGeneration:
    """A model whose tokens vary and whose windows end at different lengths."""
    torch.manual_seed(1)
    end = IDS["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=VOCABULARY + len(SPECIAL) + len(TIMES),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=50 * SECONDS,
        max_target_positions=MAX_TOKENS,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=IDS["<|startoftranscript|>"],
        init_std=0.3,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = generation_config(multilingual=multilingual, **changes)
    return model


@cache
def whisper_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with Whisper's special tokens; timestamps are none of them."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str())
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in TIMES])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


SOURCE = "whisper-source"
"""The name in `support.engines.Engines` of what `save_whisper` writes."""


def save_whisper(folder: Path) -> None:
    """Write the folder of `tiny_whisper`."""
    tiny_whisper().save_pretrained(folder)
    extractor().save_pretrained(folder)
    whisper_tokenizer().save_pretrained(folder)


def whisper_engine(engines: Engines) -> Path:
    """A stream model of `tiny_whisper` with four slots."""
    source = engines.get(SOURCE, save_whisper)
    options = BuildOptions(slots=4, max_rows=4, serve="stream")
    path = engines.get(
        "whisper-engine", lambda folder: build_model(source, folder / "whisper", options)
    )
    return path / "whisper"


def audio(number: int, seconds: float = SECONDS) -> Samples:
    """A sound, different for each number."""
    generator = np.random.default_rng(number)
    time = np.arange(round(seconds * RATE)) / RATE
    tones = generator.uniform(100, 3000, (4, 1))
    envelopes = generator.uniform(0, 1, (4, 1)) * np.sin(generator.uniform(1, 9, (4, 1)) * time)
    noise = 0.02 * generator.standard_normal(len(time))
    sound = (envelopes * np.sin(2 * np.pi * tones * time)).sum(0) / 4 + noise
    return np.asarray(sound, dtype=np.float32)


def generated(
    model: WhisperForConditionalGeneration, samples: Samples, options: Mapping[str, object] = {}
) -> list[int]:
    """The tokens of a window by transformers' ``generate``, without its prompt and end."""
    features = extractor()(samples, sampling_rate=RATE, return_tensors="pt").input_features
    arguments = dict(options)
    if "timestamps" in arguments:
        arguments["return_timestamps"] = arguments.pop("timestamps")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.generate(features, force_unique_generate_call=True, **arguments)
    tokens: list[int] = result[0].tolist()
    special = set(IDS.values())
    return [token for token in tokens if token not in special]
