"""What plugins do, without TensorRT: shapes, types, aliases, scratch memory and kernel launches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import torch

from inplace.kernels.attention import AttentionSpec, attention, attention_locks, attention_workspace
from inplace.kernels.grouped_linear import (
    GroupedLinearSpec,
    grouped_linear,
    grouped_linear_workspace,
    weighted_sum,
)
from inplace.kernels.gumbel import MAX_LOGPROBS
from inplace.kernels.linear import LinearSpec, linear, linear_workspace, rms_norm
from inplace.kernels.memory import Pointer
from inplace.kernels.sample import (
    SampleOptions,
    adjusted_workspace,
    argmax,
    argmax_workspace,
    candidates_workspace,
    sample,
    sample_workspace,
)
from inplace.kernels.update import UpdateSpec, update
from inplace.operators import ACTIVATIONS
from inplace.operators.float8 import FLOAT8
from inplace.plugins.plugin import FLOATS, Launch, Operation, Shape, num_tokens, register


@register
@dataclass(frozen=True)
class LinearOperation(Operation):
    """``inplace::linear``. Inputs: x, weight, then those of bias, norm and residual that exist.

    If ``scaled``, weights are 8-bit floats, four in a word of 32 bits, because not every TensorRT
    hands 8-bit floats to a plugin: ``[outputs, inputs / 4]``; their scales are the last input.
    """

    name: ClassVar[str] = "InplaceLinear"

    inputs: int
    outputs: int
    bias: bool = False
    norm: bool = False
    residual: bool = False
    eps: float = 0.0
    activation: str = field(default="none", metadata={"choices": ACTIVATIONS})
    gated: bool = False
    float_out: bool = False
    scaled: bool = False
    scale_group: int = 0
    activation_rows: int = 0

    @property
    def input_count(self) -> int:
        """X, weight, and the optional ones that exist."""
        return 2 + self.bias + self.norm + self.residual + self.scaled

    @property
    def spec(self) -> LinearSpec:
        """The properties that the kernels need."""
        return LinearSpec(
            self.inputs,
            self.outputs,
            self.bias,
            self.norm,
            self.residual,
            self.eps,
            self.activation,
            self.gated,
            self.float_out,
            self.scaled,
            self.scale_group,
            self.activation_rows,
        )

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """All have x's dtype, but norm, float32 results, and words and scales of 8-bit weights."""
        dtype = dtypes[position]
        if self.scaled and position == 1:
            return dtype is torch.int32
        if self.scaled and position == self.input_count - 1:
            return dtype is torch.float32
        if position == 2 + self.bias and self.norm:
            return dtype in FLOATS
        if position == self.input_count and self.float_out:
            return dtype is torch.float32
        return dtype in FLOATS and dtype is dtypes[0]

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """X's dtype, or float32."""
        return [torch.float32 if self.float_out else inputs[0]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """X's shape with another last extent."""
        return [[*inputs[0][:-1], self.spec.width]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """What `inplace.kernels.linear.linear` needs for many rows."""
        return linear_workspace(self.spec, num_tokens(shapes[0]), dtypes[0].itemsize)

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.linear.linear`."""
        optional = iter(call.inputs[2:])
        weight = call.inputs[1]
        linear(
            self.spec,
            x=call.inputs[0],
            weight=Pointer(weight.address, FLOAT8) if self.scaled else weight,
            bias=next(optional) if self.bias else None,
            norm=next(optional) if self.norm else None,
            residual=next(optional) if self.residual else None,
            scale=next(optional) if self.scaled else None,
            out=call.outputs[0],
            workspace=call.workspace,
            tokens=num_tokens(call.shapes[0]),
            pdl=call.pdl,
        )


@register
@dataclass(frozen=True)
class GroupedLinearOperation(Operation):
    """``inplace::grouped_linear``. Inputs: x, expert ids, weight, and the bias if there is one.

    If ``scaled``, weights are 8-bit floats as words, as of `LinearOperation`; their scales are the
    last input.
    """

    name: ClassVar[str] = "InplaceGroupedLinear"

    inputs: int
    outputs: int
    experts: int
    bias: bool = False
    transposed: bool = False
    activation: str = field(default="none", metadata={"choices": ACTIVATIONS})
    gated: bool = False
    scaled: bool = False

    @property
    def input_count(self) -> int:
        """X, expert ids, weight, and bias and scales if there are such."""
        return 3 + self.bias + self.scaled

    @property
    def spec(self) -> GroupedLinearSpec:
        """The properties that the kernels need."""
        return GroupedLinearSpec(
            self.inputs,
            self.outputs,
            self.experts,
            self.bias,
            self.transposed,
            self.activation,
            self.gated,
            self.scaled,
        )

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Ids are integers; all have x's dtype, but words and scales of 8-bit weights."""
        if position == 1:
            return dtypes[1] in (torch.int32, torch.int64)
        if self.scaled and position == 2:
            return dtypes[2] is torch.int32
        if self.scaled and position == self.input_count - 1:
            return dtypes[position] is torch.float32
        return dtypes[position] in FLOATS and dtypes[position] is dtypes[0]

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """X's."""
        return [inputs[0]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """A vector for each id."""
        return [[*inputs[1], self.spec.width]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The pairs sorted by expert, where there are many."""
        return grouped_linear_workspace(self.spec, prod(shapes[1]))

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.grouped_linear.grouped_linear`."""
        tokens, experts_per_token = call.shapes[1]
        weight = call.inputs[2]
        grouped_linear(
            self.spec,
            x=call.inputs[0],
            expert_ids=call.inputs[1],
            weight=Pointer(weight.address, FLOAT8) if self.scaled else weight,
            bias=call.inputs[3] if self.bias else None,
            scale=call.inputs[3 + self.bias] if self.scaled else None,
            out=call.outputs[0],
            workspace=Pointer(call.workspace, torch.int32),
            tokens=tokens,
            experts_per_token=experts_per_token,
            shared=len(call.shapes[0]) == 2,
            pdl=call.pdl,
        )


class _WeightedOperation(Operation):
    """An operation on x and weights, whose result has x's type."""

    @property
    def input_count(self) -> int:
        """X and the weights."""
        return 2

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """The result has x's dtype; the weights may have any."""
        return dtypes[position] in FLOATS and (position != 2 or dtypes[2] is dtypes[0])

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """X's."""
        return [inputs[0]]


@register
@dataclass(frozen=True)
class WeightedSumOperation(_WeightedOperation):
    """``inplace::weighted_sum``. Inputs: x, weights."""

    name: ClassVar[str] = "InplaceWeightedSum"

    width: int

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """A vector for each token."""
        return [[inputs[0][0], self.width]]

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.grouped_linear.weighted_sum`."""
        x, weights = call.inputs
        tokens, per_token, _ = call.shapes[0]
        weighted_sum(
            x=x,
            weights=weights,
            out=call.outputs[0],
            tokens=tokens,
            per_token=per_token,
            width=self.width,
            pdl=call.pdl,
        )


@register
@dataclass(frozen=True)
class RmsNormOperation(_WeightedOperation):
    """``inplace::rms_norm``. Inputs: x, weight."""

    name: ClassVar[str] = "InplaceRmsNorm"

    width: int
    eps: float

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """X's."""
        return [list(inputs[0])]

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.linear.rms_norm`."""
        x, weight = call.inputs
        rms_norm(
            x=x,
            weight=weight,
            out=call.outputs[0],
            tokens=num_tokens(call.shapes[0]),
            width=self.width,
            eps=self.eps,
            pdl=call.pdl,
        )


@register
@dataclass(frozen=True)
class AttentionOperation(Operation):
    """``inplace::attention``, ``inplace::qkv_attention`` and ``inplace::rotary_attention``.

    Inputs: query, key, value (one tensor with all three if ``merged``; the query alone without
    ``append``); cos and sin if ``rotary``; the key state and the value state; slots, row_offsets,
    write_indices; sinks if ``sinks``; a bias if ``bias_heads``; the scales of keys and of values if
    ``quantized``; then ``readers`` results of earlier reads of the states. The last make TensorRT
    run those reads first. Outputs: the attention's, and the two states. If ``latent``, there is
    neither a value nor a value state.

    If ``quantized``, states are 8-bit floats, four in a word of 32 bits, because not every TensorRT
    hands 8-bit floats to a plugin: ``[slots, kv_heads, capacity, dim / 4]``.

    ``settled``: no earlier layer of the network writes slots, write indices or the states.
    """

    name: ClassVar[str] = "InplaceAttention"

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    scale: float
    max_rows: int
    append: bool = True
    causal: bool = True
    window: int = 0
    ring: bool = False
    softcap: float = 0.0
    rotary: int = 0
    sinks: bool = False
    attention_chunk: int = 0
    bias_heads: int = 0
    latent: bool = False
    quantized: bool = False
    merged: bool = False
    settled: bool = False
    readers: int = 0

    @property
    def projections(self) -> int:
        """How many inputs have queries, keys and values."""
        return 1 if self.merged or not self.append else 3 - self.latent

    @property
    def num_states(self) -> int:
        """How many of the inputs are states."""
        return 2 - self.latent

    @property
    def first_row(self) -> int:
        """The index of the slots among the inputs; row offsets and write indices come next."""
        return self.first_state + self.num_states

    @property
    def first_state(self) -> int:
        """The index of the key state among the inputs."""
        return self.projections + (2 if self.rotary else 0)

    @property
    def input_count(self) -> int:
        """Projections, cos and sin, states, row descriptions, terms, results of reads."""
        return self.first_row + 3 + self.num_terms + self.readers

    @property
    def num_terms(self) -> int:
        """How many of sinks, bias and the two scales there are."""
        return self.sinks + (self.bias_heads > 0) + 2 * self.quantized

    @property
    def aliases(self) -> Mapping[int, int]:  # type: ignore[override]
        """With ``append``, the outputs from 1 on are the states."""
        return {
            index + 1: self.first_state + index for index in range(self.num_states * self.append)
        }

    @property
    def spec(self) -> AttentionSpec:
        """The properties that the kernels need."""
        return AttentionSpec(
            heads=self.heads,
            kv_heads=self.kv_heads,
            dim=self.dim,
            value_dim=self.value_dim,
            scale=self.scale,
            append=self.append,
            causal=self.causal,
            window=self.window,
            ring=self.ring,
            softcap=self.softcap,
            rotary=self.rotary,
            sinks=self.sinks,
            attention_chunk=self.attention_chunk,
            bias_heads=self.bias_heads,
            latent=self.latent,
            quantized=self.quantized,
        )

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Row descriptions and words are int32, sinks and bias floating, scales float32.

        Reads may have any type, all others have the query's.
        """
        end = self.first_row + 3
        is_state = self.first_state <= position < self.first_row or position > self.input_count
        if self.first_row <= position < end or (self.quantized and is_state):
            return dtypes[position] is torch.int32
        if end <= position < end + self.num_terms:
            is_scale = self.quantized and position >= end + self.num_terms - 2
            return dtypes[position] in ((torch.float32,) if is_scale else FLOATS)
        return end <= position < self.input_count or (
            dtypes[position] in FLOATS and dtypes[position] is dtypes[0]
        )

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """The query's, and those of the states that are outputs."""
        return [inputs[0], *(inputs[index] for index in self.aliases.values())]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The attention's output, then the states'.

        Merged: ``[..., heads * value_dim]``; else ``[tokens, heads, value_dim]``.
        """
        query = inputs[0]
        out = (
            [*query[:-1], self.heads * self.value_dim]
            if self.merged
            else [query[0], self.heads, self.value_dim]
        )
        return [out, *(list(inputs[index]) for index in self.aliases.values())]

    def _num_tokens(self, shape: Shape) -> int:
        return num_tokens(shape) if self.merged else shape[0]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """Results of split rows, see `inplace.kernels.attention.attention_workspace`."""
        state = shapes[self.first_state]
        return attention_workspace(
            self.spec, self._num_tokens(shapes[0]), shapes[self.first_row][0], state[2]
        )

    def locks(self) -> int:
        """See `inplace.kernels.attention.attention_locks`."""
        return attention_locks(self.spec, self.max_rows)

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.attention.attention`."""
        inputs, first, rows = call.inputs, self.first_state, self.first_row
        query, key, value = inputs[0], None, None
        strides = (self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.value_dim)
        if self.merged:
            size = query.dtype.itemsize
            key = Pointer(query.address + strides[0] * size, query.dtype)
            value = Pointer(key.address + strides[1] * size, query.dtype)
            strides = (sum(strides),) * 3
        elif self.append:
            key, value = inputs[1], None if self.latent else inputs[2]
        cos, sin = inputs[first - 2 : first] if self.rotary else (None, None)
        states = inputs[first:rows]
        if self.quantized:
            states = [Pointer(state.address, FLOAT8) for state in states]
        end = rows + 3 + self.num_terms
        key_scale, value_scale = inputs[end - 2 : end] if self.quantized else (None, None)
        attention(
            self.spec,
            query=query,
            key=key,
            value=value,
            query_stride=strides[0],
            key_stride=strides[1],
            value_stride=strides[2],
            cos=cos,
            sin=sin,
            key_state=states[0],
            value_state=None if self.latent else states[1],
            capacity=call.shapes[first][2],
            slots=inputs[rows],
            row_offsets=inputs[rows + 1],
            write_indices=inputs[rows + 2],
            sinks=inputs[rows + 3] if self.sinks else None,
            bias=inputs[rows + 3 + self.sinks] if self.bias_heads else None,
            out=call.outputs[0],
            workspace=Pointer(call.workspace, torch.float32),
            locks=call.locks,
            tokens=self._num_tokens(call.shapes[0]),
            rows=call.shapes[rows][0],
            key_scale=key_scale,
            value_scale=value_scale,
            pdl=call.pdl,
            settled=self.settled,
        )


@register
@dataclass(frozen=True)
class UpdateOperation(Operation):
    """``inplace::update``.

    Inputs: state, slots, value; row_offsets if ``packed``; write_indices if ``append``; then
    ``readers`` results of earlier reads of the state, which make TensorRT run those reads first.
    Output: the state.
    """

    name: ClassVar[str] = "InplaceUpdate"
    aliases: ClassVar[Mapping[int, int]] = {0: 0}

    axis: int = 0
    append: bool = False
    packed: bool = False
    ring: bool = False
    readers: int = 0

    @property
    def input_count(self) -> int:
        """State, slots, value, and the optional ones that exist."""
        return 3 + self.packed + self.append + self.readers

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Value and output have the state's dtype; row descriptions are int32, reads any."""
        if position == 1 or 3 <= position < 3 + self.packed + self.append:
            return dtypes[position] is torch.int32
        return 3 <= position < self.input_count or dtypes[position] is dtypes[0]

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """The state's."""
        return [inputs[0]]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The state's."""
        return [list(inputs[0])]

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.update.update`."""
        state, slots, value, *optional = call.inputs
        row_descriptions = iter(optional)
        shape, entries = tuple(call.shapes[0]), tuple(call.shapes[2])
        units = entries[0]
        if self.append and not self.packed:
            units *= entries[self.axis]
        update(
            UpdateSpec.of(shape, self.axis, append=self.append, ring=self.ring),
            state=state,
            slots=slots,
            value=value,
            row_offsets=next(row_descriptions) if self.packed else None,
            write_indices=next(row_descriptions) if self.append else None,
            rows=call.shapes[1][0],
            units=units,
            pdl=call.pdl,
        )


@dataclass(frozen=True)
class NextTokenOperation(Operation):
    """An operation that chooses each row's next token, an int64 index; scores are the first input.

    Attributes:
        max_rows: most rows of a launch.
    """

    max_rows: int

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """An int64 index."""
        return [torch.int64]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One index for each row."""
        return [[inputs[0][0], 1]]

    def locks(self) -> int:
        """One for each row."""
        return self.max_rows


@register
@dataclass(frozen=True)
class ArgmaxOperation(NextTokenOperation):
    """``inplace::argmax``. Input: scores ``[rows, count]``."""

    name: ClassVar[str] = "InplaceArgmax"

    @property
    def input_count(self) -> int:
        """The scores."""
        return 1

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Floating scores, an int64 index."""
        return dtypes[position] in FLOATS if position == 0 else dtypes[position] is torch.int64

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The maxima of the splits."""
        return argmax_workspace(shapes[0][0])

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.sample.argmax`."""
        rows, count = call.shapes[0]
        argmax(
            scores=call.inputs[0],
            out=call.outputs[0],
            workspace=call.scratch(0, torch.float32),
            locks=call.locks,
            rows=rows,
            count=count,
            pdl=call.pdl,
        )


@register
@dataclass(frozen=True)
class SampleOperation(NextTokenOperation):
    """``inplace::sample``.

    Inputs: scores ``[rows, count]``; temperature, top_k, top_p, seeds and positions ``[rows]``.
    """

    name: ClassVar[str] = "InplaceSample"
    input_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        torch.float32,
        torch.float32,
        torch.int32,
        torch.float32,
        torch.int64,
        torch.int32,
    )

    @property
    def input_count(self) -> int:
        """Scores and parameters."""
        return len(self.input_dtypes)

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Each has one dtype."""
        return dtypes[position] is (*self.input_dtypes, *self.output_dtypes(()))[position]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The candidates of the splits."""
        return sample_workspace(shapes[0][0])

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.sample.sample`."""
        self._launch(call, None)

    def _launch(self, call: Launch, options: SampleOptions | None) -> None:
        rows, count = call.shapes[0]
        scores, temperature, top_k, top_p, seeds, positions = call.inputs[:6]
        sample(
            scores=scores,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=seeds,
            positions=positions,
            out=call.outputs[0],
            workspace=call.scratch(0, torch.float32),
            locks=call.locks,
            rows=rows,
            count=count,
            options=options,
            pdl=call.pdl,
        )


@register
@dataclass(frozen=True)
class SampleOptionsOperation(SampleOperation):
    """``inplace::sample.options``.

    Inputs: those of ``inplace::sample``; min_p, num_logprobs and num_adjusted ``[rows]``,
    adjusted_tokens ``[rows, entries]``, adjustments ``[rows, 3, entries]`` and token_mask
    ``[rows, words]``.
    """

    name: ClassVar[str] = "InplaceSampleOptions"
    input_dtypes: ClassVar[tuple[torch.dtype, ...]] = (
        *SampleOperation.input_dtypes,
        torch.float32,
        torch.int32,
        torch.int32,
        torch.int32,
        torch.float32,
        torch.int32,
    )

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """An index and its log-probability; log-probabilities and indices of the most likely."""
        return [torch.int64, torch.float32, torch.float32, torch.int64]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """One index and its log-probability for each row, and those of the most likely."""
        rows = inputs[0][0]
        return [[rows, 1], [rows, 1], [rows, MAX_LOGPROBS], [rows, MAX_LOGPROBS]]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """The candidates of the splits, their largest scores, and adjusted scores."""
        rows, count = shapes[0]
        return sample_workspace(rows) + candidates_workspace(rows) + adjusted_workspace(rows, count)

    def launch(self, call: Launch) -> None:
        """Launch `inplace.kernels.sample.sample` with options."""
        rows, entries = call.shapes[9]
        candidates = sample_workspace(rows)
        scores = candidates + candidates_workspace(rows)
        min_p, num_logprobs, num_adjusted, adjusted_tokens, adjustments, mask = call.inputs[6:]
        _, token_logprobs, top_logprobs, top_tokens = call.outputs
        options = SampleOptions(
            min_p,
            num_logprobs,
            num_adjusted,
            adjusted_tokens,
            adjustments,
            mask,
            entries,
            token_logprobs,
            top_logprobs,
            top_tokens,
            call.scratch(candidates, torch.float32),
            call.scratch(scores, torch.float32),
        )
        self._launch(call, options)
