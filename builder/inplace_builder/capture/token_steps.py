"""The front-end for Hugging Face decoders that only their own code can step, one token a row.

`inplace_builder.capture.huggingface` packs the tokens of all rows on one axis and computes
attention and recurrences by operators. A model that keeps other states, or attends in another way,
is captured as it steps one sequence, and made one that steps several by batching rules, as any
module is. Such an engine takes one token of each row a step, of prompts too, and attention reads
all positions of its caches.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from inplace.operators import sample_with_options
from inplace.schema.programs import Program
from inplace.schema.specs import Dtype, Role, StateSpec
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._sympy.value_ranges import ValueRanges
from transformers import PreTrainedModel

from inplace_builder.capture.capture import Capture, complete_program
from inplace_builder.capture.checkpoint import quiet
from inplace_builder.capture.decoder import (
    SAMPLING_INPUTS,
    TOKEN_IDS,
    DecoderOptions,
    StepExamples,
    decoder_program,
    prompt_logprobs,
    prompt_program,
)
from inplace_builder.capture.experts import grouped_experts
from inplace_builder.capture.exported import capture_exported
from inplace_builder.capture.exported_rows import RowOptions, RowsModule, row_spec, unused_primes
from inplace_builder.capture.model_memory import ModelMemory, positions_argument
from inplace_builder.capture.reference import eager_attention, ignores_options
from inplace_builder.compare import float32_copy
from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.export import (
    InterpretedModule,
    correct_lstm,
    export_module,
    named_extents,
    rename_inputs,
    size_oblivious,
)
from inplace_builder.graph.nodes import placeholders_by_name, value
from inplace_builder.packing.rows import make_rows_dynamic

POSITION = "position"
"""The name of the input of `SequenceStep` that counts the tokens so far."""


CHECKED_TOKENS = 48
"""Tokens that a model's steps are compared for with its forward over all of them."""


MAX_DIFFERENCE = 1e-4
"""Largest difference of scores in float32, relative to the largest score."""


def capture_token_steps(
    model: PreTrainedModel, options: DecoderOptions, references: Mapping[str, Any], reason: str
) -> Capture:
    """Capture a decoder whose engine takes one token of each row a step.

    Args:
        model: a causal language model of transformers.
        options: what to build for; chunks are of one token.
        references: the fields of the capture that say what it is verified against.
        reason: why it is not captured in another way; recorded.

    Raises:
        BuildError: the model keeps nothing between two tokens, or tensors that grow; its steps
            give another result than its forward; an operator cannot be run for several rows; or
            the capacity is to be chosen at load.
    """
    if options.dynamic_min_capacity is not None:
        raise BuildError("the capacity of its own caches is fixed; build without a smallest one")
    options = replace(
        options,
        chunk=1,
        max_tokens=min(options.max_tokens or options.max_rows, options.max_rows),
        min_capacity=None,
    )
    # 1. Check that the model may be stepped token by token, without its rounding.
    rounds = model.dtype in (torch.float16, torch.bfloat16)
    _check_steps(float32_copy(model) if rounds else model, options.capacity)
    # 2. Capture one token of one sequence.
    with quiet(), eager_attention(model), grouped_experts(model):
        step = SequenceStep(model, options.capacity)
        # exported here: its states are its buffers, none is among what the model's own objects keep
        captured = capture_exported(
            export_module(step, (step.token(0), step.position(0)), None, None)
        )
    # 3. Run every operator for many rows, and export that with a decoder's inputs.
    row_options = RowOptions(options.max_rows, positions=POSITION, outputs=("logits",))
    states = tuple(row_spec(state, row_options) for state in captured.states)
    rows = RowsModule(captured, row_options)
    example = unused_primes(captured.graph_module)
    batched = rows.graph_over_rows(states, example)
    make_rows_dynamic(batched, example[0])
    num_scores = rows.outputs[0].shape[-1]
    described = [
        decoder_program(model.config.get_text_config(decoder=True).vocab_size, num_scores, options)
    ]
    if options.prompt_logprobs:
        described.append(prompt_program(described[0], num_scores))
    all_exported = [_export(batched, options, states, each) for each in described]
    # 4. Clean the graph, check it against the description, read off what it writes.
    completed = [
        (exported, *complete_program(exported, program, states))
        for exported, program in zip(all_exported, described, strict=True)
    ]
    initial = {
        spec.name: state.bound_initial()[0]
        for spec, state in zip(states, captured.states, strict=True)
        if spec.initial is not None
    }
    captures = [
        Capture(
            exported,
            program,
            states,
            options.capacity,
            Dtype.of(model.dtype),
            lowering,
            initial=initial,
            **references,
            notes={"capture": f"one token of each row a step, in the model's own code: {reason}"},
        )
        for exported, program, lowering in completed
    ]
    return replace(captures[0], prompt_logprobs=next(iter(captures[1:]), None))


class SequenceStep(torch.nn.Module):
    """One token of one sequence, in the model's own code; the states are its buffers.

    Args:
        model: the model.
        capacity: maximum number of positions of a sequence.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        super().__init__()
        self.model = model
        self.memory = ModelMemory.of(model, capacity)
        self.parameter_names = inspect.signature(model.forward).parameters
        for place, initial in zip(self.memory.states, self.memory.initial, strict=True):
            self.register_buffer(place.name, initial.clone(), persistent=False)

    def states(self) -> list[Tensor]:
        """The states, in the order of the memory's."""
        return [getattr(self, place.name) for place in self.memory.states]

    def token(self, number: int) -> Tensor:
        """A token id, as `forward` takes it."""
        return self.position(number)[None]

    def position(self, number: int) -> Tensor:
        """A number of tokens, as `forward` takes it."""
        return torch.tensor([number], device=self.model.device)

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """From a token id ``[1, 1]`` at a position ``[1]`` to scores ``[1, vocab_size]``."""
        memory, states = self.memory, self.states()
        memory.put(states, position)
        out = self.model(
            input_ids=input_ids,
            use_cache=True,
            **{memory.argument: memory.object},
            **positions_argument(self.parameter_names, position),
        )
        for place, state in zip(memory.states, states, strict=True):
            new = place.get()
            if new is not state:
                state.copy_(new)
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _check_steps(model: PreTrainedModel, capacity: int) -> None:
    """Check that steps of one token have the scores of the forward over all of them.

    Args:
        model: the model in float32; its forward attends as the reference does.
        capacity: maximum number of positions of a sequence.

    Raises:
        BuildError: they differ, or the model cannot run.
    """
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config(decoder=True)
    count = min(capacity, CHECKED_TOKENS)
    ids = torch.randint(0, config.vocab_size, (1, count), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and 0 <= padding < config.vocab_size:
        ids[0, count // 4] = padding  # positions of some models skip it
    try:
        eager = ignores_options(model)
        with quiet(), torch.no_grad():
            with eager_attention(model) if eager else nullcontext():
                expected = model(ids.to(model.device), use_cache=False).logits[0]
            with eager_attention(model):
                step = SequenceStep(model, capacity)
                steps = [
                    step(step.token(token), step.position(at))
                    for at, token in enumerate(ids[0].tolist())
                ]
    except BuildError:
        raise
    except Exception as error:
        raise BuildError(
            f"{name} cannot run token by token with states of fixed size: {brief(error)}"
        ) from error
    differences = (torch.cat(steps) - expected).abs().amax(-1) / expected.abs().max()
    wrong = ~(differences <= MAX_DIFFERENCE)  # True for NaN
    if bool(wrong.any()):
        raise BuildError(
            f"{name} gives other scores token by token than for all tokens at once, from position "
            f"{int(wrong.int().argmax())} on: a token depends on later ones, or on their number"
        )


class _PackedStep(torch.nn.Module):
    """The packed inputs of a decoder's step, of which each row has one token."""

    def __init__(self, body: GraphModule) -> None:
        super().__init__()
        self.body = InterpretedModule(body)

    def forward(self, inputs: dict[str, Tensor], states: list[Tensor]) -> tuple[Tensor, ...]:
        """From the program's inputs and states to its outputs."""
        ids = inputs[TOKEN_IDS].index_select(0, inputs[Role.LAST_TOKENS]).unsqueeze(1)
        positions = inputs[Role.WRITE_INDICES].to(torch.int64)
        (logits,) = self.body(ids, positions, inputs[Role.SLOTS], *states)
        token, *logprobs = sample_with_options(logits, *(inputs[role] for role in SAMPLING_INPUTS))
        if Role.FOLLOWING_TOKENS not in inputs:
            return token, logits, *logprobs
        following = inputs[Role.FOLLOWING_TOKENS].index_select(0, inputs[Role.LAST_TOKENS])
        return token, logits, *logprobs, *prompt_logprobs(logits, following)


def _export(
    batched: GraphModule, options: DecoderOptions, states: tuple[StateSpec, ...], program: Program
) -> ExportedProgram:
    """Export the graph over rows as a program, with packed inputs."""
    names = [spec.name for spec in program.inputs]
    scores_prompt = Role.FOLLOWING_TOKENS in names
    # from 2 rows: torch's own bookkeeping of strides tells 1 apart, which changes no operator
    sizes = replace(options, max_rows=max(3, options.max_rows))
    examples = StepExamples(sizes, states, program.vocab_size, scores_prompt)
    input_shapes = dict(zip(names, examples.input_shapes(min_rows=2), strict=True))
    shapes = (input_shapes, examples.memory_shapes())
    arguments = (dict(zip(names, examples.inputs(), strict=True)), examples.memory())
    try:
        with torch.no_grad(), correct_lstm(), size_oblivious(), named_extents():
            exported = torch.export.export(_PackedStep(batched), arguments, dynamic_shapes=shapes)
    except Exception as error:
        raise BuildError(f"torch.export cannot make rows of the model: {brief(error)}") from error
    rename_inputs(exported, [*names, *(spec.name for spec in states)])
    slots = placeholders_by_name(exported.graph)[Role.SLOTS.value]
    symbol = value(slots).shape[0].node.expr
    exported.range_constraints[symbol] = ValueRanges(1, max(2, options.max_rows))
    return exported
