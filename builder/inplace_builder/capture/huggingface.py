"""Frontend for Hugging Face decoders, through transformers' own extension points: a cache class and an attention function.

The model's code runs unchanged. Its keys and values pass through `SlotCache.update`, its attention through `slot_attention`, which
calls ``inplace::attention`` on the layer's states. Everything else in a decoder works token by token, so the tokens of all rows
are packed behind one another on one axis.
"""

from collections.abc import Mapping, Sequence

import torch
import transformers
from inplace.dtypes import Dtype
from inplace.operators import sample
from inplace.specs import StateSpec
from torch import Tensor
from transformers import PreTrainedModel

from inplace_builder.capture.capture import Capture, Reference, any_size, described
from inplace_builder.capture.decoder import Cache, DecoderOptions, StepExamples, cache_states, decoder_program
from inplace_builder.capture.loading import quiet
from inplace_builder.capture.placing import in_float32
from inplace_builder.capture.slot_attention import IMPLEMENTATION, SlotCache, current_cache
from inplace_builder.errors import BuildError, brief


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
    layers = len(rings)
    examples = StepExamples(options, states)
    memory, shapes = examples.memory(), examples.memory_shapes()
    with quiet():
        model.set_attn_implementation(IMPLEMENTATION)
    try:
        _check_interface(model)
        with quiet(), torch.no_grad(), any_size():
            exported = torch.export.export(
                DecoderStep(model, rings),
                (*examples.inputs(), memory[:layers], memory[layers:]),
                dynamic_shapes=(*examples.input_shapes(), shapes[:layers], shapes[layers:]),
            )
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(f"torch.export cannot capture {type(model).__name__}: {brief(error)}") from error
    finally:
        with quiet():
            model.set_attn_implementation(original)
    _check_layers(exported.graph, layers, type(model).__name__)
    description = decoder_program(config.vocab_size, config.vocab_size, options)
    program, lowering = described(exported, description, states)
    rounded = model.dtype in (torch.float16, torch.bfloat16)
    return Capture(
        exported=exported,
        program=program,
        states=states,
        capacity=options.capacity,
        dtype=Dtype.of(model.dtype),
        lowering=lowering,
        reference=_reference(model),
        min_capacity=options.range_from,
        precise=(lambda: _reference(in_float32(model))) if rounded else None,
    )


def _reference(model: PreTrainedModel) -> Reference:
    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        ids = torch.cat([request["input_ids"] for request in requests]).to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()
        return {"next_token": logits.argmax(-1, keepdim=True), "logits": logits}

    return reference


def _states(config: transformers.PretrainedConfig, dtype: torch.dtype, options: DecoderOptions) -> tuple[tuple[StateSpec, ...], list[bool]]:
    """The key and value states of each layer, and which are rings."""
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
    caches = [Cache(heads, dim, dim, Dtype.of(dtype), window=window if kind == "sliding_attention" and window else 0) for kind in types]
    return cache_states(caches, options), [cache.ring(options) for cache in caches]


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
