"""transformers' ``nemotron_asr_streaming`` with random weights, and what its own search gives."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import NemotronAsrStreamingConfig, NemotronAsrStreamingForRNNT
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.models.nemotron_asr_streaming.feature_extraction_nemotron_asr_streaming import (
    NemotronAsrStreamingFeatureExtractor,
)

BLANK, BINS, FACTOR = 32, 16, 8
SAMPLE_RATE, HOP = 16000, 160
LEAD = FACTOR * HOP - 200
"""Zeros in front of a stream, so that its first chunk is as long as others."""


Tokens = list[tuple[int, int]]
"""Tokens, each with its frame."""


def tiny_nemotron(layers: int = 1, left: int = 16) -> NemotronAsrStreamingForRNNT:
    """A small model that emits tokens and blanks, whose attention looks back ``left`` frames."""
    torch.manual_seed(0)
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "subsampling_conv_channels": 8,
        "num_mel_bins": BINS,
        "sliding_window": left + 1,
        "default_num_lookahead_tokens": 1,
        "initializer_range": 0.3,
    }
    config = NemotronAsrStreamingConfig(
        vocab_size=BLANK + 1,
        blank_token_id=BLANK,
        decoder_hidden_size=32,
        max_symbols_per_step=4,
        encoder_config=encoder,
    )
    model = NemotronAsrStreamingForRNNT(config).eval()
    model.generation_config.decoder_start_token_id = BLANK
    model.generation_config.pad_token_id = 0
    with torch.no_grad():  # frames of noise that differ, and blanks among the tokens
        frames = model.get_audio_features(
            input_features=log_mel(speech(0, 48000)), num_lookahead_tokens=1
        ).pooler_output[0]
        deviation, mean = torch.std_mean(frames, 0)
        model.encoder_projector.weight.div_(deviation[:, None])
        model.encoder_projector.bias.sub_(mean).div_(deviation)
        model.decoder.decoder_projector.weight.mul_(4.0)
        model.joint.head.bias[BLANK] += 1.5
    return model


def features(stream: int, count: int) -> Tensor:
    """So many log-mel frames, different for each stream, ``[1, count, BINS]``."""
    return torch.randn(1, count, BINS, generator=torch.Generator().manual_seed(stream))


def first_length(lookahead: int) -> int:
    """Log-mel frames of a stream's first chunk."""
    return 1 + FACTOR * lookahead


def streamed(model: NemotronAsrStreamingForRNNT, mel: Tensor, lookahead: int) -> Tokens:
    """The tokens of transformers' streaming ``generate``; whole chunks only."""

    def chunks() -> Iterator[Tensor]:
        first, length = first_length(lookahead), FACTOR * (lookahead + 1)
        yield mel[:, :first]
        for begin in range(first, mel.shape[1], length):
            yield mel[:, begin : begin + length]

    return _generated(model, input_features=chunks(), num_lookahead_tokens=lookahead)


def offline(model: NemotronAsrStreamingForRNNT, mel: Tensor, lookahead: int) -> Tokens:
    """The tokens of transformers' ``generate`` without chunks; any length."""
    mask = torch.ones(1, mel.shape[1], dtype=torch.bool)
    return _generated(
        model, input_features=mel, attention_mask=mask, num_lookahead_tokens=lookahead
    )


def _generated(model: NemotronAsrStreamingForRNNT, **arguments: object) -> Tokens:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.generate(max_new_tokens=10**6, **arguments)
    tokens, durations = result.sequences[0], result.durations[0]
    frames = durations.cumsum(0) - durations
    pairs = zip(tokens[1:].tolist(), frames[1:].tolist(), strict=True)  # the first is the start
    return [(token, frame) for token, frame in pairs if token != BLANK]


class Extractor(NemotronAsrStreamingFeatureExtractor):  # type: ignore[misc]
    """transformers' feature extractor; its own constructor needs librosa, for these filters."""

    def __init__(self) -> None:
        SequenceFeatureExtractor.__init__(
            self, feature_size=BINS, sampling_rate=SAMPLE_RATE, padding_value=0.0
        )
        self.hop_length, self.win_length, self.n_fft, self.preemphasis = HOP, 400, 512, 0.97
        filters = mel_filter_bank(
            257, BINS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.mel_filters = torch.from_numpy(filters.T).float()


def log_mel(audio: Tensor) -> Tensor:
    """The valid features of transformers' extractor, ``[1, count, BINS]``."""
    result = Extractor()(audio.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    features: Tensor = result.input_features[:, : int(result.attention_mask.sum())]
    return features


def speech(stream: int, count: int) -> Tensor:
    """So many samples, different for each stream: noise whose level and pitch change."""
    generator = torch.Generator().manual_seed(stream)
    rate = count // 400 + 2
    level = torch.rand(1, 1, rate, generator=generator)
    level = torch.nn.functional.interpolate(level, count, mode="linear")[0, 0]
    noise = torch.randn(count + 1, generator=generator)
    return 0.3 * level**2 * (noise[1:] + level * noise[:-1])


def feed_audio(audio: Tensor, lookahead: int) -> Iterator[tuple[Tensor, int]]:
    """What a client sends of a stream: chunks ``[1, samples]`` and their valid lengths."""
    length = HOP * FACTOR * (lookahead + 1)
    whole = torch.cat([torch.zeros(LEAD), audio, torch.full((length,), 0.5)])
    total = LEAD + len(audio)
    for begin in range(0, total, length):
        yield whole[None, begin : begin + length], min(length, total - begin)


def feed(mel: Tensor, lookahead: int) -> Iterator[tuple[Tensor, int]]:
    """What a client sends of a stream: chunks ``[1, features, BINS]`` and their valid lengths.

    Whatever is in front of the stream and behind its end is NaN.
    """
    length = FACTOR * (lookahead + 1)
    ends = [torch.full((1, extent, BINS), float("nan")) for extent in (FACTOR - 1, length)]
    whole = torch.cat([ends[0], mel, ends[1]], 1)
    total = FACTOR - 1 + mel.shape[1]
    for begin in range(0, total, length):
        yield whole[:, begin : begin + length], min(length, total - begin)
