"""The front-end for Whisper: two programs over one arena, from the stock classes of transformers.

``encode`` turns audio into log-mel features, encodes them, and writes the keys and values that the
decoder's cross-attention reads. ``decode`` feeds one token and chooses the next one by `Rules`:
forced tokens first, then greedily with tokens suppressed, and with timestamps in pairs. A request
encodes one window of audio and decodes it to the end token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inplace.schema.schedule import Call
from inplace.schema.specs import Role
from torch import Tensor, nn
from transformers import (
    EncoderDecoderCache,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from inplace_builder.capture.checkpoint import quiet
from inplace_builder.capture.exported_rows import RowOptions
from inplace_builder.capture.fourier import fourier_matrix, power
from inplace_builder.capture.programs import ProgramsCapture, capture_programs
from inplace_builder.capture.whisper_rules import DETECT, NO_TOKEN, Rules, TimestampRules
from inplace_builder.errors import BuildError, brief

MODEL_TYPE = "whisper"
"""The ``model_type`` of its configurations."""

MINUS_INFINITY = float("-inf")


def load_extractor(folder: Path, config: PretrainedConfig) -> WhisperFeatureExtractor:
    """Load the feature extractor of a model.

    Args:
        folder: of the model.
        config: of the model.

    Raises:
        BuildError: there is none, or its features are not what the model takes.
    """
    try:
        with quiet():
            extractor = WhisperFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # transformers raises several types for an unreadable folder
        raise BuildError(
            f"{folder} has no feature extractor that transformers can read (a file "
            f"preprocessor_config.json): {brief(error)}"
        ) from error
    features = (extractor.feature_size, extractor.nb_max_frames)
    expected = (config.num_mel_bins, 2 * config.max_source_positions)
    if features != expected:
        raise BuildError(
            f"the feature extractor in {folder} makes {features[0]} mel bins of {features[1]} "
            f"frames; the model takes {expected[0]} of {expected[1]}"
        )
    for name, effect in (("dither", "adds noise to"), ("padding_value", "pads with sound")):
        if value := getattr(extractor, name):
            raise BuildError(
                f"the feature extractor in {folder} {effect} audio ({name} {value}), which an "
                f"engine does not: set it to 0"
            )
    return extractor


def hide_timestamps(
    model: WhisperForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Make timestamps special tokens: decoding leaves them out, as transformers does."""
    first = getattr(model.generation_config, "no_timestamps_token_id", None)
    if first is None or not tokenizer.is_fast:
        return
    backend = tokenizer.backend_tokenizer
    names = [backend.id_to_token(token) for token in range(first + 1, model.config.vocab_size)]
    backend.add_special_tokens([name for name in names if name is not None])


class WhisperLogMel(nn.Module):
    """Whisper's features, as ``WhisperFeatureExtractor`` makes them.

    The Fourier transform is a convolution with its matrix.

    Args:
        extractor: the model's feature extractor.
    """

    basis: Tensor
    filters: Tensor

    def __init__(self, extractor: WhisperFeatureExtractor) -> None:
        super().__init__()
        self.size, self.hop = extractor.n_fft, extractor.hop_length
        self.frames = extractor.nb_max_frames
        window = torch.hann_window(self.size, dtype=torch.float64)
        basis = fourier_matrix(window, self.size).T[:, None].contiguous()
        self.register_buffer("basis", basis, persistent=False)
        filters = torch.from_numpy(extractor.mel_filters).float().T.contiguous()
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """``[1, samples]`` to ``[1, mel bins, frames]``."""
        half = self.size // 2
        padded = nn.functional.pad(audio[:, None], (half, half), mode="reflect")
        spectrum = nn.functional.conv1d(padded, self.basis, stride=self.hop)[..., : self.frames]
        mel = torch.matmul(self.filters, power(spectrum, 1)).clamp(min=1e-10).log10()
        loudest = mel.amax((1, 2), keepdim=True)
        return (torch.maximum(mel, loudest - 8.0) + 4.0) / 4.0


class WhisperWindow(nn.Module):
    """What both programs know of a window of audio.

    Attributes:
        cross_keys_0, cross_values_0, …: by layer of the decoder, the keys and values of the
            encoded audio, ``[1, heads, source positions, head size]``.
        prompt: the tokens that are forced, ``[1, n]``, with `DETECT` and `NO_TOKEN`.
        limit: the most tokens, with the prompt.
        fed: the token that is fed next.
        position: its position.
        before: the token before it.
        generated: how many tokens were chosen after the prompt.
        timestamp: the last timestamp among them, -1 for none.
        done: whether the window is decoded.
    """

    prompt: Tensor
    limit: Tensor
    fed: Tensor
    position: Tensor
    before: Tensor
    generated: Tensor
    timestamp: Tensor
    done: Tensor

    def __init__(self, model: WhisperForConditionalGeneration, rules: Rules) -> None:
        super().__init__()
        config = model.config
        heads = config.decoder_attention_heads
        shape = (1, heads, config.max_source_positions, config.d_model // heads)
        for layer in range(config.decoder_layers):
            for name in (f"cross_keys_{layer}", f"cross_values_{layer}"):
                self.register_buffer(name, torch.zeros(shape, dtype=model.dtype))
        self.register_buffer("prompt", torch.full((1, rules.prompts.shape[1]), NO_TOKEN))
        for name in ("limit", "fed", "position", "before", "generated"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.int64))
        self.register_buffer("timestamp", torch.full((1,), -1))
        self.register_buffer("done", torch.ones(1, dtype=torch.bool))

    def cross(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer."""
        return getattr(self, f"cross_keys_{layer}"), getattr(self, f"cross_values_{layer}")


class WhisperEncode(nn.Module):
    """Audio to the keys and values of cross-attention; begins a window.

    Args:
        model: the model.
        extractor: its feature extractor.
        rules: how its tokens are chosen.
        window: shared with `WhisperDecode`.
    """

    prompts: Tensor
    limits: Tensor

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        extractor: WhisperFeatureExtractor,
        rules: Rules,
        window: WhisperWindow,
    ) -> None:
        super().__init__()
        self.features, self.encoder = WhisperLogMel(extractor), model.model.encoder
        self.dtype = model.dtype
        self.attention = nn.ModuleList(each.encoder_attn for each in model.model.decoder.layers)
        self.window = window
        self.sizes = [len(values) for values in rules.choices.values()]
        self.register_buffer("prompts", rules.prompts, persistent=False)
        self.register_buffer("limits", rules.limits, persistent=False)

    def forward(self, audio: Tensor, language: Tensor, task: Tensor, timestamps: Tensor) -> None:
        """Encode ``audio`` ``[1, samples]``; the choices are numbers ``[1]``."""
        window = self.window
        hidden = self.encoder(self.features(audio).to(self.dtype)).last_hidden_state
        each: Any
        for layer, each in enumerate(self.attention):
            for project, state in zip((each.k_proj, each.v_proj), window.cross(layer), strict=True):
                heads = project(hidden).view(1, -1, each.num_heads, each.head_dim)
                state.copy_(heads.transpose(1, 2))
        combination = torch.zeros_like(window.position)
        for choice, size in zip((language, task, timestamps), self.sizes, strict=True):
            combination = combination * size + choice
        prompt = self.prompts.index_select(0, combination)
        window.prompt.copy_(prompt)
        window.limit.copy_(self.limits.index_select(0, combination))
        window.fed.copy_(prompt[:, 0])
        for state in (window.position, window.before, window.generated, window.done):
            state.zero_()
        window.timestamp.fill_(-1)


class _Layers:
    """The keys and values of the decoder's layers, as transformers' attention takes them."""

    def __init__(self, decode: "WhisperDecode", active: Tensor) -> None:
        self._decode, self._active = decode, active

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append to a layer. A row that is done writes zeros behind the last position."""
        states = self._decode.own(layer)
        position = self._decode.window.position
        place = torch.where(self._active, position, states[0].shape[2] - 1)
        for state, new in zip(states, (keys, values), strict=True):
            state.index_copy_(2, place, torch.where(self._active, new, 0.0))
        return states


@dataclass(frozen=True)
class _Layer:
    keys: Tensor
    values: Tensor


class _CrossLayers:
    """The keys and values of the encoded audio."""

    def __init__(self, window: WhisperWindow, num_layers: int) -> None:
        self.layers = [_Layer(*window.cross(layer)) for layer in range(num_layers)]


class _Caches(EncoderDecoderCache):  # type: ignore[misc]  # transformers has no types
    """The states, where transformers' attention looks for its cache."""

    def __init__(self, own: _Layers, cross: _CrossLayers) -> None:
        self.self_attention_cache: Any = own
        self.cross_attention_cache: Any = cross
        self.is_updated = dict.fromkeys(range(len(cross.layers)), True)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are passed in."""
        return 0


class WhisperDecode(nn.Module):
    """Feeds one token and chooses the next one.

    Args:
        model: the model.
        rules: how its tokens are chosen.
        window: shared with `WhisperEncode`.
    """

    suppressed: Tensor
    suppressed_first: Tensor
    languages: Tensor
    ids: Tensor

    def __init__(
        self, model: WhisperForConditionalGeneration, rules: Rules, window: WhisperWindow
    ) -> None:
        super().__init__()
        self.decoder, self.head, self.window, self.rules = (
            model.model.decoder,
            model.proj_out,
            window,
            rules,
        )
        config = model.config
        heads = config.decoder_attention_heads
        self.max_tokens = int(rules.limits.max())
        shape = (1, heads, self.max_tokens + 1, config.d_model // heads)
        for layer in range(config.decoder_layers):
            for name in (f"keys_{layer}", f"values_{layer}"):
                self.register_buffer(name, torch.zeros(shape, dtype=model.dtype))
        vocabulary = config.vocab_size
        for name, tokens in (
            ("suppressed", rules.suppressed),
            ("suppressed_first", rules.suppressed_first),
            ("languages", set(range(vocabulary)) - set(rules.languages)),
        ):
            mask = torch.zeros(1, vocabulary)
            mask[:, list(tokens)] = MINUS_INFINITY
            self.register_buffer(name, mask, persistent=False)
        self.register_buffer("ids", torch.arange(vocabulary)[None], persistent=False)

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer's self-attention."""
        return getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")

    def forward(self) -> tuple[Tensor, Tensor]:
        """The chosen token ``[1]``, -1 for none; and whether the window is decoded, ``[1]``."""
        window, rules = self.window, self.rules
        active = ~window.done
        position = window.position
        scores = self._scores(active)
        last = window.prompt.shape[1] - 1
        forced = window.prompt.gather(1, (position + 1).clamp(max=last)[:, None])[:, 0]
        forced = torch.where(position < last, forced, NO_TOKEN)
        chosen = self._chosen(scores)
        if rules.languages:
            detected = (scores + self.languages).argmax(1)
            forced = torch.where(forced == DETECT, detected, forced)
        generates = forced == NO_TOKEN
        following = torch.where(generates, chosen, forced)
        ends = generates & (chosen == rules.eos)
        done = window.done | ends | (position + 2 >= window.limit)
        emits = active & generates & ~ends
        goes_on = active & ~done
        if rules.timestamps is not None:
            stamp = emits & (chosen >= rules.timestamps.begin)
            window.timestamp.copy_(torch.where(stamp, chosen, window.timestamp))
        window.before.copy_(torch.where(goes_on, window.fed, window.before))
        window.fed.copy_(torch.where(goes_on, following, window.fed))
        window.generated.copy_(window.generated + (goes_on & generates))
        window.position.copy_(torch.where(goes_on, position + 1, position))
        window.done.copy_(done)
        return torch.where(emits, chosen, -1), done

    def _scores(self, active: Tensor) -> Tensor:
        """The decoder's scores of the next token, ``[1, vocabulary]`` in float32."""
        window = self.window
        hidden = self.decoder(
            input_ids=window.fed[:, None],
            # not read: the cross-attention has its keys and values already
            encoder_hidden_states=self.decoder.layer_norm.weight[None, None],
            attention_mask=self._visible(),
            past_key_values=_Caches(
                _Layers(self, active), _CrossLayers(window, len(self.decoder.layers))
            ),
            position_ids=window.position[:, None],
            use_cache=True,
        ).last_hidden_state
        scores: Tensor = self.head(hidden)[:, -1].float()
        return scores

    def _visible(self) -> Tensor:
        """Which positions the fed token attends to, ``[1, 1, 1, positions]``."""
        positions = torch.arange(self.max_tokens + 1)
        return (positions <= self.window.position[:, None])[:, None, None]

    def _chosen(self, scores: Tensor) -> Tensor:
        """The best token that the rules allow, ``[1]``."""
        first = (self.window.generated == 0)[:, None]
        scores = scores + self.suppressed + torch.where(first, self.suppressed_first, 0.0)
        if self.rules.timestamps is not None:
            timed = self._timed(scores, first, self.rules.timestamps)
            with_timestamps = ~(self.window.prompt == self.rules.timestamps.no_timestamps).any(
                1, keepdim=True
            )
            scores = torch.where(with_timestamps, timed, scores)
        return scores.argmax(1)

    def _timed(self, scores: Tensor, first: Tensor, rules: TimestampRules) -> Tensor:
        """The scores with the rules for timestamps, as in `TimestampRules`."""
        window, ids, begin = self.window, self.ids, rules.begin
        is_stamp = ids >= begin
        generated = window.generated[:, None]
        after_stamp = (generated >= 1) & (window.fed >= begin)[:, None]
        after_two = after_stamp & ((generated < 2) | (window.before >= begin)[:, None])
        after_one = after_stamp & ~after_two
        last = window.timestamp[:, None]
        smallest = torch.where(after_one, last, last + 1)
        forbidden = ids == rules.no_timestamps
        forbidden = forbidden | (after_two & is_stamp) | (after_one & (ids < self.rules.eos))
        forbidden = forbidden | ((last >= 0) & is_stamp & (ids < smallest))
        forbidden = forbidden | (first & ~is_stamp)
        if rules.max_initial is not None:
            forbidden = forbidden | (first & (ids > begin + rules.max_initial))
        scores = scores.masked_fill(forbidden, MINUS_INFINITY)
        logprobs = scores.log_softmax(1)
        of_stamps = logprobs[:, begin:].logsumexp(1, keepdim=True)
        of_text = logprobs[:, :begin].amax(1, keepdim=True)
        return scores.masked_fill((of_stamps > of_text) & ~is_stamp, MINUS_INFINITY)


def capture_whisper(
    model: WhisperForConditionalGeneration, extractor: WhisperFeatureExtractor, max_rows: int
) -> ProgramsCapture:
    """Capture both programs, and what a request calls.

    Args:
        model: the model.
        extractor: its feature extractor.
        max_rows: maximum number of sequences in a call.

    Raises:
        BuildError: the model generates in a way that an engine does not, or cannot be captured.
    """
    rules = Rules.of(model)
    window, longest = WhisperWindow(model, rules), int(rules.limits.max())
    encode = RowOptions(
        max_rows=max_rows,
        outputs=(),
        sample_rate=extractor.sampling_rate,
        shorter="any",
        choices=rules.choices,
        restarts=("decode",),
    )
    decode = RowOptions(
        max_rows=max_rows,
        outputs=("tokens", "done"),
        roles={"tokens": Role.TOKENS, "done": Role.DONE},
        max_positions=longest,
    )
    audio, number = torch.zeros(1, extractor.n_samples), torch.zeros(1, dtype=torch.int64)
    encoding = WhisperEncode(model, extractor, rules, window).eval()
    return capture_programs(
        {
            "encode": (encoding, encode, (audio, *(number.clone() for _ in rules.choices))),
            "decode": (WhisperDecode(model, rules, window).eval(), decode, ()),
        },
        [Call(program="encode"), Call(program="decode", until="done", at_most=longest)],
    )
