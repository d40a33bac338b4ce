"""How transformers' ``generate`` chooses Whisper's tokens, read from a generation configuration."""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from inplace.protocol import LANGUAGE, TASK, TIMESTAMPS
from torch import Tensor
from transformers import GenerationConfig, WhisperForConditionalGeneration

from inplace_builder.capture.checkpoint import quiet
from inplace_builder.errors import BuildError, brief

_NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "guidance_scale": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "max_time": None,
    "stop_strings": None,
    "no_speech_threshold": None,
    "logprob_threshold": None,
    "compression_ratio_threshold": None,
}
"""Fields of a generation configuration by which ``generate`` would choose otherwise, and the values
with which it does not."""


def _check_supported(config: GenerationConfig) -> None:
    """BuildError if ``generate`` would choose tokens in a way that an engine does not."""
    set_fields = [
        f"{name} {getattr(config, name)}"
        for name, neutral in _NEUTRAL.items()
        if getattr(config, name, neutral) not in (neutral, None)
    ]
    eos = config.eos_token_id
    if eos is None or (isinstance(eos, list) and len(eos) != 1):
        set_fields.append(f"eos_token_id {eos}")
    if set_fields:
        raise BuildError(
            f"the model's generation configuration has {', '.join(set_fields)}, which an engine "
            f"does not follow: it decodes greedily, once, to one end token; change "
            f"generation_config.json"
        )


DETECT, NO_TOKEN = -1, -2
"""In a prompt: the language that the model detects; nothing, behind the end of the prompt."""


@dataclass(frozen=True)
class TimestampRules:
    """transformers' ``WhisperTimeStampLogitsProcessor``.

    Attributes:
        no_timestamps: the token ``<|notimestamps|>``; the next one is the first timestamp.
        max_initial: the largest index of the first timestamp; None for all.
    """

    no_timestamps: int
    max_initial: int | None

    @property
    def begin(self) -> int:
        """The token of 0 s."""
        return self.no_timestamps + 1


@dataclass(frozen=True)
class Rules:
    """How transformers' ``generate`` chooses tokens.

    Attributes:
        choices: by parameter of a request its values, the default first.
        prompts: the forced tokens of each combination of the choices, the last one fastest:
            ``[combinations, n]`` with `DETECT` and `NO_TOKEN`.
        limits: the most tokens of each combination, with the prompt.
        eos: the token that ends a window.
        suppressed: tokens that are never chosen.
        suppressed_first: tokens that are not chosen as the first one.
        languages: the tokens of languages, to detect one.
        timestamps: None for a model without timestamps.
    """

    choices: Mapping[str, tuple[str, ...]]
    prompts: Tensor
    limits: Tensor
    eos: int
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    languages: tuple[int, ...]
    timestamps: TimestampRules | None

    @classmethod
    def of(cls, model: WhisperForConditionalGeneration) -> "Rules":
        """The rules of a model, from its generation configuration.

        Raises:
            BuildError: ``generate`` would do something else that an engine does not.
        """
        config = _generation_config(model)
        _check_supported(config)
        languages = _languages(config)
        has_timestamps = getattr(config, "no_timestamps_token_id", None) is not None
        timestamps = bool(getattr(config, "return_timestamps", False))
        options: dict[str, list[Any]] = {
            LANGUAGE: [None, *languages],
            TASK: [None, *getattr(config, "task_to_id", {})] if languages else [None],
            TIMESTAMPS: [timestamps, not timestamps] if has_timestamps else [False],
        }
        prompts = [
            _prompt(model, config, dict(zip(options, values, strict=True)))
            for values in itertools.product(*options.values())
        ]
        width = max(map(len, prompts))
        return cls(
            {name: tuple(map(_name, values)) for name, values in options.items()},
            torch.tensor([prompt + [NO_TOKEN] * (width - len(prompt)) for prompt in prompts]),
            torch.tensor([_limit(model, config, len(prompt)) for prompt in prompts]),
            _eos(config),
            tuple(config.suppress_tokens or ()),
            tuple(config.begin_suppress_tokens or ()),
            tuple(languages.values()),
            TimestampRules(
                config.no_timestamps_token_id, getattr(config, "max_initial_timestamp_index", None)
            )
            if has_timestamps
            else None,
        )


def _name(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _eos(config: GenerationConfig) -> int:
    eos = config.eos_token_id
    return int(eos[0] if isinstance(eos, list) else eos)


def _generation_config(model: WhisperForConditionalGeneration) -> GenerationConfig:
    with quiet():
        config, _ = model._prepare_generation_config(None)
    return config


def _languages(config: GenerationConfig) -> dict[str, int]:
    """The tokens of the languages by their codes; none for a model of one language."""
    if not getattr(config, "is_multilingual", True):
        return {}
    tokens: dict[str, int] = getattr(config, "lang_to_id", None) or {}
    return {name.strip("<|>"): token for name, token in tokens.items()}


def _prompt(
    model: WhisperForConditionalGeneration, config: GenerationConfig, values: Mapping[str, Any]
) -> list[int]:
    """The tokens that ``generate`` forces, from its own code; `DETECT` where it detects one."""
    config = copy.deepcopy(config)
    config.return_timestamps = values[TIMESTAMPS]
    for name in (LANGUAGE, TASK):
        if values[name] is not None:
            setattr(config, name, values[name])
    model.detect_language = lambda **_: torch.tensor([DETECT])
    try:
        with quiet():
            tokens = model._retrieve_init_tokens(
                torch.zeros(1, 1, 1),
                batch_size=1,
                generation_config=config,
                config=model.config,
                num_segment_frames=1,
                kwargs={},
            )
    except Exception as error:  # transformers raises several types
        raise BuildError(
            f"the model's generation configuration has no forced tokens for {dict(values)}: "
            f"{brief(error)}"
        ) from error
    finally:
        del model.detect_language
    prompt: list[int] = tokens[0].tolist()
    return prompt


def _limit(
    model: WhisperForConditionalGeneration, config: GenerationConfig, prompt_length: int
) -> int:
    """The most tokens of a window, with its prompt."""
    new = config.max_length if config.max_new_tokens is None else config.max_new_tokens
    return min(prompt_length + int(new), int(model.config.max_target_positions))
