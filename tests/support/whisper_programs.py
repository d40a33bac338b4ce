"""A tiny random Whisper as two programs.

The encoder writes the cross-attention states, a decoder step reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from inplace.operators import attention, update
from inplace.schema.specs import Dtype, StateSpec, Update
from inplace_builder.graph.export import size_oblivious
from inplace_builder.lower.compile import Range
from torch import Tensor, nn
from torch.export import Dim
from transformers import WhisperConfig, WhisperForConditionalGeneration

LAYERS, HEADS, DIM, MEL, POSITIONS, CAPACITY, VOCABULARY, START = 2, 4, 8, 8, 20, 48, 64, 3
FRAMES = 2 * POSITIONS
MAX_ROWS, CHUNK = 4, 8


def tiny_whisper() -> WhisperForConditionalGeneration:
    """Random weights, with which greedy tokens vary."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=HEADS * DIM,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=MEL,
        max_source_positions=POSITIONS,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=START,
        init_std=0.3,
    )
    return WhisperForConditionalGeneration(config).eval()


def states(part: str, capacity: int) -> tuple[StateSpec, ...]:
    """Keys and values of every layer, named ``<part>_key_0`` and so on."""
    return tuple(
        StateSpec(
            name=f"{part}_{what}_{layer}",
            shape=(HEADS, capacity, DIM),
            dtype=Dtype.FLOAT32,
            update=Update.APPEND,
            axis=1,
            reset=False,
        )
        for what in ("key", "value")
        for layer in range(LAYERS)
    )


CROSS, SELF = states("cross", POSITIONS), states("own", CAPACITY)


class Encoder(nn.Module):
    """Features ``[rows, mel, frames]`` to cross-attention keys and values of all decoder layers."""

    def __init__(self, whisper: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.encoder, self.layers = whisper.model.encoder, whisper.model.decoder.layers

    def forward(
        self, features: Tensor, slots: Tensor, write_indices: Tensor, cross: list[Tensor]
    ) -> Tensor:
        hidden = self.encoder(features).last_hidden_state
        for layer, keys, values in zip(self.layers, cross[:LAYERS], cross[LAYERS:], strict=True):
            for project, state in (
                (layer.encoder_attn.k_proj, keys),
                (layer.encoder_attn.v_proj, values),
            ):
                rows = project(hidden).view(hidden.shape[0], POSITIONS, HEADS, DIM).transpose(1, 2)
                update(state, slots, rows, None, write_indices, axis=2)
        assert isinstance(hidden, Tensor)
        return hidden


class Decoder(nn.Module):
    """One step over packed tokens: ids ``[tokens]`` to each row's next token ``[rows, 1]``."""

    def __init__(self, whisper: WhisperForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.head = whisper.model.decoder, whisper.proj_out

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        row_offsets: Tensor,
        last_tokens: Tensor,
        slots: Tensor,
        write_indices: Tensor,
        encoded: Tensor,
        cross: list[Tensor],
        own: list[Tensor],
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.view(x.shape[0], HEADS, DIM)

        x = self.decoder.embed_tokens(input_ids) + self.decoder.embed_positions.weight[positions]
        for index, layer in enumerate(self.decoder.layers):
            each = layer.self_attn
            h = layer.self_attn_layer_norm(x)
            caches = own[index], own[LAYERS + index], slots, row_offsets
            query, key, value = (
                heads(y) for y in (each.q_proj(h) * each.scaling, each.k_proj(h), each.v_proj(h))
            )
            x = x + each.out_proj(
                attention(query, key, value, *caches, write_indices, scale=1.0).flatten(1)
            )
            each = layer.encoder_attn
            query = heads(each.q_proj(layer.encoder_attn_layer_norm(x)) * each.scaling)
            caches = cross[index], cross[LAYERS + index], slots, row_offsets
            attended = attention(
                query, None, None, *caches, encoded, scale=1.0, append=False, causal=False
            )
            x = x + each.out_proj(attended.flatten(1))
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        logits = self.head(self.decoder.layer_norm(x)[last_tokens])
        return logits.argmax(-1, keepdim=True)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class WhisperProgram:
    """An exported program, its states and the shapes to build it for."""

    exported: torch.export.ExportedProgram
    outputs: tuple[str, ...]
    states: tuple[StateSpec, ...]
    profiles: tuple[dict[str, Range], ...]


def _arena(specs: tuple[StateSpec, ...]) -> list[Tensor]:
    return [torch.zeros((2, *state.shape)) for state in specs]


def encoder_program(whisper: WhisperForConditionalGeneration) -> WhisperProgram:
    rows = Dim("rows", min=1, max=MAX_ROWS)
    index = torch.zeros(2, dtype=torch.int32)
    with torch.no_grad(), size_oblivious():
        exported = torch.export.export(
            Encoder(whisper),
            (torch.zeros(2, MEL, FRAMES), torch.arange(2, dtype=torch.int32), index, _arena(CROSS)),
            dynamic_shapes=(
                {0: rows},
                {0: rows},
                {0: rows},
                [{0: Dim("slots", min=1)}] * len(CROSS),
            ),
        )
    shapes: dict[str, tuple[int, ...]] = {
        "features": (MEL, FRAMES),
        "slots": (),
        "write_indices": (),
    }
    shapes |= {state.name: state.shape for state in CROSS}
    profile: dict[str, Range] = {
        name: ((1, *shape), (1, *shape), (MAX_ROWS, *shape)) for name, shape in shapes.items()
    }
    return _named(WhisperProgram(exported, ("hidden",), CROSS, (profile,)))


def decoder_program(whisper: WhisperForConditionalGeneration) -> WhisperProgram:
    rows: Any = Dim("rows", min=1, max=MAX_ROWS)
    tokens, slots = {0: Dim("tokens", min=1, max=MAX_ROWS * CHUNK)}, {0: Dim("slots", min=1)}
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    ids, at = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    each = torch.zeros(2, dtype=torch.int32)
    with torch.no_grad(), size_oblivious():
        exported = torch.export.export(
            Decoder(whisper),
            (
                ids,
                at,
                offsets,
                offsets[1:] - 1,
                torch.arange(2, dtype=torch.int32),
                each,
                each + POSITIONS,
                _arena(CROSS),
                _arena(SELF),
            ),
            dynamic_shapes=(
                *(tokens, tokens, {0: rows + 1}, {0: rows}, {0: rows}, {0: rows}, {0: rows}),
                *([slots] * len(CROSS), [slots] * len(SELF)),
            ),
        )

    def profile(rows: tuple[int, int, int], tokens: tuple[int, int, int]) -> dict[str, Range]:
        def three(shapes: list[tuple[int, ...]]) -> Range:
            return shapes[0], shapes[1], shapes[2]

        ranges = {name: three([(n,) for n in tokens]) for name in ("input_ids", "positions")}
        ranges |= {
            name: three([(n,) for n in rows])
            for name in ("last_tokens", "slots", "write_indices", "encoded")
        }
        ranges["row_offsets"] = three([(n + 1,) for n in rows])
        return ranges | {
            state.name: three([(n, *state.shape) for n in rows]) for state in (*CROSS, *SELF)
        }

    decode, prefill = (
        profile((1, 1, MAX_ROWS), (1, 1, MAX_ROWS)),
        profile((1, 1, 1), (1, 4, CHUNK)),
    )
    return _named(WhisperProgram(exported, ("next_token",), (*CROSS, *SELF), (decode, prefill)))


def _named(program: WhisperProgram) -> WhisperProgram:
    """Rename the placeholders of the states as in their descriptions.

    Lists of tensors export as ``cross_0`` and so on.
    """
    count = len(program.states)
    signature = program.exported.graph_signature
    names = list(signature.user_inputs)[-count:]
    for old, state in zip(names, program.states, strict=True):
        node = next(node for node in program.exported.graph.nodes if node.name == old)
        node._rename(state.name)
        signature.replace_all_uses(str(old), state.name)
    return program


Run = Callable[[dict[str, Tensor], int], dict[str, Tensor]]
"""Runs a program on its inputs and states with the profile of this index.

Returns its outputs and the states afterwards, by name.
"""
PROMPT, TOKENS, SEQUENCES = [START, 7, 11, 5], 32, 2


def transformers_tokens(
    whisper: WhisperForConditionalGeneration, features: Tensor
) -> list[list[int]]:
    """transformers' greedy tokens after the prompt, from whole forward passes."""
    ids = torch.tensor([PROMPT] * len(features))
    with torch.no_grad():
        for _ in range(TOKENS):
            logits = whisper(input_features=features, decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    expected: list[list[int]] = ids[:, len(PROMPT) :].tolist()
    return expected


def program_tokens(encode: Run, decode: Run, features: Tensor) -> list[list[int]]:
    """The same tokens from two programs, as a runtime calls them.

    All rows are encoded, then prompts are fed one row at a time, then all rows step together.
    """
    rows = len(features)
    controls = {
        "slots": torch.arange(rows, dtype=torch.int32),
        "write_indices": torch.zeros(rows, dtype=torch.int32),
    }
    empty = {state.name: torch.full((rows, *state.shape), float("nan")) for state in CROSS}
    encoded = encode({"features": features, **controls} | empty, 0)
    cross = {name: encoded[name] for name in empty}
    sequences: list[list[int]] = []
    parts: list[dict[str, Tensor]] = []
    for row in range(rows):
        memory = {name: x[row : row + 1] for name, x in cross.items()}
        memory |= {state.name: torch.full((1, *state.shape), float("nan")) for state in SELF}
        tokens, memory = _decoded(decode, [PROMPT], 0, memory, 1)
        sequences.append(tokens)
        parts.append(memory)
    memory = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for step in range(TOKENS - 1):
        tokens, memory = _decoded(
            decode, [[tokens[-1]] for tokens in sequences], len(PROMPT) + step, memory, 0
        )
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
    return sequences


def _decoded(
    run: Run, ids: list[list[int]], at: int, memory: dict[str, Tensor], profile: int
) -> tuple[list[int], dict[str, Tensor]]:
    """A decoder step of rows at the same position: their next tokens, and the states afterwards."""
    rows, each = len(ids), len(ids[0])
    offsets = torch.arange(rows + 1, dtype=torch.int32) * each
    inputs = {
        "input_ids": torch.tensor(ids).flatten(),
        "positions": (torch.arange(each, dtype=torch.int32) + at).repeat(rows),
        "row_offsets": offsets,
        "last_tokens": offsets[1:] - 1,
        "slots": torch.arange(rows, dtype=torch.int32),
        "write_indices": torch.full((rows,), at, dtype=torch.int32),
        "encoded": torch.full((rows,), POSITIONS, dtype=torch.int32),
    }
    outputs = run(inputs | memory, profile)
    tokens: list[int] = outputs["next_token"].flatten().tolist()
    return tokens, memory | {name: outputs[name] for name in memory if name in outputs}
