"""Plugins that touch state: attention and update. Their aliased outputs are the states themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from inplace.kernels.attention import AttentionSpec, attention, attention_locks, attention_workspace
from inplace.kernels.memory import Pointer
from inplace.kernels.update import UpdateSpec, update
from inplace.plugins.linear import FLOATS
from inplace.plugins.operation import Launch, Operation, Shape, tokens


@dataclass(frozen=True)
class AttentionOperation(Operation):
    """``inplace::attention`` and ``inplace::qkv_attention``.

    Inputs: query, key, value (merged: one tensor with all three; without append: the query alone), then cos and sin when ``rotary``, the
    key and the value state, slots, row_offsets, write_indices, then whatever must have been read before it appends: a reader of the old
    contents hands its result over, so that TensorRT runs it first. Outputs: the attention's, and the two states. ``settled``: nothing in
    the network writes slots, write indices or the states ahead of it.
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
    merged: bool = False
    settled: bool = False
    readers: int = 0

    @property
    def projections(self) -> int:
        """How many inputs hold queries, keys and values."""
        return 1 if self.merged or not self.append else 3

    @property
    def first_state(self) -> int:
        """The index of the key state among the inputs."""
        return self.projections + (2 if self.rotary else 0)

    @property
    def input_count(self) -> int:
        """Projections, cos and sin, two states, three row descriptions, and what was read before."""
        return self.first_state + 5 + self.readers

    @property
    def aliases(self) -> Mapping[int, int]:  # type: ignore[override]
        """Outputs 1 and 2 are the states that it appends to."""
        return {1: self.first_state, 2: self.first_state + 1} if self.append else {}

    @property
    def spec(self) -> AttentionSpec:
        """The same for the kernels."""
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
        )

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Row descriptions are int32, earlier readers may have any type, everything else has the query's."""
        end = self.first_state + 5
        if self.first_state + 2 <= position < end:
            return dtypes[position] is torch.int32
        return end <= position < self.input_count or (
            dtypes[position] in FLOATS and dtypes[position] is dtypes[0]
        )

    def output_dtypes(self, inputs: Sequence[torch.dtype]) -> list[torch.dtype]:
        """Those of the query and of the states."""
        return [inputs[0], *(inputs[index] for index in self.aliases.values())]

    def output_shapes(self, inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Merged: ``[..., heads * value_dim]``; else ``[tokens, heads, value_dim]``; then the states' own."""
        query = inputs[0]
        out = (
            [*query[:-1], self.heads * self.value_dim]
            if self.merged
            else [query[0], self.heads, self.value_dim]
        )
        return [out, *(list(inputs[index]) for index in self.aliases.values())]

    def _count(self, shape: Shape) -> int:
        return tokens(shape) if self.merged else shape[0]

    def workspace(self, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> int:
        """Partial results of split rows."""
        state = shapes[self.first_state]
        return attention_workspace(
            self.spec, self._count(shapes[0]), shapes[self.first_state + 2][0], state[2]
        )

    def locks(self) -> int:
        """What the splits of the widest step count themselves in."""
        return attention_locks(self.spec, self.max_rows)

    def launch(self, call: Launch) -> None:
        """See `inplace.kernels.attention.attention`."""
        inputs, first = call.inputs, self.first_state
        query, key, value = inputs[0], None, None
        strides = (self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.value_dim)
        if self.merged:
            size = query.dtype.itemsize
            key = Pointer(query.address + strides[0] * size, query.dtype)
            value = Pointer(key.address + strides[1] * size, query.dtype)
            strides = (sum(strides),) * 3
        elif self.append:
            key, value = inputs[1:3]
        cos, sin = inputs[first - 2 : first] if self.rotary else (None, None)
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
            key_state=inputs[first],
            value_state=inputs[first + 1],
            capacity=call.shapes[first][2],
            slots=inputs[first + 2],
            row_offsets=inputs[first + 3],
            write_indices=inputs[first + 4],
            out=call.outputs[0],
            workspace=Pointer(call.workspace, torch.float32),
            locks=call.locks,
            tokens=self._count(call.shapes[0]),
            rows=call.shapes[first + 2][0],
            pdl=call.pdl,
            settled=self.settled,
        )


@dataclass(frozen=True)
class UpdateOperation(Operation):
    """``inplace::update``.

    Inputs: state, slots, value, then row_offsets (``packed``) and write_indices (``append``), then whatever must have been read
    before: a reader of the old contents hands its result over, so that TensorRT runs it first. Output: the state.
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
        """State, slots, value, and what else there is."""
        return 3 + self.packed + self.append + self.readers

    def accepts(self, position: int, dtypes: Sequence[torch.dtype]) -> bool:
        """Value and output have the state's type, row descriptions are int32, earlier readers may have any."""
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
        """See `inplace.kernels.update.update`."""
        state, slots, value, *rest = call.inputs
        bounds = iter(rest)
        shape, entries = tuple(call.shapes[0]), tuple(call.shapes[2])
        update(
            UpdateSpec.of(shape, self.axis, append=self.append, ring=self.ring),
            state=state,
            slots=slots,
            value=value,
            row_offsets=next(bounds) if self.packed else None,
            write_indices=next(bounds) if self.append else None,
            rows=call.shapes[1][0],
            units=entries[0]
            if self.packed
            else entries[0] * entries[self.axis]
            if self.append
            else entries[0],
            pdl=call.pdl,
        )
