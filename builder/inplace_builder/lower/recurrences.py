"""Convolutions and recurrences as plain operators, for networks of TensorRT without plugins.

They have no loops over tokens. Each operator is written as ``inplace::read`` of its state, products
over the tokens of the whole step, and ``inplace::update``. Masks keep the rows of a step apart, so
tokens may be packed in any way. What depends on the tokens before it in its row is a product with a
triangular matrix, its inverse, or a scan in as many rounds as a number of tokens has binary digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from inplace.operators import read, update
from torch import SymInt, Tensor
from torch.utils._sympy.value_ranges import bound_sympy

inplace = torch.ops.inplace


@dataclass(frozen=True)
class PackedRows:
    """The rows of a step.

    Attributes:
        index: ``[tokens]`` int32, counts the tokens.
        place: ``[tokens]`` int32: each token's place in its row.
        row: ``[tokens]`` int32: its row; 0 where it has none.
        live: ``[tokens]`` bool: its row has a slot.
        member: ``[tokens, rows]`` bool: the token is in the row, and the row has a slot.
        causal: ``[tokens, tokens]`` bool: the second is in the first's row, not behind it.
        starts, ends: ``[rows]`` int32: where a row's tokens start and end.
        rounds: binary digits of the number of tokens, at most.
    """

    index: Tensor
    place: Tensor
    row: Tensor
    live: Tensor
    member: Tensor
    causal: Tensor
    starts: Tensor
    ends: Tensor
    rounds: int

    @classmethod
    def of(cls, x: Tensor, slots: Tensor, row_offsets: Tensor) -> "PackedRows":
        """The rows of tokens ``x [tokens, ...]``."""
        tokens, rows = x.shape[0], slots.shape[0]
        index = torch.arange(tokens, dtype=torch.int32, device=x.device)
        offsets = row_offsets.to(torch.int32)
        starts, ends = offsets[:-1], offsets[1:]
        column = index[:, None]
        member = (column >= starts) & (column < ends) & (slots >= 0)
        # sums of integers below 2**24, which are exact
        weights = member.float()
        first = (weights @ starts.float()[:, None])[:, 0].to(torch.int32)
        number = torch.arange(rows, dtype=torch.int32, device=x.device).float()
        row = (weights @ number[:, None])[:, 0].to(torch.int32)
        live = (weights @ torch.ones_like(number)[:, None])[:, 0] > 0.5
        causal = (weights @ weights.mT > 0.5) & (column >= index)
        place = index - first
        return cls(
            index, place, row, live, member, causal, starts, ends, _largest(tokens).bit_length()
        )

    @property
    def by_row(self) -> Tensor:
        """``member`` as numbers, ``[rows, tokens]``."""
        return self.member.float().mT

    def masked(self, x: Tensor) -> Tensor:
        """``x [tokens, ...]``, zero in tokens of rows without a slot."""
        return torch.where(self.live.reshape(-1, *[1] * (x.dim() - 1)), x, 0.0)

    def own(self, x: Tensor) -> Tensor:
        """Of ``x [rows, heads, tokens, dim]`` what each token's own row has."""
        return (x * self.by_row[:, None, :, None]).sum(0)

    def running_sum(self, x: Tensor) -> Tensor:
        """Sums over a token and those before it in its row, ``x [tokens, n]``."""
        return self.causal.float() @ x

    def decay(self, total: Tensor) -> Tensor:
        """``exp`` of the difference of sums of two tokens, 0 where the second is not a past one.

        Args:
            total: ``[heads, tokens, ...]``, from `running_sum`.

        Returns:
            ``[heads, tokens, tokens, ...]``.
        """
        mask = self.causal.reshape(*self.causal.shape, *[1] * (total.dim() - 2))
        difference = torch.where(mask, total[:, :, None] - total[:, None], 0.0)
        return difference.exp() * mask.float()

    def decay_to_end(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """What decays from the start of each row, and from each token, to the row's end.

        Args:
            x: logarithms, ``[tokens, n]``.
            total: their `running_sum`.

        Returns:
            The row's whole logarithm ``[rows, n]``, and ``exp`` of what is left after each of its
            tokens, ``[rows, tokens, n]``, 0 in other rows.
        """
        whole = self.by_row @ x
        mask = self.by_row[:, :, None]
        left = torch.where(mask > 0.5, whole[:, None] - total, 0.0)
        return whole, left.exp() * mask


def _largest(extent: int | SymInt) -> int:
    """The largest value of an extent."""
    if isinstance(extent, int):
        return extent
    environment = extent.node.shape_env
    assert environment is not None
    return int(bound_sympy(extent.node.expr, environment.var_to_range).upper)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
    *,
    silu: bool = False,
) -> Tensor:
    """``inplace::causal_conv1d``."""
    rows, old = PackedRows.of(x, slots, row_offsets), read(state, slots)
    past, channels = weight.shape[1] - 1, weight.shape[0]
    table = torch.cat([x, old.reshape(-1, channels)])
    tokens = x.shape[0]
    out: Any = 0.0 if bias is None else bias.float()
    for back in range(past, -1, -1):
        before = tokens + rows.row * past + past - (back - rows.place)
        entry = torch.where(rows.place >= back, rows.index - back, before)
        out = out + table[entry].float() * weight[:, past - back].float()
    number = torch.arange(slots.shape[0], dtype=torch.int32, device=x.device)
    kept = []
    for oldest in range(past):
        place = rows.ends - rows.starts + oldest
        kept.append(
            torch.where(place < past, tokens + number * past + place, rows.starts + place - past)
        )
    update(state, slots, torch.stack([table[each] for each in kept], 1))
    out = rows.masked(out)
    return (F.silu(out) if silu else out).to(x.dtype)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  the names of the operator's arguments
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None,  # noqa: N803
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """``inplace::selective_scan``."""
    rows, old = PackedRows.of(x, slots, row_offsets), read(state, slots)
    heads = x.shape[1]
    inputs, steps = x.float(), dt.float()
    key, query = (_by_head(each.float(), heads) for each in (B, C))
    scaled = inputs * steps[..., None]
    if tuple(A.shape[1:]) == (1, 1):
        decays = steps * A.float().flatten()
        out, new = _scan_products(rows, decays, scaled, key, query, old.float())
    else:
        decays = torch.exp(steps[:, :, None, None] * A.float())
        added = scaled[..., None] * key[:, :, None]
        every, new = _scan_rounds(rows, decays.expand(added.shape), added, old.float())
        out = (every * query[:, :, None]).sum(-1)
    if D is not None:
        out = out + inputs * D.float()[:, None]
    update(state, slots, new.to(state.dtype))
    return rows.masked(out).to(x.dtype)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """``[tokens, groups, size]`` as ``[tokens, heads, size]``."""
    groups, size = x.shape[1:]
    if groups == heads:
        return x
    return x[:, :, None].expand(-1, -1, heads // groups, -1).reshape(-1, heads, size)


def _scan_products(
    rows: PackedRows, decays: Tensor, x: Tensor, key: Tensor, query: Tensor, old: Tensor
) -> tuple[Tensor, Tensor]:
    """A scan whose heads have one decay, as `inplace.operators.recurrence` computes a chunk.

    Args:
        rows: the rows.
        decays: logarithms, ``[tokens, heads]``.
        x: ``[tokens, heads, dim]``.
        key, query: ``[tokens, heads, size]``.
        old: the states, ``[rows, heads, dim, size]``.

    Returns:
        The outputs, as ``x``, and the new states.
    """
    total = rows.running_sum(decays)
    whole, left = rows.decay_to_end(decays, total)
    values, keys, queries = (each.permute(1, 0, 2) for each in (x, key, query))
    by_head = total.mT
    inside = (queries @ keys.mT * rows.decay(by_head)) @ values
    carried = rows.own(queries[None] @ old.mT) * by_head.exp()[..., None]
    remaining = values.mT[None] * left.permute(0, 2, 1)[:, :, None]
    new = old * whole.exp()[..., None, None] + remaining @ keys[None]
    return (inside + carried).permute(1, 0, 2), new


def _scan_rounds(rows: PackedRows, decay: Tensor, x: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """``h = decay * h + x`` for each element alone; each round doubles how far back it reaches.

    Args:
        rows: the rows.
        decay, x: ``[tokens, ...]``.
        old: the states, ``[rows, ...]``.

    Returns:
        ``h`` of every token, and the states after each row's last one.
    """

    def column(mask: Tensor, like: Tensor) -> Tensor:
        return mask.reshape(-1, *[1] * (like.dim() - 1))

    is_first = column(rows.live & (rows.place == 0), x)
    x = x + torch.where(is_first, decay * old[rows.row], 0.0)
    for number in range(rows.rounds):
        back = 1 << number
        reaches = column(rows.live & (rows.place >= back), x)
        entry = (rows.index - back).clamp(min=0)
        x = x + torch.where(reaches, decay * x[entry], 0.0)
        decay = decay * torch.where(reaches, decay[entry], 1.0)
    last = (rows.ends - 1).clamp(min=0)
    return x, torch.where(column(rows.ends > rows.starts, old), x[last], old)


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """``inplace::delta_rule``."""
    rows, old = PackedRows.of(value, slots, row_offsets), read(state, slots).float()
    queries, keys, values = (each.float().permute(1, 0, 2) for each in (query, key, value))
    strength = beta.float().mT[..., None]
    logarithms = decay.float()
    flat = logarithms.reshape(logarithms.shape[0], -1)
    running = rows.running_sum(flat)
    whole, left = rows.decay_to_end(flat, running)
    heads, key_dim = state.shape[1:3]
    of_each = key_dim if decay.dim() == 3 else 1  # decays of a head
    total = running.reshape(-1, heads, of_each).permute(1, 0, 2)
    products, scores = _delta_products(rows, keys, queries, total)
    inverse = _unit_lower_inverse(rows, products * strength)
    decayed = total.exp()
    past = rows.own((keys * decayed)[None] @ old)
    corrections = inverse @ ((values - past) * strength)
    out = rows.own((queries * decayed)[None] @ old) + scores @ corrections
    remaining = left.reshape(*left.shape[:2], heads, of_each).permute(0, 2, 1, 3)
    new = old * whole.reshape(-1, heads, of_each, 1).exp()
    new = new + (keys[None] * remaining).mT @ corrections[None]
    update(state, slots, new.to(state.dtype))
    return rows.masked(out.permute(1, 0, 2)).to(value.dtype)


def _delta_products(
    rows: PackedRows, keys: Tensor, queries: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Products of keys, and of queries, with keys up to them, ``[heads, tokens, tokens]`` each."""
    pairs = rows.decay(total)
    if total.shape[2] == 1:
        return keys @ keys.mT * pairs[..., 0], queries @ keys.mT * pairs[..., 0]
    decayed = pairs * keys[:, None]
    return (decayed * keys[:, :, None]).sum(-1), (decayed * queries[:, :, None]).sum(-1)


def _unit_lower_inverse(rows: PackedRows, lower: Tensor) -> Tensor:
    """The inverse of ``1 + lower`` below the diagonal, ``[heads, tokens, tokens]``.

    The inverses of blocks on the diagonal give those of blocks twice as large: the block between
    two of them, times their inverses. That is as stable as forward substitution.
    """
    place = rows.place
    inverse = (rows.index[:, None] == rows.index).float().expand(lower.shape)
    for number in range(rows.rounds):
        block = torch.div(place, 1 << number, rounding_mode="floor")
        pair = torch.div(place, 2 << number, rounding_mode="floor")
        between = rows.causal & (block[:, None] > block) & (pair[:, None] == pair)
        inverse = inverse - inverse @ (lower * between.float()) @ inverse
    return inverse


def linear_recurrence(
    decay: Tensor, x: Tensor, state: Tensor, slots: Tensor, row_offsets: Tensor
) -> Tensor:
    """``inplace::linear_recurrence``."""
    rows, old = PackedRows.of(x, slots, row_offsets), read(state, slots)
    out, new = _scan_rounds(rows, decay.float(), x.float(), old.float())
    update(state, slots, new.to(state.dtype))
    return rows.masked(out).to(x.dtype)


EXPANSIONS: dict[Any, Callable[..., Tensor]] = {
    inplace.causal_conv1d.default: causal_conv1d,
    inplace.selective_scan.default: selective_scan,
    inplace.delta_rule.default: delta_rule,
    inplace.linear_recurrence.default: linear_recurrence,
}
"""For each operator the function that computes it by plain ones."""


NAMES: Sequence[str] = tuple(target._schema.name.partition("::")[2] for target in EXPANSIONS)
"""Their names."""
