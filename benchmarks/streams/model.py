"""The published size of ``nemotron_asr_streaming`` with random weights, and its engines."""

from pathlib import Path
from typing import Any

import torch
from inplace.schema.specs import Dtype
from inplace_builder.capture.nemotron_asr_streaming import (
    ChunkSizes,
    Encoded,
    Extraction,
    NemotronDecode,
    NemotronEncode,
    capture_nemotron_asr_streaming,
)
from inplace_builder.choices import Device, EngineKind
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from torch import Tensor
from transformers import NemotronAsrStreamingConfig, NemotronAsrStreamingForRNNT

from benchmarks.phases import Phases
from benchmarks.streams import TOKENS_PER_FRAME

CALIBRATION_FRAMES, CALIBRATION_LOOKAHEAD = 56, 13
"""Encoded frames that the bias of the blank is found with, in chunks of as many as there are."""


def random_nemotron(layers: int | None, dtype: torch.dtype) -> NemotronAsrStreamingForRNNT:
    """A model of the published size, which is the configuration's default.

    The bias of the blank is such that about as many tokens come as in speech: without it, random
    weights emit the largest number of tokens at every frame.

    Args:
        layers: of the encoder; None for the published number.
        dtype: of the weights.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    config = NemotronAsrStreamingConfig(encoder_config=options)
    model = NemotronAsrStreamingForRNNT(config).eval().to(dtype)
    model.generation_config.decoder_start_token_id = config.blank_token_id
    with torch.no_grad():
        _set_blank(model)
    return model


def _set_blank(model: NemotronAsrStreamingForRNNT) -> None:
    """Find the bias of the blank with which noise gives `TOKENS_PER_FRAME`."""
    chunks = ChunkSizes(CALIBRATION_LOOKAHEAD, model.config.encoder_config.subsampling_factor)
    encoded = Encoded(
        chunks.frames, model.config.decoder_hidden_size, model.encoder_projector.weight.dtype
    )
    encode = NemotronEncode(model, chunks, Extraction(), encoded)
    samples = encode.log_mel.samples
    parts = []
    for _ in range(CALIBRATION_FRAMES // chunks.frames):
        encode(0.1 * torch.randn(1, samples), torch.tensor([samples]))
        parts.append(encoded.frames.clone())
    bias = model.joint.head.bias[model.config.blank_token_id]
    low, high = 0.0, 8.0
    while high - low > 0.05:
        bias.fill_((low + high) / 2)
        if _tokens_per_frame(model, encoded, parts) > TOKENS_PER_FRAME:
            low = float(bias)
        else:
            high = float(bias)


def _tokens_per_frame(
    model: NemotronAsrStreamingForRNNT, encoded: Encoded, parts: list[Tensor]
) -> float:
    decode, tokens = NemotronDecode(model, encoded), 0
    for frames in parts:
        encoded.frames.copy_(frames)
        encoded.num_frames.fill_(frames.shape[1])
        encoded.frame.zero_()
        done = False
        while not done:
            token, _, last = decode()
            tokens, done = tokens + int(token >= 0), bool(last)
    return tokens / (len(parts) * parts[0].shape[1])


def build(
    folder: Path,
    lookahead: int,
    *,
    streams: int,
    rows: int,
    engine: EngineKind,
    device: Device,
    layers: int | None,
) -> dict[str, float]:
    """Build the engine into ``folder``; the seconds of each phase."""
    phases = Phases()
    phases("make a random model")
    dtype = Dtype.BFLOAT16 if device == "cuda" else Dtype.FLOAT32
    model = random_nemotron(layers, dtype.as_torch)
    options = BuildOptions(
        dtype=dtype, device=device, slots=streams, max_rows=min(rows, streams), engine=engine
    )
    phases("capture the programs")
    capture = capture_nemotron_asr_streaming(model, lookahead, options.max_rows)
    write_engine(capture, folder, options, phases)
    phases("done")
    return phases.seconds
