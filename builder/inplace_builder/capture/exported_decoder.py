"""The front-end for exported decoders: one sequence and a static cache in, packed rows out.

`transformers.integrations.executorch` exports decoders this way, and so do other libraries. The
graph steps one sequence; what is proved about it (`inplace_builder.packing.prove`) makes it one
that steps several.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from inplace.schema.specs import Dtype
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from inplace_builder.capture.capture import Capture, complete_program
from inplace_builder.capture.decoder import (
    INPUT_NAMES,
    TOKEN_IDS,
    DecoderOptions,
    LayerCache,
    StepExamples,
    cache_states,
    decoder_program,
)
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.export import (
    InterpretedModule,
    copy_module,
    correct_lstm,
    named_extents,
    rename_inputs,
    size_oblivious,
    without_unused_attributes,
)
from inplace_builder.graph.nodes import dtype, shape
from inplace_builder.graph.passes import drop_dead_assertions, normalise_assignments
from inplace_builder.packing.pack import pack_rows, relax_views
from inplace_builder.packing.prove import ProvenDecoder, prove_decoder
from inplace_builder.states.divide import divide_states
from inplace_builder.states.lift import FunctionalGraph, lift_mutated_buffers


def capture_exported_decoder(
    module: torch.nn.Module | ExportedProgram,
    options: DecoderOptions,
    example_inputs: Sequence[Any] = (),
    *,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    assume_consecutive: Collection[str] = (),
) -> Capture:
    """Capture a decoder of one sequence for an engine that steps several, each at its own position.

    The module takes token ids ``[1, tokens]`` (int64) and the positions of its steps. It keeps keys
    and values in caches ``[1, kv_heads, capacity, dim]``: inputs or buffers that it writes, one of
    each for a layer, or parts of one tensor, ``cache[layer]``. It returns scores
    ``[1, tokens, vocab_size]``, or those of the last token. ``tokens`` is 1 or dynamic; the engine
    takes chunks of several tokens in both cases. Beside caches it may only mutate the position
    where a step starts. The program does not have it: the runtime gives each row's position.

    Args:
        module: the module, or ``torch.export.export`` of it.
        options: what to build for; its capacity is at most that of the module's caches. A layer
            that attends in a window keeps ``window + chunk - 1`` positions if that is less.
        example_inputs: positional arguments of the module, as for torch.export.
        dynamic_shapes: as for ``torch.export.export``.
        kwargs: keyword arguments of the module.
        assume_consecutive: integer inputs ``[tokens]`` that are always consecutive positions. The
            caller vouches for it; it is not checked.

    Returns:
        The same as `capture_decoder` returns for a Hugging Face model: the same inputs, outputs and
        roles, for every engine and the server.

    Raises:
        BuildError: torch.export cannot capture the module, or it is not proved that tokens of
            several sequences may be packed: an attention is not causal or windowed over its own
            cache, an operator mixes tokens, or a state is not a cache; or ``prompt_logprobs`` is
            set.
    """
    if options.prompt_logprobs:
        raise BuildError(
            "prompt_logprobs needs the scores of every token, and this front-end captures those of "
            "the last one: build a model of transformers, or leave prompt_logprobs out"
        )
    # 1. Export the module and make it a function: what it mutates goes in and comes out.
    functional = lift_mutated_buffers(
        module, example_inputs, dynamic_shapes=dynamic_shapes, kwargs=kwargs
    )
    functional.check_assumed(assume_consecutive)
    graph_module, num_outputs = functional.graph_module, functional.num_outputs
    # 2. Keep a copy as it is: the reference to verify against.
    original = copy_module(graph_module)
    # 3. Replace copies into slices by the values that are assigned.
    normalise_assignments(graph_module.graph, num_outputs)
    # 4. Divide tensors that hold the caches of several layers.
    states = divide_states(graph_module, original, functional.states, num_outputs, alignment=1)
    functional = replace(functional, states=states)
    # 5. Prove that the graph is a decoder whose tokens may be packed.
    decoder = prove_decoder(graph_module, states, num_outputs, frozenset(assume_consecutive))
    caches = _layer_caches(decoder, options)
    cache_specs = cache_states(dict(enumerate(caches)), options)
    num_scores = int(shape(decoder.logits)[-1])
    program = decoder_program(decoder.vocab_size, num_scores, options)
    reference = _SequenceReference(original, functional, decoder)
    # 6. Rewrite it to packed rows, and drop what nothing uses any more.
    packed = pack_rows(
        decoder,
        INPUT_NAMES,
        [spec.name for spec in cache_specs],
        [cache.is_ring(options) for cache in caches],
    )
    drop_dead_assertions(packed.graph)
    # 7. Export it again, with dynamic numbers of tokens, rows and slots.
    exported = _export_packed(packed, StepExamples(options, cache_specs, num_scores))
    # 8. Clean the graph, check it against the description, read off what it writes.
    program, lowering = complete_program(exported, program, cache_specs)
    return Capture(
        exported,
        program,
        cache_specs,
        options.capacity,
        caches[0].dtype,
        lowering,
        reference,
        options.dynamic_min_capacity,
    )


def _layer_caches(decoder: ProvenDecoder, options: DecoderOptions) -> list[LayerCache]:
    caches = []
    for match in decoder.attentions:
        keys, values = shape(match.keys.base), shape(match.values.base)
        if options.capacity > keys[2]:
            raise BuildError(
                f"a capacity of {options.capacity} is more than the {keys[2]} positions of the "
                f"module's caches, for which its attention was proved; choose at most {keys[2]}, "
                f"or export it with larger caches"
            )
        element_type = Dtype.of(dtype(match.keys.base))
        caches.append(LayerCache(keys[1], keys[3], values[3], element_type, reach=match.window))
    return caches


def _export_packed(packed: GraphModule, examples: StepExamples) -> ExportedProgram:
    arguments = (*examples.inputs(), *examples.memory())
    shapes = ((*examples.input_shapes(), *examples.memory_shapes()),)
    try:
        relax_views(packed, arguments)
        with torch.no_grad(), correct_lstm(), size_oblivious(), named_extents():
            exported = torch.export.export(
                InterpretedModule(without_unused_attributes(packed)),
                arguments,
                dynamic_shapes=shapes,
            )
    except Exception as error:
        raise BuildError(f"torch.export cannot capture the packed graph: {brief(error)}") from error
    rename_inputs(exported, [*INPUT_NAMES, *(spec.name for spec in examples.states)])
    return exported


MAX_CACHED_SEQUENCES = 4
"""Token sequences whose caches a reference remembers."""


class _SequenceReference:
    """The module itself on one sequence, from empty caches: a `Reference`.

    A module that takes one token a step is stepped token by token. It remembers what the caches
    held after the last sequences, so that one that continues them is not stepped from the start.

    Args:
        module: takes the inputs and the states, returns scores and the states' new values.
        functional: its inputs and states.
        decoder: what is proved about it.
    """

    def __init__(
        self, module: GraphModule, functional: FunctionalGraph, decoder: ProvenDecoder
    ) -> None:
        start = decoder.attentions[0].start
        assert start.source is not None
        self._module, self._functional = module, functional
        self._ids, self._ids_rank = decoder.ids.name, len(shape(decoder.ids))
        self._token_axis = decoder.token_axes.axis_of[decoder.ids]
        self._position_input, self._offset = start.source.name, start.offset
        self._takes_several = decoder.num_tokens != 1
        self._cached: list[tuple[list[int], list[Tensor]]] = []

    def __call__(self, requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The outputs of the last request."""
        tokens = torch.cat([request[TOKEN_IDS] for request in requests])
        if self._takes_several:
            scores, _ = self._step(tokens, 0, self._initial_states())
        else:
            scores = self._step_one_by_one(tokens)
        last = scores.reshape(-1, scores.shape[-1])[-1].float()
        return {"next_token": last.argmax(-1, keepdim=True), "logits": last}

    def _initial_states(self) -> list[Tensor]:
        return [state.initial for state in self._functional.states]

    def _step_one_by_one(self, tokens: Tensor) -> Tensor:
        prefixes = [
            (known, memory)
            for known, memory in self._cached
            if len(known) < len(tokens) and known == tokens[: len(known)].tolist()
        ]
        known, memory = max(
            prefixes, key=lambda prefix: len(prefix[0]), default=([], self._initial_states())
        )
        scores: Any = None
        for position in range(len(known), len(tokens)):
            scores, memory = self._step(tokens[position : position + 1], position, memory)
        self._cached.append((tokens.tolist(), memory))
        del self._cached[:-MAX_CACHED_SEQUENCES]
        assert isinstance(scores, Tensor)
        return scores

    def _step(
        self, tokens: Tensor, position: int, memory: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Scores, and the new values of the states, after tokens from a position on."""
        given = {self._ids: tokens}
        if self._ids_rank == 2:
            given[self._ids] = tokens.unsqueeze(1 - self._token_axis)
        inputs = dict(zip(self._functional.inputs, self._functional.example_inputs, strict=True))
        positions = inputs.get(self._position_input)
        if isinstance(positions, Tensor):
            start = position - self._offset
            given[self._position_input] = (
                torch.arange(start, start + len(tokens), dtype=positions.dtype)
                if self._takes_several
                else torch.full_like(positions, start)
            )
        with torch.no_grad():
            scores, *memory = self._module(*(inputs | given).values(), *memory)
        return scores, memory
