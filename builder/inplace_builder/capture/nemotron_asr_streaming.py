"""Streaming speech recognition: transformers' ``nemotron_asr_streaming`` as two programs.

``encode`` encodes a chunk of log-mel frames with the cache-aware FastConformer. ``decode`` is one
iteration of greedy search with predictor and joint (RNN-T); it is called until the encoded frames
are used up. The modules are transformers' own, with states where it has caches.
"""

import json
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inplace.protocol import AUDIO
from inplace.schema.schedule import Call
from inplace.schema.specs import Role
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.audio_utils import mel_filter_bank
from transformers.models.nemotron_asr_streaming.feature_extraction_nemotron_asr_streaming import (
    LOG_ZERO_GUARD_VALUE,
)
from transformers.models.nemotron_asr_streaming.processing_nemotron_asr_streaming import (
    DEFAULT_NUM_LOOKAHEAD_TOKENS,
)

from inplace_builder.capture.exported_rows import RowOptions
from inplace_builder.capture.fourier import fourier_matrix, power
from inplace_builder.capture.programs import ProgramsCapture, capture_programs
from inplace_builder.errors import BuildError

MODEL_TYPE = "nemotron_asr_streaming"
"""The ``model_type`` of its configurations."""


@dataclass(frozen=True)
class Extraction:
    """How transformers' feature extractor computes log-mel frames from audio.

    Attributes:
        sample_rate: samples in a second.
        hop: samples from one frame to the next.
        window: samples of a frame's window, whose middle is the frame's place.
        size: samples of the Fourier transform; the window is in their middle.
        preemphasis: which part of the sample before is subtracted from a sample; None for nothing.
    """

    sample_rate: int = 16000
    hop: int = 160
    window: int = 400
    size: int = 512
    preemphasis: float | None = 0.97


_EXTRACTION_FIELDS = {
    "sample_rate": "sampling_rate",
    "hop": "hop_length",
    "window": "win_length",
    "size": "n_fft",
    "preemphasis": "preemphasis",
}
"""What transformers' feature extractor calls them."""


@dataclass(frozen=True)
class ProcessorConfig:
    """What a model's folder says of its processor; without a file, what transformers' has.

    Attributes:
        lookaheads: those that the model was trained with.
        lookahead: the default.
        extraction: of features.
    """

    lookaheads: tuple[int, ...]
    lookahead: int
    extraction: Extraction

    @classmethod
    def read(cls, folder: Path, config: PretrainedConfig) -> "ProcessorConfig":
        """Read it.

        Raises:
            BuildError: a file cannot be read, or does not fit to the model.
        """
        fields = _read_json(folder / "processor_config.json")
        features = fields.get("feature_extractor")
        if not isinstance(features, dict):
            features = _read_json(folder / "preprocessor_config.json")
        extraction = Extraction(
            **{name: features[key] for name, key in _EXTRACTION_FIELDS.items() if key in features}
        )
        encoder = config.encoder_config
        if extraction.window % 2 or extraction.size % 2 or extraction.window > extraction.size:
            raise BuildError(
                f"the feature extractor in {folder} has a window of {extraction.window} samples "
                f"and a transform of {extraction.size}; expected even numbers and a window that "
                f"fits into the transform"
            )
        bins = features.get("feature_size", encoder.num_mel_bins)
        if bins != encoder.num_mel_bins:
            raise BuildError(
                f"the feature extractor in {folder} makes {bins} bins, the encoder takes "
                f"{encoder.num_mel_bins}"
            )
        lookaheads = fields.get("supported_num_lookahead_tokens") or DEFAULT_NUM_LOOKAHEAD_TOKENS
        default = fields.get("default_num_lookahead_tokens")
        if default is None:
            default = encoder.default_num_lookahead_tokens
        return cls(tuple(lookaheads), default, extraction)

    def choose_lookahead(self, requested: int | None) -> int:
        """The requested lookahead, or the default.

        Raises:
            BuildError: the model was not trained with it.
        """
        lookahead = self.lookahead if requested is None else requested
        if lookahead not in self.lookaheads:
            raise BuildError(
                f"the lookahead is {lookahead}; the model was trained with "
                f"{sorted(self.lookaheads)}: choose one of them"
            )
        return lookahead


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one without a file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BuildError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class ChunkSizes:
    """The sizes of a stream's chunks.

    Attributes:
        lookahead: encoded frames that a frame sees ahead of it, at most.
        factor: log-mel frames of one encoded frame.
    """

    lookahead: int
    factor: int

    @property
    def frames(self) -> int:
        """Encoded frames of a chunk: all of them see each other."""
        return self.lookahead + 1

    @property
    def features(self) -> int:
        """Log-mel frames of a chunk."""
        return self.factor * self.frames

    @property
    def front(self) -> int:
        """Frames of zeros in front of a stream, which make its first chunk as long as others."""
        return self.factor - 1


class NemotronLogMel(nn.Module):
    """Log-mel frames of a chunk of a stream, as transformers' feature extractor has them.

    A stream is thought to begin with `lead` zeros, so that the frames which a chunk completes are
    those that the encoder takes of it.

    Args:
        extraction: how.
        bins: of a frame.
        chunks: the sizes.
    """

    tail: Tensor
    basis: Tensor
    filters: Tensor

    def __init__(self, extraction: Extraction, bins: int, chunks: ChunkSizes) -> None:
        super().__init__()
        self.extraction, self.chunks = extraction, chunks
        hop, size = extraction.hop, extraction.size
        self.hops = -(-extraction.window // hop)
        window = torch.hann_window(extraction.window, periodic=False, dtype=torch.float64)
        # A frame is whole hops, of which the window is the last part.
        front = self.hops * hop - extraction.window
        basis = nn.functional.pad(fourier_matrix(window, size), (0, 0, front, 0))
        self.register_buffer("basis", basis)
        filters = mel_filter_bank(
            size // 2 + 1,
            bins,
            0.0,
            extraction.sample_rate / 2,
            extraction.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters", torch.from_numpy(filters).float())
        self.register_buffer("tail", torch.zeros(1, (self.hops - 1) * hop))

    @property
    def samples(self) -> int:
        """Samples of a chunk."""
        return self.chunks.features * self.extraction.hop

    @property
    def lead(self) -> int:
        """Zeros that a stream begins with: its first chunk has so many samples less."""
        return self.chunks.factor * self.extraction.hop - self.extraction.window // 2

    def forward(self, audio: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """The frames that a chunk completes.

        Args:
            audio: ``[1, samples]``.
            length: how many of them are valid, ``[1]``.

        Returns:
            Frames ``[1, features, bins]``, and how many of them are valid, ``[1]``.
        """
        extraction, hop = self.extraction, self.extraction.hop
        valid = torch.arange(self.samples) < length
        new = torch.where(valid[None], audio, 0.0)
        whole = torch.cat([self.tail, new], 1)
        self.tail.copy_(whole[:, -self.tail.shape[1] :])
        if extraction.preemphasis is not None:
            before = nn.functional.pad(whole[:, :-1], (1, 0))
            whole = whole - extraction.preemphasis * before
        inside = nn.functional.pad(valid, (self.tail.shape[1], 0), value=True)
        blocks = torch.where(inside[None], whole, 0.0).reshape(1, -1, hop)
        frames = self.chunks.features
        parts = [blocks[:, place : place + frames] for place in range(self.hops)]
        spectrum = torch.matmul(torch.cat(parts, 2), self.basis)
        mel = torch.log(torch.matmul(power(spectrum, 2), self.filters) + LOG_ZERO_GUARD_VALUE)
        ends = torch.arange(2, frames + 2) * hop - extraction.window // 2
        return mel, (ends <= length).sum(0, keepdim=True)


class Encoded(nn.Module):
    """What both programs know of a chunk: its encoded frames, and how far the search is."""

    frames: Tensor
    num_frames: Tensor
    frame: Tensor
    seen: Tensor

    def __init__(self, frames: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("frames", torch.zeros(1, frames, dim, dtype=dtype))
        for name in ("num_frames", "frame", "seen"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.int64))


class NemotronEncode(nn.Module):
    """The encoder: one chunk of a stream.

    States are what transformers keeps in its caches: the last inputs of every convolution, and the
    keys and values of the frames that attention looks back to.

    Args:
        model: whose encoder it is; not changed.
        chunks: the sizes.
        extraction: of features.
        encoded: where the encoded frames go.
    """

    def __init__(
        self, model: PreTrainedModel, chunks: ChunkSizes, extraction: Extraction, encoded: Encoded
    ) -> None:
        super().__init__()
        encoder, config = model.encoder, model.config.encoder_config
        self.chunks, self.encoded = chunks, encoded
        self.log_mel = NemotronLogMel(extraction, config.num_mel_bins, chunks)
        self.subsampling, self.projector = encoder.subsampling, model.encoder_projector
        self.input_scale, self.dtype = encoder.input_scale, encoded.frames.dtype
        self.left = config.sliding_window - 1
        # Attention looks back whole chunks.
        self.unseen = self.left % chunks.frames
        positions = encoder.encode_positions(
            torch.empty(1, chunks.frames, 1, dtype=self.dtype), cached_frames=self.left
        )
        self.layers = nn.ModuleList(_fixed_positions(layer, positions) for layer in encoder.layers)
        self._register_states(config)

    def _register_states(self, config: Any) -> None:
        def register(name: str, *shape: int) -> None:
            self.register_buffer(name, torch.zeros(1, *shape, dtype=self.dtype))

        bins, channels = config.num_mel_bins, 1
        for place, conv in enumerate(self._convolutions):
            padded = bins + sum(conv.freq_pad)
            register(f"subsampling_{place}", channels, conv.left_pad, padded)
            bins = (padded - conv.kernel_size[1]) // conv.stride[1] + 1
            channels = conv.out_channels
        heads = config.num_attention_heads
        for place in range(config.num_hidden_layers):
            for name in ("keys", "values"):
                register(f"{name}_{place}", heads, self.left, config.hidden_size // heads)
            register(f"conv_{place}", config.hidden_size, config.conv_kernel_size - 1)

    @property
    def _convolutions(self) -> list[Any]:
        """The convolutions over time of the subsampling, in order."""
        sub = self.subsampling
        return [sub.conv_in, *(layer.depthwise_conv for layer in sub.layers)]

    def forward(self, audio: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a chunk, and put the search at its first frame.

        Args:
            audio: ``[1, samples]``; a stream begins with `NemotronLogMel.lead` zeros.
            length: how many of them are valid, ``[1]``: fewer only in a stream's last chunk.

        Returns:
            As `encode_features`.
        """
        return self.encode_features(*self.log_mel(audio, length))

    def encode_features(self, features: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a chunk of features.

        Args:
            features: log-mel frames ``[1, features, bins]``. A stream's first chunk begins with
                `ChunkSizes.front` frames that do not count, whatever they hold.
            length: how many of them are valid, ``[1]``: fewer only in a stream's last chunk.

        Returns:
            The encoded frames ``[1, frames, dim]``, and how many of them are valid, ``[1]``.
        """
        x = self._subsampled(features.to(self.dtype), length) * self.input_scale
        valid = self._valid(self.chunks.frames, self.chunks.factor, length)
        cached = torch.arange(self.left)
        seen = (cached >= self.left - self.encoded.seen) & (cached >= self.unseen)
        # a chunk without a valid frame still has one to attend to
        attended = valid | (torch.arange(self.chunks.frames) == 0)
        mask = torch.cat([seen, attended])[None, None, None].expand(1, 1, self.chunks.frames, -1)
        window, tails = _Window(self, valid), _Tails(self)
        for layer in self.layers:
            x = layer(
                x,
                attention_mask=mask,
                all_masked_rows=~valid[None, None],
                position_embeddings=None,
                past_key_values=window,
                padding_cache=tails,
            )
        frames = torch.where(valid[None, :, None], self.projector(x), 0.0)
        num_frames = valid.sum(0, keepdim=True)
        self.encoded.frames.copy_(frames)
        self.encoded.num_frames.copy_(num_frames)
        self.encoded.frame.zero_()
        self.encoded.seen.add_(num_frames)
        return frames.float(), num_frames

    def _subsampled(self, features: Tensor, length: Tensor) -> Tensor:
        """Subsample as transformers, with zeros for what is in front of the stream or after it.

        At its end a stream has a frame wherever a convolution reaches a valid one, as transformers
        has without chunks.
        """
        x, tails, first = features[:, None], _Tails(self), self.encoded.seen == 0
        stages = [self.subsampling.conv_in, *self.subsampling.layers]
        stride, front = 1, self.chunks.front
        for place, (stage, conv) in enumerate(zip(stages, self._convolutions, strict=True)):
            outside = first & (torch.arange(x.shape[2]) < front)
            valid = self._valid(x.shape[2], stride, length) & ~outside
            x = torch.where(valid[None, None, :, None], x, 0.0)
            x = conv(x, padding_cache=tails)
            x = self.subsampling.act_fn(stage.pointwise_conv(x) if place else x)
            stride, front = stride * conv.stride[0], front // conv.stride[0]
        x = x.transpose(1, 2).flatten(2)
        result: Tensor = self.subsampling.linear(x)
        return result

    @staticmethod
    def _valid(extent: int, stride: int, length: Tensor) -> Tensor:
        """Which frames come from valid ones, ``[extent]``; each comes from ``stride``."""
        return torch.arange(0, extent * stride, stride) < length


class _Tails:
    """The last inputs of convolutions, as transformers' ``padding_cache``."""

    def __init__(self, encode: NemotronEncode) -> None:
        self.encode = encode

    def update(self, x: Tensor, key: str, module: nn.Module) -> Tensor:
        """The inputs of a convolution: those kept, then ``x``; the last ones are kept."""
        state: Tensor = getattr(self.encode, key.replace(".", "_"))
        whole = torch.cat([state, x], 2)
        state.copy_(whole[:, :, -state.shape[2] :])
        return whole


class _Window:
    """Keys and values that attention looks back to, as transformers' ``past_key_values``."""

    def __init__(self, encode: NemotronEncode, valid: Tensor) -> None:
        self.encode, self.valid = encode, valid[None, None, :, None]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Those kept, then the new ones; the last ones are kept, zeros for padding."""
        results = []
        for name, new in (("keys", keys), ("values", values)):
            state: Tensor = getattr(self.encode, f"{name}_{layer}")
            whole = torch.cat([state, torch.where(self.valid, new, 0.0)], 2)
            state.copy_(whole[:, :, -state.shape[2] :])
            results.append(whole)
        return results[0], results[1]


class _Constant(nn.Module):
    """Returns a tensor, whatever it is given."""

    result: Tensor

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.register_buffer("result", result)

    def forward(self, _: object) -> Tensor:
        return self.result


def _fixed_positions(layer: Any, positions: Tensor) -> nn.Module:
    """A layer with the same weights whose relative positions are projected once, here."""
    fixed: nn.Module = _shallow_copy(layer)
    attention = _shallow_copy(layer.self_attn)
    with torch.no_grad():
        attention.relative_k_proj = _Constant(layer.self_attn.relative_k_proj(positions))
    fixed.self_attn = attention
    return fixed


def _shallow_copy(module: Any) -> Any:
    """A module with the same parameters, whose submodules can be replaced."""
    new = copy(module)
    new._modules = dict(module._modules)
    return new


class NemotronDecode(nn.Module):
    """One iteration of greedy search: a token, or the next frame. Nothing changes when it is done.

    Its states begin with what the predictor gives for the start token. The predictor runs after a
    token, not before the next one as in transformers: the values are the same.

    Args:
        model: whose predictor and joint they are.
        encoded: the frames.
    """

    hidden: Tensor
    cell: Tensor
    predicted: Tensor
    symbols: Tensor

    def __init__(self, model: PreTrainedModel, encoded: Encoded) -> None:
        super().__init__()
        self.encoded, self.joint = encoded, model.joint
        self.embedding, self.lstm = model.decoder.embedding, model.decoder.lstm
        self.project = model.decoder.decoder_projector
        self.blank, self.max_symbols = model.config.blank_token_id, model.max_symbols_per_step
        with torch.no_grad():
            output, (hidden, cell) = self.lstm(self.embedding(torch.tensor([[_start(model)]])))
            self.register_buffer("predicted", self.project(output[:, 0]))
        self.register_buffer("hidden", hidden)
        self.register_buffer("cell", cell)
        self.register_buffer("symbols", torch.zeros(1, dtype=torch.int64))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """The token, -1 for none; its frame from the stream's first; whether the chunk is done."""
        at, count = self.encoded.frame, self.encoded.num_frames
        last = self.encoded.frames.shape[1] - 1
        place = at.clamp(max=last)[:, None, None].expand(-1, -1, self.encoded.frames.shape[2])
        here = self.encoded.frames.gather(1, place)[:, 0]
        active = at < count
        best = self.joint(self.predicted, here).argmax(-1)
        emits = active & (best != self.blank)
        symbols = torch.where(emits, self.symbols + 1, 0)
        leaves = active & (~emits | (symbols >= self.max_symbols))
        output, (hidden, cell) = self.lstm(self.embedding(best)[:, None], (self.hidden, self.cell))
        predicted = self.project(output[:, 0])
        self.predicted.copy_(torch.where(emits[:, None], predicted, self.predicted))
        self.hidden.copy_(torch.where(emits[:, None, None], hidden, self.hidden))
        self.cell.copy_(torch.where(emits[:, None, None], cell, self.cell))
        self.symbols.copy_(torch.where(active & ~leaves, symbols, 0))
        following = torch.where(leaves, at + 1, at)
        frame = torch.where(emits, self.encoded.seen - count + at, -1)
        self.encoded.frame.copy_(following)
        return torch.where(emits, best, -1), frame, following >= count


def _start(model: PreTrainedModel) -> int:
    """The token that transformers' ``generate`` begins with."""
    config = model.generation_config
    for token in (config.decoder_start_token_id, config.bos_token_id):
        if token is not None:
            return int(token)
    return int(model.config.blank_token_id)


def capture_nemotron_asr_streaming(
    model: PreTrainedModel,
    lookahead: int,
    max_rows: int,
    extraction: Extraction = Extraction(),
) -> ProgramsCapture:
    """Capture the model's encoder and search as the programs of one engine.

    A request has the next samples of a stream, ``audio``, and is answered with what the chunks give
    that they complete: ``tokens`` and ``token_frames`` (the encoded frame of each, counted from the
    stream's first).

    Args:
        model: a ``NemotronAsrStreamingForRNNT`` of transformers; not changed.
        lookahead: encoded frames that a frame sees ahead of it; a chunk has one more.
        max_rows: streams in one call, at most.
        extraction: of features from audio.

    Raises:
        BuildError: it cannot be captured.
    """
    config = model.config.encoder_config
    chunks = ChunkSizes(lookahead, config.subsampling_factor)
    dtype = model.encoder_projector.weight.dtype
    encoded = Encoded(chunks.frames, model.config.decoder_hidden_size, dtype)
    encode = NemotronEncode(model, chunks, extraction, encoded).eval()
    decode = NemotronDecode(model, encoded).eval()
    samples = encode.log_mel.samples
    examples = (torch.zeros(1, samples), torch.full((1,), samples))
    programs = {
        "encode": (
            encode,
            RowOptions(
                max_rows=max_rows,
                outputs=("encoded", "num_frames"),
                sample_rate=extraction.sample_rate,
                lead=encode.log_mel.lead,
                valid_lengths={"length": AUDIO},
            ),
            examples,
        ),
        "decode": (
            decode,
            RowOptions(
                max_rows=max_rows,
                outputs=("tokens", "token_frames", "done"),
                roles={"tokens": Role.TOKENS, "token_frames": Role.TOKENS, "done": Role.DONE},
            ),
            (),
        ),
    }
    at_most = chunks.frames * model.max_symbols_per_step
    schedule = [Call(program="encode"), Call(program="decode", until="done", at_most=at_most)]
    # noise may be no speech to the model: encoded frames are compared, tokens may be none
    return capture_programs(programs, schedule, constant_tokens=True)
