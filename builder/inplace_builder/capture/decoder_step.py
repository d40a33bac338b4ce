"""The module that is exported for a Hugging Face decoder: one step over packed rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from inplace.operators import sample_with_options
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from inplace_builder.capture.cache_scales import cache_scales
from inplace_builder.capture.decoder import prompt_logprobs
from inplace_builder.capture.recurrent import CONV, RECURRENT
from inplace_builder.capture.reference import cache_argument
from inplace_builder.capture.slot_cache import LayerStates, SeenLayer, SlotCache, current_cache


@dataclass(frozen=True)
class StepCall:
    """How the model is called.

    Attributes:
        with_mask: with a mask that says that no token is padding.
        own_attention: the name of the model if it attends in code of its own.
    """

    with_mask: bool
    own_attention: str | None


def run_packed(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor,
    cache: SlotCache,
    logits_to_keep: Tensor | int = 1,
    *,
    with_mask: bool,
) -> Any:
    """Call the model on packed tokens, with a mask that says that none is padding, or without."""
    given = {"attention_mask": torch.ones_like(input_ids).unsqueeze(0)} if with_mask else {}
    with current_cache(cache):
        return model(
            input_ids=input_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **{cache_argument(model): cache},
            **given,
        )


_LayerGroups = tuple[
    dict[int, Tensor], dict[int, Tensor], dict[int, Tensor], dict[str, Tensor], dict[str, Tensor]
]
"""Keys, values, keys of indexers, states of convolutions and recurrent states, by layer."""


class DecoderStep(torch.nn.Module):
    """One step of a decoder over packed rows.

    The names of its arguments become those of the graph's inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[int, SeenLayer],
        rings: Mapping[int, bool],
        call: StepCall,
        selects_logits: bool,
    ) -> None:
        super().__init__()
        self.model, self.rings, self.call = model, rings, call
        self.masks = {index: layer.mask for index, layer in layers.items()}
        self.scores = {index: layer.scores for index, layer in layers.items()}
        self.selects_logits = selects_logits
        self.num_layers = num_layers(model.config.get_text_config(decoder=True))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        row_offsets: Tensor,
        last_tokens: Tensor,
        slots: Tensor,
        write_indices: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seed: Tensor,
        next_positions: Tensor,
        min_p: Tensor,
        num_logprobs: Tensor,
        num_adjusted: Tensor,
        adjusted_tokens: Tensor,
        adjustments: Tensor,
        token_mask: Tensor,
        key_states: dict[int, Tensor],
        value_states: dict[int, Tensor],
        index_states: dict[int, Tensor],
        conv_states: dict[str, Tensor],
        recurrent_states: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """From token ids ``[tokens]`` to each row's next token.

        States are given by layer: keys and values of those that attend, then the others.

        Returns:
            The tokens ``[rows, 1]``, chosen by `sample_with_options`, float32 logits
            ``[rows, vocab_size]``, and the other outputs of `sample_with_options`.
        """
        logits = self._logits(
            input_ids,
            positions,
            last_tokens,
            (slots, row_offsets, write_indices),
            (key_states, value_states, index_states, conv_states, recurrent_states),
        )
        if not self.selects_logits:  # the model ignores logits_to_keep
            logits = logits.index_select(0, last_tokens)
        token, *logprobs = sample_with_options(
            logits,
            temperature,
            top_k,
            top_p,
            seed,
            next_positions,
            min_p,
            num_logprobs,
            num_adjusted,
            adjusted_tokens,
            adjustments,
            token_mask,
        )
        return token, logits, *logprobs

    def _logits(
        self,
        input_ids: Tensor,
        positions: Tensor,
        logits_to_keep: Tensor | int,
        rows: tuple[Tensor, Tensor, Tensor],
        states: _LayerGroups,
    ) -> Tensor:
        """The float32 scores of the tokens that are kept, ``[kept, vocab_size]``.

        Args:
            input_ids, positions: of all tokens.
            logits_to_keep: the indices of the tokens, or 0 for all; some models keep all always.
            rows: slots, row offsets and write indices.
            states: as `forward` takes them.
        """
        slots, row_offsets, write_indices = rows
        key_states, value_states, index_states, conv_states, recurrent_states = states
        recurrent = {
            f"{part}_{name}": state
            for part, group in ((CONV, conv_states), (RECURRENT, recurrent_states))
            for name, state in group.items()
        }
        layer_states = LayerStates(
            key_states,
            value_states,
            index_states,
            recurrent,
            slots,
            row_offsets,
            write_indices,
            self.masks,
            self.rings,
            self.scores,
            {} if (scales := cache_scales(self.model)) is None else scales.by_layer(),
        )
        cache = SlotCache(positions, self.num_layers, layer_states, self.call.own_attention)
        out = run_packed(
            self.model, input_ids, positions, cache, logits_to_keep, with_mask=self.call.with_mask
        )
        logits: Tensor = out.logits[0]
        return logits.float()


class PromptStep(DecoderStep):
    """The same step with log-probabilities of every fed token."""

    def forward(  # type: ignore[override]  # it takes one more tensor
        self,
        input_ids: Tensor,
        positions: Tensor,
        row_offsets: Tensor,
        last_tokens: Tensor,
        slots: Tensor,
        write_indices: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seed: Tensor,
        next_positions: Tensor,
        min_p: Tensor,
        num_logprobs: Tensor,
        num_adjusted: Tensor,
        adjusted_tokens: Tensor,
        adjustments: Tensor,
        token_mask: Tensor,
        following_tokens: Tensor,
        key_states: dict[int, Tensor],
        value_states: dict[int, Tensor],
        index_states: dict[int, Tensor],
        conv_states: dict[str, Tensor],
        recurrent_states: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """As `DecoderStep.forward`, with the token that follows each fed one, ``[tokens]``.

        Returns:
            What `DecoderStep.forward` returns, then what `prompt_logprobs` does.
        """
        every = self._logits(
            input_ids,
            positions,
            0,
            (slots, row_offsets, write_indices),
            (key_states, value_states, index_states, conv_states, recurrent_states),
        )
        logits = every.index_select(0, last_tokens)
        token, *logprobs = sample_with_options(
            logits,
            temperature,
            top_k,
            top_p,
            seed,
            next_positions,
            min_p,
            num_logprobs,
            num_adjusted,
            adjusted_tokens,
            adjustments,
            token_mask,
        )
        return token, logits, *logprobs, *prompt_logprobs(every, following_tokens)


def num_layers(config: PretrainedConfig) -> int:
    """The layers of the decoder: ``num_hidden_layers`` may be those of an encoder; 0 if unknown."""
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return next((count for name in names if (count := getattr(config, name, None))), 0)
