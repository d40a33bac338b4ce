"""How operators run for many rows at once, where `torch.vmap` has no rule or a worse one.

A rule takes the arguments of a call for one row. A tensor that differs between rows comes as
`RowTensor`, with an axis of the rows in front. It returns the results with that axis in front, or
`NotImplemented` for arguments that it has nothing for; it raises `NotImplementedError` where no
decomposition would be right either. Results that only a gradient needs may be left out at the end.
An operator stays one operator where it can: a linear layer of many rows is a linear layer, a
convolution one over a larger batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inplace_builder.graph.nodes import CASTS

aten: Any = torch.ops.aten
inplace: Any = torch.ops.inplace

Rule = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class RowTensor:
    """A tensor of each row: ``rows`` is ``[rows, *shape]``."""

    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents in one row."""
        return tuple(self.rows.shape[1:])

    @property
    def folded(self) -> Tensor:
        """The first axis of one row, and the rows before it, as one axis."""
        return self.rows.reshape(-1, *self.shape[1:])


def rank(x: Any) -> int:
    """The number of axes in one row."""
    return len(x.shape)


def _any_rows(*arguments: Any) -> bool:
    return any(
        isinstance(leaf, RowTensor) for leaf in torch.utils._pytree.tree_leaves(list(arguments))
    )


def _folded_for(x: Any, rows: int) -> Any:
    """A tensor whose first axis is a batch, for all rows: ``[rows * batch, …]``."""
    if isinstance(x, RowTensor):
        return x.folded
    return x.expand(rows, *x.shape).reshape(-1, *x.shape[1:])


def _unfolded(result: Any, rows: int) -> Any:
    """The results of a call over folded rows, with an axis of the rows in front."""
    if isinstance(result, tuple | list):
        return [_unfolded(each, rows) for each in result]
    if result.dim() == 0 or result.shape[0] % rows:  # an unused result of a normalization: empty
        return result.expand(rows, *result.shape)
    return result.reshape(rows, result.shape[0] // rows, *result.shape[1:])


# Shapes.


def _reshape(x: RowTensor, size: Sequence[int]) -> Tensor:
    """A view of one row may need a copy where the rows have strides of their own."""
    return x.rows.reshape(x.rows.shape[0], *size)


def _expand(x: RowTensor, size: Sequence[int], *, implicit: bool = False) -> Tensor:
    rows, extents = x.rows.shape[0], x.shape
    aligned = x.rows.reshape(rows, *(1,) * (len(size) - len(extents)), *extents)
    return aligned.expand(rows, *size)


def _same_shape(target: Any, x: RowTensor, *arguments: Any, **options: Any) -> Any:
    """An operator that leaves every element where it is."""
    options.pop("memory_format", None)
    if not isinstance(x, RowTensor) or _any_rows(arguments):
        return NotImplemented
    return target(x.rows, *arguments, **options)


def _contiguous(x: RowTensor, *, memory_format: Any = None) -> Tensor:
    return x.rows.contiguous()


def _clone(x: RowTensor, *, memory_format: Any = None) -> Tensor:
    if memory_format in (None, torch.preserve_format):
        return x.rows.clone()
    return x.rows.clone(memory_format=torch.contiguous_format)


def _negated(x: RowTensor) -> Tensor:
    """What the imaginary part of a conjugate is a view of."""
    return torch.neg(x.rows)


def _of_all_rows(*tensors: Any) -> list[Tensor]:
    """The tensors with an axis of the rows, if one of them has it."""
    rows = next(each for each in tensors if isinstance(each, RowTensor)).rows.shape[0]
    return [x.rows if isinstance(x, RowTensor) else x.expand(rows, *x.shape) for x in tensors]


def _slice_scatter(x: Any, part: Any, dim: int = 0, *limits: Any, **options: Any) -> Any:
    axis = dim % rank(x) + 1
    return aten.slice_scatter.default(*_of_all_rows(x, part), axis, *limits, **options)


def _select_scatter(x: Any, part: Any, dim: int, index: int) -> Any:
    axis = dim % rank(x) + 1
    return aten.select_scatter.default(*_of_all_rows(x, part), axis, index)


def _diagonal_scatter(x: Any, part: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    axes = (dim % rank(x) + 1 for dim in (dim1, dim2))
    return aten.diagonal_scatter.default(*_of_all_rows(x, part), offset, *axes)


def _to_other(x: RowTensor, other: Any, *arguments: Any, **options: Any) -> Any:
    like = other.rows if isinstance(other, RowTensor) else other
    if not isinstance(x, RowTensor):
        return NotImplemented
    return x.rows.to(like.dtype)


def pointwise(target: Any, *arguments: Any, **options: Any) -> Any:
    """An operator on each element, over broadcast tensors: aligned behind the axis of the rows."""
    tensors = [each for each in arguments if isinstance(each, RowTensor | Tensor)]
    tensors += [each for each in options.values() if isinstance(each, RowTensor | Tensor)]
    if any(rank(each) == 0 for each in tensors) and len(tensors) > 1:
        return NotImplemented  # a tensor without axes promotes types like a number
    most = max(rank(each) for each in tensors)

    def aligned(each: Any) -> Any:
        if not isinstance(each, RowTensor):
            return each
        rows = each.rows
        return rows.reshape(rows.shape[0], *(1,) * (most - rank(each)), *each.shape)

    arguments = tuple(aligned(each) for each in arguments)
    return target(*arguments, **{name: aligned(each) for name, each in options.items()})


def chosen(predicate: Any, one: Any, other: Any) -> Any:
    """The result of ``torch.cond``: each row has one branch's, of the same shape and type."""
    extents = (1,) * rank(one)
    if isinstance(predicate, RowTensor):
        mask = predicate.rows.reshape(predicate.rows.shape[0], *extents)
    else:
        mask = predicate.reshape(1, *extents)
    one, other = (x.rows if isinstance(x, RowTensor) else x[None] for x in (one, other))
    return torch.where(mask, one, other)


# Products.


def _trailing(target: Any, x: RowTensor, *arguments: Any, **options: Any) -> Any:
    """An operator on the last axes of its input, with the same weights for every row."""
    if not isinstance(x, RowTensor) or _any_rows(arguments, options):
        return NotImplemented
    return target(x.rows, *arguments, **options)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(x, RowTensor) or _any_rows(weight, bias):
        return NotImplemented
    return aten.linear.default(x.rows, weight, bias)


def _fused_linear(x: Any, *parts: Any, **options: Any) -> Any:
    """``inplace::linear``, of which captured models with 8-bit weights are made."""
    if not isinstance(x, RowTensor) or _any_rows(parts, options):
        return NotImplemented
    return inplace.linear.default(x.rows, *parts, **options)


def _matmul(one: Any, other: Any) -> Any:
    """As `torch.matmul` documents it for one row; the rows are one more axis of the batch."""
    most = max(rank(one), rank(other), 2)

    def aligned(x: Any, as_matrix: Callable[[Tensor], Tensor]) -> Tensor:
        if not isinstance(x, RowTensor):
            return as_matrix(x) if x.dim() == 1 else x
        rows = as_matrix(x.rows) if rank(x) == 1 else x.rows
        extents = rows.shape[1:]
        return rows.reshape(rows.shape[0], *(1,) * (most - len(extents)), *extents)

    product = aten.matmul.default(
        aligned(one, lambda x: x.unsqueeze(-2)), aligned(other, lambda x: x.unsqueeze(-1))
    )
    product = product if rank(one) > 1 else product.squeeze(-2)
    return product if rank(other) > 1 else product.squeeze(-1)


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> Any:
    """As `torch.nn.functional.scaled_dot_product_attention` documents it."""
    rows = next(x for x in (query, key, value, mask) if isinstance(x, RowTensor)).rows.shape[0]
    ranks = {rank(x) for x in (query, key, value)}
    if dropout or ranks not in ({3}, {4}):
        return NotImplemented
    axes = ranks.pop()
    batch = max(x.shape[0] for x in (query, key, value))
    heads = [query, key, value]
    if axes == 4 and any(x.shape[0] != batch for x in heads):
        return NotImplemented
    # three axes are [heads or batch, tokens, dim]: the rows are the batch
    folded = [
        (x.rows if isinstance(x, RowTensor) else x.expand(rows, *x.shape))
        if axes == 3
        else _folded_for(x, rows)
        for x in heads
    ]
    if isinstance(mask, RowTensor):
        extents = (*(1,) * (axes - rank(mask)), *mask.shape)
        mask = mask.rows.reshape(rows, *extents)
        mask = mask if axes == 3 else mask.expand(rows, batch, *extents[1:]).flatten(0, 1)
    elif mask is not None and axes == 4 and rank(mask) == 4 and mask.shape[0] != 1:
        mask = _folded_for(mask, rows)
    out = aten.scaled_dot_product_attention.default(*folded, mask, 0.0, causal, **options)
    return out if axes == 3 else _unfolded(out, rows)


# A batch in front: the rows become a part of it.


def _batched(target: Any, spatial: int, x: Any, *arguments: Any, **options: Any) -> Any:
    """An operator over ``[batch, channels, *spatial]`` or ``[channels, *spatial]``."""
    if not isinstance(x, RowTensor) or _any_rows(arguments, options):
        return NotImplemented
    if rank(x) == spatial + 1:
        return target(x.rows, *arguments, **options)
    if rank(x) != spatial + 2:
        return NotImplemented
    return _unfolded(target(x.folded, *arguments, **options), x.rows.shape[0])


def _normalized(target: Any, x: Any, *arguments: Any, **options: Any) -> Any:
    """Batch or group normalization with fixed statistics, over ``[batch, channels, …]``."""
    if not isinstance(x, RowTensor) or _any_rows(arguments, options):
        return NotImplemented
    return _unfolded(target(x.folded, *arguments, **options), x.rows.shape[0])


def _view_as_type(x: Any, dtype: torch.dtype) -> Any:
    """The bytes of each row as another type: the last axis changes with the size of an element."""
    if rank(x) == 0 and x.rows.dtype.itemsize != dtype.itemsize:
        return NotImplemented
    # not contiguous(): that leaves an axis of one element any stride
    return x.rows.clone(memory_format=torch.contiguous_format).view(dtype)


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, train: bool, *rest: Any
) -> Any:
    if train:
        return NotImplemented
    return _normalized(aten.batch_norm.default, x, weight, bias, mean, var, train, *rest)


def _cell(target: Any, x: Any, hidden: Any, *weights: Any) -> Any:
    """A recurrent cell over ``[batch, features]``."""
    if _any_rows(weights):
        return NotImplemented
    states = hidden if isinstance(hidden, list | tuple) else [hidden]
    rows = next(each for each in (x, *states) if isinstance(each, RowTensor)).rows.shape[0]
    folded = [_folded_for(state, rows) for state in states]
    given = folded if isinstance(hidden, list | tuple) else folded[0]
    return _unfolded(target(_folded_for(x, rows), given, *weights), rows)


def _recurrent(
    target: Any,
    x: Any,
    hidden: Any,
    weights: Any,
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """LSTM, GRU and RNN over ``[time, batch, features]``, states ``[layers, batch, hidden]``."""
    if bidirectional:
        raise NotImplementedError(
            "it is bidirectional: the backward direction begins at the end of a sequence, and a "
            "request has only a part of it; use one direction"
        )
    if _any_rows(weights):
        return NotImplemented
    states = hidden if isinstance(hidden, list | tuple) else [hidden]
    rows = next(each for each in (x, *states) if isinstance(each, RowTensor)).rows.shape[0]

    def fold(each: Any, axis: int) -> Any:
        tensor = each.rows if isinstance(each, RowTensor) else each.expand(rows, *each.shape)
        # on a GPU the operators want states that are contiguous
        return tensor.movedim(0, axis).flatten(axis, axis + 1).contiguous()

    def unfold(tensor: Any, axis: int) -> Any:
        return tensor.unflatten(axis, (rows, tensor.shape[axis] // rows)).movedim(axis, 0)

    axis = 0 if batch_first else 1
    folded = [fold(state, 1) for state in states]
    given = folded if isinstance(hidden, list | tuple) else folded[0]
    out, *last = target(
        fold(x, axis),
        given,
        weights,
        has_biases,
        layers,
        dropout,
        train,
        bidirectional,
        batch_first,
    )
    return [unfold(out, axis), *(unfold(state, 1) for state in last)]


def _stft(x: Any, *arguments: Any, **options: Any) -> Any:
    """A short-time Fourier transform of ``[batch, time]`` or ``[time]``."""
    if not isinstance(x, RowTensor) or _any_rows(arguments, options):
        return NotImplemented
    if rank(x) == 1:
        return aten.stft.default(x.rows, *arguments, **options)
    return _unfolded(aten.stft.default(x.folded, *arguments, **options), x.rows.shape[0])


# Our operators on states. The states are those of all slots: every row has its own slot.


def _read(state: Tensor, slots: RowTensor) -> Any:
    if isinstance(state, RowTensor):
        return NotImplemented
    return _unfolded(inplace.read.default(state, slots.folded), slots.rows.shape[0])


def _update(
    state: Tensor,
    slots: Any,
    value: Any,
    row_offsets: Any = None,
    write_indices: Any = None,
    axis: int = 0,
    ring: bool = False,
) -> Any:
    if isinstance(state, RowTensor) or row_offsets is not None:
        return NotImplemented
    rows = slots.rows.shape[0]
    starts = None if write_indices is None else _folded_for(write_indices, rows)
    inplace.update.default(state, slots.folded, _folded_for(value, rows), None, starts, axis, ring)
    return []


def _attention(
    query: Any,
    key: Any,
    value: Any,
    key_state: Tensor,
    value_state: Tensor,
    slots: RowTensor,
    row_offsets: Tensor,
    write_indices: Any,
    sinks: Any = None,
    bias: Any = None,
    **options: Any,
) -> Any:
    if _any_rows(key_state, value_state, row_offsets, sinks) or slots.shape != (1,):
        return NotImplemented
    rows, tokens = slots.rows.shape[0], query.shape[0]
    packed = [
        each if each is None else _folded_for(each, rows) for each in (query, key, value, bias)
    ]
    starts = torch.arange(rows + 1, dtype=row_offsets.dtype, device=row_offsets.device)
    out = inplace.attention.default(
        *packed[:3],
        key_state,
        value_state,
        slots.folded,
        starts * tokens,
        _folded_for(write_indices, rows),
        sinks,
        packed[3],
        **options,
    )
    return _unfolded(out, rows)


def _grouped_linear(x: Any, expert_ids: Any, weight: Any, bias: Any = None, **options: Any) -> Any:
    if _any_rows(weight, bias):
        return NotImplemented
    rows = next(each for each in (x, expert_ids) if isinstance(each, RowTensor)).rows.shape[0]
    tokens, ids = _folded_for(x, rows), _folded_for(expert_ids, rows)
    out = inplace.grouped_linear.default(tokens, ids, weight, bias, **options)
    return _unfolded(out, rows)


def _weighted_sum(x: Any, weights: Any) -> Any:
    rows = next(each for each in (x, weights) if isinstance(each, RowTensor)).rows.shape[0]
    out = inplace.weighted_sum.default(_folded_for(x, rows), _folded_for(weights, rows))
    return _unfolded(out, rows)


def _index_put(
    x: Any, indices: Sequence[Any], new: Any, accumulate: bool = False, unsafe: bool = False
) -> Any:
    """One value under a mask over some axes: chosen, as the number of entries varies."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if (
        len(given) != 1
        or accumulate
        or _dtype(given[0][1]) is not torch.bool
        or isinstance(new, RowTensor)
        or new.numel() != 1
    ):
        return NotImplemented
    axis, mask = given[0]
    rows = next(each for each in (x, mask) if isinstance(each, RowTensor)).rows.shape[0]
    whole = x.rows if isinstance(x, RowTensor) else x.expand(rows, *x.shape)
    extents = (*(1,) * axis, *mask.shape, *(1,) * (rank(x) - axis - rank(mask)))
    if isinstance(mask, RowTensor):
        mask = mask.rows.reshape(rows, *extents)
    else:
        mask = mask.reshape(extents)
    return torch.where(mask, new.reshape(()).to(whole.dtype), whole)


def _dtype(x: Any) -> Any:
    return x.rows.dtype if isinstance(x, RowTensor) else getattr(x, "dtype", None)


def _lookup(weight: Any, indices: Any, *options: Any) -> Any:
    if isinstance(weight, RowTensor):
        return NotImplemented
    return aten.embedding.default(weight, indices.rows, *options)


def _embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Bags that begin at the same entries in every row: the bags of all rows, one after the other.

    Where rows have offsets of their own, a bag of one could reach into the entries of another.
    """
    if not isinstance(indices, RowTensor) or _any_rows(weight, offsets):
        return NotImplemented
    rows, entries = indices.rows.shape
    starts = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)[:, None] * entries
    bags, *_ = aten.embedding_bag.padding_idx(
        weight,
        indices.folded,
        (starts + offsets).reshape(-1),
        scale_grad_by_freq,
        mode,
        sparse,
        None if per_sample_weights is None else _folded_for(per_sample_weights, rows),
        False,
        padding_idx,
    )
    bags = _unfolded(bags, rows)
    if include_last_offset:  # what follows the last offset is in no bag
        bags = bags[:, :-1]
    return [bags]


def _rules() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {
        aten.matmul.default: _matmul,
        aten.linear.default: _linear,
        aten.embedding.default: _lookup,
        aten.embedding_bag.default: _embedding_bag,
        aten.embedding_bag.padding_idx: _embedding_bag,
        aten.scaled_dot_product_attention.default: _sdpa,
        aten.batch_norm.default: _batch_norm,
        aten.stft.default: _stft,
        aten.index_put.default: _index_put,
        aten.expand.default: _expand,
        aten.view.dtype: _view_as_type,
        aten.slice_scatter.default: _slice_scatter,
        aten.select_scatter.default: _select_scatter,
        aten.diagonal_scatter.default: _diagonal_scatter,
        aten._neg_view.default: _negated,
        aten.contiguous.default: _contiguous,
        aten.clone.default: _clone,
        aten.to.other: _to_other,
        aten.type_as.default: _to_other,
        inplace.read.default: _read,
        inplace.update.default: _update,
        inplace.attention.default: _attention,
        inplace.linear.default: _fused_linear,
        inplace.grouped_linear.default: _grouped_linear,
        inplace.weighted_sum.default: _weighted_sum,
    }
    views = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
    rules |= dict.fromkeys(views, _reshape)
    same = (*(set(CASTS) - rules.keys()), aten.alias.default, aten.detach.default)
    rules |= {target: partial(_same_shape, target) for target in same}
    trailing = (aten.layer_norm.default, aten.rms_norm.default, aten.constant_pad_nd.default)
    rules |= {target: partial(_trailing, target) for target in trailing}
    normalized = (aten.group_norm.default, aten._native_batch_norm_legit_no_training.default)
    rules |= {target: partial(_normalized, target) for target in normalized}
    cells = (
        aten.lstm_cell.default,
        aten.gru_cell.default,
        aten.rnn_tanh_cell.default,
        aten.rnn_relu_cell.default,
    )
    rules |= {target: partial(_cell, target) for target in cells}
    recurrent = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
    rules |= {target: partial(_recurrent, target) for target in recurrent}
    for target, spatial in _over_batches():
        rules[target] = partial(_batched, target, spatial)
    return rules


def _over_batches() -> list[tuple[Any, int]]:
    """Operators over ``[batch, channels, …]``, and how many axes follow."""
    named = {
        1: "conv1d.default conv1d.padding conv_transpose1d.default max_pool1d.default "
        "avg_pool1d.default adaptive_avg_pool1d.default upsample_linear1d.vec "
        "upsample_nearest1d.vec reflection_pad1d.default replication_pad1d.default",
        2: "conv2d.default conv2d.padding conv_transpose2d.input max_pool2d.default "
        "avg_pool2d.default adaptive_avg_pool2d.default upsample_bilinear2d.vec "
        "upsample_nearest2d.vec upsample_bicubic2d.vec reflection_pad2d.default "
        "replication_pad2d.default",
        3: "conv3d.default conv3d.padding conv_transpose3d.input avg_pool3d.default "
        "adaptive_avg_pool3d.default",
    }
    operators: list[tuple[Any, int]] = []
    for spatial, names in named.items():
        for name in names.split():
            operator, overload = name.split(".")
            operators.append((getattr(getattr(aten, operator), overload), spatial))
    return operators


RULES: dict[Any, Rule] = _rules()
"""The rule of each operator; one with torch's tag ``pointwise`` and without a rule: `pointwise`."""
