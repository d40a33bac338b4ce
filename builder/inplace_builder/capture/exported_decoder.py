"""Frontend for decoders as torch.export has them: one sequence and a static cache in, an engine over packed rows out.

`transformers.integrations.executorch` exports decoders this way, and so do models of other libraries. The graph says one sequence; what
is proved about it (`passes.packed`) makes it one of many.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from inplace.schema.dtypes import Dtype
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from inplace_builder.capture.capture import Capture, Reference, complete_program
from inplace_builder.capture.decoder import (
    CONTROL_ROLES,
    TOKEN_IDS,
    DecoderOptions,
    LayerCache,
    StepExamples,
    cache_states,
    decoder_program,
)
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.nodes import dtype, shape
from inplace_builder.graph.reexport import (
    InterpretedModule,
    copy_module,
    rename_inputs,
    size_oblivious,
    without_unused_attributes,
)
from inplace_builder.packing.pack import pack_rows, relax_views
from inplace_builder.packing.prove import ProvenDecoder, prove_decoder
from inplace_builder.states.divide import divide_states
from inplace_builder.states.lift import (
    FunctionalGraph,
    drop_dead_assertions,
    lift_mutated_buffers,
    normalise_assignments,
)

MAX_CACHED_SEQUENCES = 3
"""Sequences of which a reference remembers the caches, beside the last."""


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

    The module takes token ids ``[1, tokens]`` (int64) and the positions of its steps, keeps keys and values in caches ``[1, kv_heads,
    capacity, dim]``, inputs or buffers that it writes (one of each layer, or parts of one tensor, ``cache[layer]``), and returns scores
    ``[1, tokens, vocabulary]``, or those of the last token; ``tokens`` is 1 or dynamic; the engine takes chunks of several tokens in both
    cases. What it mutates beside caches may only say where a step starts, and the program has none of it: the runtime says for each row
    where it writes.

    Args:
        module: the module, or ``torch.export.export`` of it.
        options: what to build for; its capacity is at most that of the module's caches. A layer that attends in a window keeps
            ``window + chunk - 1`` positions where that is less.
        example_inputs: positional arguments of the module, as for torch.export.
        dynamic_shapes: as for ``torch.export.export``.
        kwargs: keyword arguments of the module.
        assume_consecutive: integer inputs ``[tokens]`` that are always consecutive positions: the caller's promise.

    Returns:
        What `capture_decoder` returns for a Hugging Face model: the same inputs, outputs and roles, for every engine and the server.

    Raises:
        BuildError: torch.export cannot capture the module, or it is not proved that tokens of several sequences may lie behind one another:
            an attention that is not causal or windowed over its own cache, an operator that mixes tokens, a state that is no cache.
    """
    found = lift_mutated_buffers(
        module, example_inputs, dynamic_shapes=dynamic_shapes, kwargs=kwargs
    )
    if unknown := sorted(set(assume_consecutive) - set(found.inputs)):
        raise BuildError(
            f"assume_consecutive names {unknown}, which are no inputs; the inputs are {list(found.inputs)}"
        )
    graph = found.graph_module.graph
    original = copy_module(found.graph_module)
    normalise_assignments(graph, found.num_outputs)
    found = replace(
        found,
        states=divide_states(
            found.graph_module, original, found.states, found.num_outputs, alignment=1
        ),
    )
    decoder = prove_decoder(
        found.graph_module, found.states, found.num_outputs, frozenset(assume_consecutive)
    )
    caches = _layer_caches(decoder, options)
    states = cache_states(caches, options)
    vocabulary, scores = decoder.vocabulary, int(shape(decoder.logits)[-1])
    reference = _reference(original, found, decoder)
    names = [TOKEN_IDS, *(role.value for role in CONTROL_ROLES)]
    packed = pack_rows(
        decoder, names, [state.name for state in states], [cache.ring(options) for cache in caches]
    )
    drop_dead_assertions(packed.graph)
    examples = StepExamples(options, states)
    arguments = (*examples.inputs(), *examples.memory())
    shapes = ((*examples.input_shapes(), *examples.memory_shapes()),)
    try:
        relax_views(packed, arguments)
        with torch.no_grad(), size_oblivious():
            exported = torch.export.export(
                InterpretedModule(without_unused_attributes(packed)),
                arguments,
                dynamic_shapes=shapes,
            )
    except Exception as error:
        raise BuildError(f"torch.export cannot capture the packed graph: {brief(error)}") from error
    rename_inputs(exported, [*names, *(state.name for state in states)])
    program, lowering = complete_program(
        exported, decoder_program(vocabulary, scores, options), states
    )
    return Capture(
        exported,
        program,
        states,
        options.capacity,
        caches[0].dtype,
        lowering,
        reference,
        options.dynamic_min_capacity,
    )


def _layer_caches(decoder: ProvenDecoder, options: DecoderOptions) -> list[LayerCache]:
    found = []
    for one in decoder.attentions:
        keys, values = shape(one.keys.base), shape(one.values.base)
        if options.capacity > keys[2]:
            raise BuildError(
                f"a capacity of {options.capacity} is more than the {keys[2]} positions of the module's caches, for which its attention "
                f"was proved; choose at most {keys[2]}, or export it with larger caches"
            )
        found.append(
            LayerCache(
                keys[1], keys[3], values[3], Dtype.of(dtype(one.keys.base)), window=one.window
            )
        )
    return found


def _reference(module: GraphModule, found: FunctionalGraph, decoder: ProvenDecoder) -> Reference:
    """The module itself on one sequence, from empty caches; token by token where it takes no more."""
    start = decoder.attentions[0].start
    assert start.source is not None
    ids, source, several = decoder.ids.name, start.source.name, decoder.num_tokens != 1
    packed_axis = decoder.token_axes.axis_of[decoder.ids] if len(shape(decoder.ids)) == 2 else None
    positions = next(
        (
            value
            for name, value in zip(found.inputs, found.example_inputs, strict=True)
            if name == source
        ),
        None,
    )

    seen: list[tuple[list[int], list[Tensor]]] = []
    """What caches held after some tokens: a module of one token a step is not stepped through them again."""

    def reference(requests: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        tokens = torch.cat([request[TOKEN_IDS] for request in requests])
        before = (
            one
            for one in seen
            if len(one[0]) < len(tokens) and one[0] == tokens[: len(one[0])].tolist()
        )
        known, memory = max(
            before,
            key=lambda one: len(one[0]),
            default=([], [state.initial for state in found.states]),
        )
        scores: Any = None
        for first in range(len(known), len(tokens), len(tokens) if several else 1):
            chunk = tokens if several else tokens[first : first + 1]
            given = {ids: chunk if packed_axis is None else chunk.unsqueeze(1 - packed_axis)}
            if isinstance(positions, Tensor):
                now = first - start.offset
                given[source] = (
                    torch.arange(now, now + len(chunk), dtype=positions.dtype)
                    if several
                    else torch.full_like(positions, now)
                )
            arguments = [
                given.get(name, value)
                for name, value in zip(found.inputs, found.example_inputs, strict=True)
            ]
            with torch.no_grad():
                scores, *memory = module(*arguments, *memory)
        if not several:
            seen[:] = [*seen[-MAX_CACHED_SEQUENCES:], (tokens.tolist(), memory)]
        last = scores.reshape(-1, scores.shape[-1])[-1].float()
        return {"next_token": last.argmax(-1, keepdim=True), "logits": last}

    return reference
