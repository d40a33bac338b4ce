"""Frontend for Hugging Face decoders, through transformers' own extension points: a cache class and an attention function.

The model's code runs unchanged. Its keys and values pass through `SlotCache.update`, its attention through `slot_attention`, which
calls ``inplace::attention`` on the layer's states. Everything else in a decoder works token by token, so the tokens of all rows
are packed behind one another on one axis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from inplace.dtypes import Dtype
from inplace.manifest import Program
from inplace.operators import sample
from inplace.specs import SAMPLING_ROLES, Role, StateSpec, TensorSpec, Update
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from inplace_builder.capture.capture import Capture, any_size, control, described
from inplace_builder.capture.loading import quiet
from inplace_builder.capture.slot_attention import IMPLEMENTATION, SlotCache, current_cache
from inplace_builder.errors import BuildError, brief


@dataclass(frozen=True)
class DecoderOptions:
    """What a decoder is built for.

    Attributes:
        capacity: positions a sequence may hold.
        max_rows: most sequences in one step.
        chunk: most tokens of one sequence in one step.
        max_tokens: most tokens of one step; None is as many as rows and chunk allow.
    """

    capacity: int
    max_rows: int
    chunk: int
    max_tokens: int | None = None


class DecoderStep(torch.nn.Module):
    """One step of a decoder over packed rows. The names of its arguments become those of the graph's inputs."""

    def __init__(self, model: PreTrainedModel, rings: Sequence[bool]) -> None:
        super().__init__()
        self.model = model
        self.rings = rings

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
        key_states: list[Tensor],
        value_states: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Token ids ``[tokens]`` to each row's next token ``[rows, 1]``, chosen by `sample`, and float32 logits ``[rows, vocabulary]``."""
        cache = SlotCache(key_states, value_states, slots, row_offsets, write_indices, self.rings)
        token = current_cache.set(cache)
        try:
            out = self.model(
                input_ids=input_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last_tokens,
            )
        finally:
            current_cache.reset(token)
        logits = out.logits[0].float()
        return sample(logits, temperature, top_k, top_p, seed, next_positions), logits


def capture_decoder(model: PreTrainedModel, options: DecoderOptions) -> Capture:
    """Export one step of a decoder over packed rows.

    Raises:
        BuildError: the model does something that the operators do not have.
    """
    config = model.config.get_text_config(decoder=True)
    _check_positions(config, options)
    states, rings = _states(config, model.dtype, options)
    original = model.config._attn_implementation
    keys, values = states[: len(states) // 2], states[len(states) // 2 :]
    tensors = _Examples(options, [_empty(spec) for spec in keys], [_empty(spec) for spec in values])
    with quiet():
        model.set_attn_implementation(IMPLEMENTATION)
    try:
        _check_interface(model)
        with quiet(), torch.no_grad(), any_size():
            exported = torch.export.export(DecoderStep(model, rings), tensors.arguments(), dynamic_shapes=tensors.dynamic_shapes())
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(f"torch.export cannot capture {type(model).__name__}: {brief(error)}") from error
    finally:
        with quiet():
            model.set_attn_implementation(original)
    _check_layers(exported.graph, len(keys), type(model).__name__)
    description = Program(
        name="step",
        row_layout="packed",
        inputs=(
            TensorSpec(name="input_ids", role=Role.TOKENS, dtype=Dtype.INT64, shape=(-1,), minimum=0, maximum=config.vocab_size - 1),
            control("positions", Role.POSITIONS),
            control("row_offsets", Role.ROW_OFFSETS),
            control("last_tokens", Role.LAST_TOKENS),
            control("slots", Role.SLOTS),
            control("write_indices", Role.WRITE_INDICES),
            *(control(role.value, role) for role in SAMPLING_ROLES),
        ),
        outputs=(
            TensorSpec(name="next_token", role=Role.ROW, dtype=Dtype.INT64, shape=(1,), sampled_from="logits"),
            TensorSpec(name="logits", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(config.vocab_size,), on_request=True),
        ),
        aliases=(),
        max_rows=options.max_rows,
        chunk=options.chunk,
        max_tokens=options.max_tokens,
    )
    program, lowering = described(exported, description, states)

    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.cat([request["input_ids"] for request in requests]).to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()
        return {"next_token": logits.argmax(-1, keepdim=True), "logits": logits}

    return Capture(exported, program, states, options.capacity, Dtype.of(model.dtype), lowering, reference)


@dataclass(frozen=True)
class _Examples:
    """Example arguments of a `DecoderStep`: two rows of two tokens, and which extents vary.

    The number of rows varies in the graph even where a batch has one row only: the runtime pads steps with null rows, verification
    steps more slots than a server may, and where row r is slot r the rows are as many as the slots of the arena.
    """

    options: DecoderOptions
    key_states: list[Tensor]
    value_states: list[Tensor]

    def arguments(self) -> tuple[Any, ...]:
        offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
        return (
            torch.zeros(4, dtype=torch.int64),
            torch.tensor([0, 1, 0, 1], dtype=torch.int32),
            offsets,
            offsets[1:] - 1,
            torch.arange(2, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
            *(torch.zeros(2, dtype=control("", role).dtype.as_torch) for role in SAMPLING_ROLES),
            self.key_states,
            self.value_states,
        )

    def dynamic_shapes(self) -> tuple[Any, ...]:
        most = max(2, self.options.max_rows)
        tokens = {0: Dim("tokens", min=1, max=max(2 * most, most * self.options.chunk))}
        count = Dim("rows", min=1, max=most)
        rows: Any = {0: count}
        arena = [{0: Dim("slots", min=1)}] * len(self.key_states)
        return (tokens, tokens, {0: count + 1}, rows, rows, rows, *[rows] * len(SAMPLING_ROLES), arena, arena)


def _states(config: transformers.PretrainedConfig, dtype: torch.dtype, options: DecoderOptions) -> tuple[tuple[StateSpec, ...], list[bool]]:
    """The key and value states of each layer, and which are rings.

    A layer with a sliding window shorter than the capacity needs only the window and the rest of a chunk: a token must still see
    its whole window when the last token of its chunk has been appended.
    """
    if getattr(config, "num_attention_heads", None) is None or getattr(config, "num_hidden_layers", None) is None:
        raise BuildError(f"a {config.model_type!r} model has no attention heads; only decoders with a key-value cache are supported")
    layers: int = config.num_hidden_layers
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * layers
    if odd := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise BuildError(f"the model has layers of the kind {odd}; only full_attention and sliding_attention are supported")
    rings, lengths = [], []
    for kind in types:
        ring_length = (window or 0) + options.chunk - 1
        ring = kind == "sliding_attention" and bool(window) and ring_length < options.capacity
        rings.append(ring)
        lengths.append(ring_length if ring else options.capacity)
    states = tuple(
        StateSpec(
            name=f"{part}_states_{layer}",
            shape=(heads, lengths[layer], dim),
            dtype=Dtype.of(dtype),
            update=Update.RING if rings[layer] else Update.APPEND,
            axis=1,
            reset=False,  # attention reads only what lies within the cached length
        )
        for part in ("key", "value")
        for layer in range(layers)
    )
    return states, rings


def _empty(spec: StateSpec) -> Tensor:
    """An example state; never touched, so it costs address space only."""
    return torch.empty((2, *spec.shape), dtype=spec.dtype.as_torch)


def _check_positions(config: transformers.PretrainedConfig, options: DecoderOptions) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and options.capacity > longest:
        raise BuildError(
            f"a capacity of {options.capacity} is more than the {longest} positions this model was made for; choose at most {longest}"
        )


def _check_interface(model: PreTrainedModel) -> None:
    """Transformers leaves a model whose attention is code of its own as it was, and says so in a log message only."""
    if model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
        raise BuildError(
            f"{type(model).__name__} does not attend through transformers' attention interface, so its keys and values cannot be found; "
            f"choose one that does, such as Llama, Mistral, Qwen, Gemma or GPT-2"
        )


def _check_layers(graph: torch.fx.Graph, layers: int, kind: str) -> None:
    count = sum(node.target is torch.ops.inplace.attention.default for node in graph.nodes)
    if count != layers:
        raise BuildError(f"{kind} has {layers} layers, but {count} of them attend through transformers' attention interface")
