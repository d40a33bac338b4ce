"""Recurrences over each row's own tokens: a state of fixed size that every token rewrites.

``inplace::selective_scan`` (Mamba), ``inplace::delta_rule`` (gated DeltaNet, Kimi delta attention)
and ``inplace::linear_recurrence`` (RG-LRU). All compute in float32. Row r of a step owns the packed
tokens ``row_offsets[r]:row_offsets[r + 1]`` and continues from the state of its slot; a state of
zeros is that of a new sequence.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inplace.operators.library import LIBRARY, define
from inplace.operators.rows import by_rows, check_rows
from inplace.operators.state import check_contiguous

SCAN_CHUNK = 64
"""Tokens that one set of matrix products computes, where a head has one decay."""


DIAGONAL_CHUNK = 16
"""Tokens that one set of products computes, where each key component has a decay of its own."""


define(
    "selective_scan",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor(a!) state, "
    "Tensor slots, Tensor row_offsets) -> Tensor",
)


@torch.library.impl(LIBRARY, "selective_scan", "CompositeExplicitAutograd")
def _selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  the paper's names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None,  # noqa: N803
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    out = _empty_scan(x, dt, A, B, C, D, state, slots, row_offsets).zero_()
    rates, has_one_rate = A.float(), tuple(A.shape[1:]) == (1, 1)

    def recurrence(inputs: Sequence[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, key, query = inputs
        group = x.shape[2] // key.shape[2]
        key, query = (each.repeat_interleave(group, 2) for each in (key, query))
        if has_one_rate and x.shape[1] > 1:
            out, states = _scan_chunks(x, dt, rates.flatten(), key, query, states)
        else:
            out, states = _scan_tokens(x, dt, rates, key, query, states)
        return (out if D is None else out + x * D.float()[:, None]), states

    return by_rows(recurrence, (x, dt, B, C), out, state, slots, row_offsets)


@torch.library.impl(LIBRARY, "selective_scan", "CUDA")
def _selective_scan_on_gpu(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None,  # noqa: N803
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """`selective_scan` in Triton-language kernels, without a synchronisation with the host."""
    from inplace.kernels import recurrence as kernels  # imports Triton

    out = _empty_scan(x, dt, A, B, C, D, state, slots, row_offsets)
    check_contiguous(state)
    if not slots.shape[0]:
        return out.zero_()
    tokens, rows, rate_shape = x.shape[0], slots.shape[0], (A.shape[1], A.shape[2])
    shape = (state.shape[1], state.shape[2], state.shape[3])
    scratch = kernels.selective_scan_workspace(tokens, rows, shape, rate_shape, B.dtype)
    kernels.selective_scan(
        x=x.contiguous(),
        dt=dt.contiguous(),
        rates=A.contiguous(),
        key=B.contiguous(),
        query=C.contiguous(),
        skip=None if D is None else D.contiguous(),
        state=state,
        slots=slots.int(),
        row_offsets=row_offsets.int(),
        out=out,
        workspace=B.new_empty(scratch),
        tokens=tokens,
        rows=rows,
        shape=shape,
        groups=B.shape[1],
        rate_shape=rate_shape,
    )
    return out


def _scan_tokens(
    x: Tensor, dt: Tensor, rates: Tensor, key: Tensor, query: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token.

    Args:
        x: ``[rows, tokens, heads, dim]``.
        dt: ``[rows, tokens, heads]``.
        rates: A, ``[heads, dim or 1, size or 1]``.
        key, query: B and C for each head, ``[rows, tokens, heads, size]``.
        states: ``[rows, heads, dim, size]``.
    """
    scaled, results = x * dt[..., None], []
    for token in range(x.shape[1]):
        decay = torch.exp(dt[:, token, :, None, None] * rates)
        states = states * decay + scaled[:, token, ..., None] * key[:, token, :, None]
        results.append((states @ query[:, token, ..., None])[..., 0])
    return torch.stack(results, 1), states


def _scan_chunks(
    x: Tensor, dt: Tensor, rates: Tensor, key: Tensor, query: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """By matrix products over chunks of tokens, where a head has one decay (``rates [heads]``).

    State space duality, arXiv:2405.21060, section 6.
    """
    results = []
    parts = [
        each.split(SCAN_CHUNK, 2)
        for each in (
            (dt * rates).transpose(1, 2),
            (x * dt[..., None]).transpose(1, 2),
            key.transpose(1, 2),
            query.transpose(1, 2),
        )
    ]
    for log_decay, values, keys, queries in zip(*parts, strict=True):
        total = log_decay.cumsum(2)
        pairs = torch.exp(total[..., :, None] - total[..., None, :]).tril()
        inside = (queries @ keys.mT * pairs) @ values
        results.append(inside + total.exp()[..., None] * (queries @ states.mT))
        remaining = (total[..., -1:] - total).exp()[..., None]
        states = states * total[..., -1, None, None].exp() + (values * remaining).mT @ keys
    return torch.cat(results, 2).transpose(1, 2), states


def _empty_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None,  # noqa: N803
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """Memory for the result of `selective_scan`.

    Raises:
        RuntimeError: the arguments do not fit.
    """
    torch._check(
        x.dim() == 3 and state.dim() == 4 and A.dim() == 3 and B.dim() == C.dim() == 3,
        lambda: (
            "x must be [tokens, heads, dim], A [heads, dim or 1, size or 1], B and C "
            "[tokens, groups, size], state [slots, heads, dim, size]"
        ),
    )
    (_, heads, dim), size = x.shape, state.shape[3]
    torch._check(
        tuple(state.shape[1:3]) == (heads, dim)
        and tuple(dt.shape[1:]) == (heads,)
        and A.shape[0] == heads
        and A.shape[1] in (1, dim)
        and A.shape[2] in (1, size)
        and tuple(B.shape[1:]) == tuple(C.shape[1:])
        and B.shape[2] == size
        and heads % B.shape[1] == 0
        and (D is None or tuple(D.shape) == (heads,)),
        lambda: (
            f"the state holds {list(state.shape[1:])} (heads, dim, size) a slot, which x "
            f"{list(x.shape)}, dt {list(dt.shape)}, A {list(A.shape)}, B {list(B.shape)}, C "
            f"{list(C.shape)} and D {None if D is None else list(D.shape)} do not fit"
        ),
    )
    check_rows((x, dt, B, C), slots, row_offsets)
    return x.new_empty(x.shape)


torch.library.register_fake("inplace::selective_scan", _empty_scan, lib=LIBRARY)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None,  # noqa: N803
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """A selective state space model over each row's tokens (Mamba, Mamba 2).

    ``h = exp(dt * A) * h + dt * x ⊗ B``, then ``out = h · C + D * x`` (arXiv:2312.00752, section
    3.2; arXiv:2405.21060). Mamba 1 has as many heads as channels, of one element each.

    Args:
        x: ``[tokens, heads, dim]``.
        dt: ``[tokens, heads]``, the step sizes, after their bias and softplus.
        A: ``[heads, dim or 1, size or 1]``, negative.
        B, C: ``[tokens, groups, size]``; head h reads group ``h // (heads / groups)``.
        D: ``[heads]``, or None.
        state: ``[slots, heads, dim, size]``, mutated.
        slots: ``[rows]``, int32 or int64; a row with slot -1 writes nothing and its output is 0.
        row_offsets: ``[rows + 1]``.

    Returns:
        ``[tokens, heads, dim]``, x's dtype.
    """
    out = torch.ops.inplace.selective_scan(x, dt, A, B, C, D, state, slots, row_offsets)
    assert isinstance(out, Tensor)
    return out


define(
    "delta_rule",
    "(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor(a!) state, "
    "Tensor slots, Tensor row_offsets) -> Tensor",
)


@torch.library.impl(LIBRARY, "delta_rule", "CompositeExplicitAutograd")
def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    out = _empty_delta_rule(query, key, value, decay, beta, state, slots, row_offsets).zero_()
    # a decay a head is one of size 1 for all its key components
    decay = decay if decay.dim() == 3 else decay[..., None]
    inputs = (query, key, value, decay, beta[..., None])
    return by_rows(_delta_chunks, inputs, out, state, slots, row_offsets)


@torch.library.impl(LIBRARY, "delta_rule", "CUDA")
def _delta_rule_on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """`delta_rule` in Triton-language kernels, without a synchronisation with the host."""
    from inplace.kernels import recurrence as kernels  # imports Triton

    out = _empty_delta_rule(query, key, value, decay, beta, state, slots, row_offsets)
    check_contiguous(state)
    if not slots.shape[0]:
        return out.zero_()
    tokens, rows, diagonal = value.shape[0], slots.shape[0], decay.dim() == 3
    shape = (state.shape[1], state.shape[2], state.shape[3])
    inverses, reads, writes, states = map(
        key.new_empty,
        kernels.delta_rule_workspaces(tokens, rows, shape, key.dtype, diagonal=diagonal),
    )
    kernels.delta_rule(
        query=query.contiguous(),
        key=key.contiguous(),
        value=value.contiguous(),
        decay=decay.contiguous(),
        beta=beta.contiguous(),
        state=state,
        slots=slots.int(),
        row_offsets=row_offsets.int(),
        out=out,
        workspaces=(inverses, reads, writes, states),
        tokens=tokens,
        rows=rows,
        shape=shape,
        diagonal=diagonal,
    )
    return out


def _delta_chunks(inputs: Sequence[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule by matrix products over chunks of tokens.

    Args:
        inputs: query and key ``[rows, tokens, heads, key_dim]``, value, decay
            ``[rows, tokens, heads, key_dim or 1]``, beta ``[rows, tokens, heads, 1]``.
        states: ``[rows, heads, key_dim, value_dim]``.
    """
    tokens, has_one_decay = inputs[0].shape[1], inputs[3].shape[3] == 1
    chunk = SCAN_CHUNK if has_one_decay else DIAGONAL_CHUNK
    parts = [each.transpose(1, 2).split(chunk, 2) for each in inputs]
    compute: Callable[..., tuple[Tensor, Tensor]] = _delta_token if tokens == 1 else _delta_chunk
    results = []
    for part in zip(*parts, strict=True):
        out, states = compute(*part, states)
        results.append(out)
    return torch.cat(results, 2).transpose(1, 2), states


def _delta_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, ``[rows, heads, 1, ...]`` each: the recurrence itself."""
    states = states * decay.exp().mT
    states = states + key.mT @ ((value - key @ states) * beta)
    return query @ states, states


def _delta_chunk(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Some tokens, ``[rows, heads, tokens, ...]`` each.

    A token's correction depends on those before it in the chunk: a triangular system
    (arXiv:2412.06464, section 3.3).
    """
    total = decay.cumsum(2)
    keys, scores = _decayed_products(key, query, total)
    decayed = total.exp()
    corrections = torch.linalg.solve_triangular(
        keys * beta, (value - (key * decayed) @ states) * beta, upper=False, unitriangular=True
    )
    out = (query * decayed) @ states + scores @ corrections
    last = total[:, :, -1:]
    states = states * last.exp().mT + (key * (last - total).exp()).mT @ corrections
    return out, states


def _decayed_products(key: Tensor, query: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The products of each key and query with each key up to it, decayed in between.

    Args:
        key, query: ``[rows, heads, tokens, key_dim]``.
        total: the decay from the chunk's start, ``[rows, heads, tokens, key_dim or 1]``.

    Returns:
        ``[rows, heads, tokens, tokens]`` each, lower triangular.
    """
    tokens = key.shape[2]
    later = torch.ones((tokens, tokens), dtype=torch.bool, device=key.device).triu(1)
    pairs = total[:, :, :, None] - total[:, :, None]
    pairs = pairs.masked_fill(later[..., None], float("-inf")).exp()
    if total.shape[3] == 1:
        return key @ key.mT * pairs[..., 0], query @ key.mT * pairs[..., 0]
    decayed = pairs * key[:, :, None]
    return (decayed @ key[..., None])[..., 0], (decayed @ query[..., None])[..., 0]


def _empty_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor,
    row_offsets: Tensor,
) -> Tensor:
    """Memory for the result of `delta_rule`.

    Raises:
        RuntimeError: the arguments do not fit.
    """
    torch._check(
        query.dim() == key.dim() == value.dim() == 3 and state.dim() == 4,
        lambda: (
            "query and key must be [tokens, heads, key_dim], value [tokens, heads, value_dim], "
            "state [slots, heads, key_dim, value_dim]"
        ),
    )
    heads, key_dim, value_dim = state.shape[1:]
    torch._check(
        tuple(query.shape[1:]) == tuple(key.shape[1:]) == (heads, key_dim)
        and tuple(value.shape[1:]) == (heads, value_dim)
        and tuple(decay.shape[1:]) in ((heads,), (heads, key_dim))
        and tuple(beta.shape[1:]) == (heads,),
        lambda: (
            f"the state holds {[heads, key_dim, value_dim]} (heads, key_dim, value_dim) a slot, "
            f"which query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}, "
            f"decay {list(decay.shape)} and beta {list(beta.shape)} do not fit"
        ),
    )
    check_rows((query, key, value, decay, beta), slots, row_offsets)
    return value.new_empty(value.shape)


torch.library.register_fake("inplace::delta_rule", _empty_delta_rule, lib=LIBRARY)


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
    """Gated linear attention whose state is corrected towards each value (the delta rule).

    ``S = exp(decay) * S``, ``S = S + key ⊗ (beta * (value - key · S))``, ``out = query · S``
    (Gated DeltaNet, arXiv:2412.06464; Kimi delta attention, arXiv:2510.26692).

    Args:
        query, key: ``[tokens, heads, key_dim]``, normalised and scaled.
        value: ``[tokens, heads, value_dim]``.
        decay: the logarithm of what is kept, at most 0: ``[tokens, heads]``, or
            ``[tokens, heads, key_dim]`` where each key component has its own.
        beta: ``[tokens, heads]``: how far the state moves towards the value.
        state: ``[slots, heads, key_dim, value_dim]``, mutated.
        slots: ``[rows]``, int32 or int64; a row with slot -1 writes nothing and its output is 0.
        row_offsets: ``[rows + 1]``.

    Returns:
        ``[tokens, heads, value_dim]``, the value's dtype.
    """
    out = torch.ops.inplace.delta_rule(query, key, value, decay, beta, state, slots, row_offsets)
    assert isinstance(out, Tensor)
    return out


define(
    "linear_recurrence",
    "(Tensor decay, Tensor x, Tensor(a!) state, Tensor slots, Tensor row_offsets) -> Tensor",
)


@torch.library.impl(LIBRARY, "linear_recurrence", "CompositeExplicitAutograd")
def _linear_recurrence(
    decay: Tensor, x: Tensor, state: Tensor, slots: Tensor, row_offsets: Tensor
) -> Tensor:
    out = _empty_linear_recurrence(decay, x, state, slots, row_offsets).zero_()

    def recurrence(inputs: Sequence[Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
        results = []
        for token_decay, token in zip(*(each.unbind(1) for each in inputs), strict=True):
            states = states * token_decay + token
            results.append(states)
        return torch.stack(results, 1), states

    return by_rows(recurrence, (decay, x), out, state, slots, row_offsets)


@torch.library.impl(LIBRARY, "linear_recurrence", "CUDA")
def _linear_recurrence_on_gpu(
    decay: Tensor, x: Tensor, state: Tensor, slots: Tensor, row_offsets: Tensor
) -> Tensor:
    """`linear_recurrence` in a Triton-language kernel, without a synchronisation with the host."""
    from inplace.kernels import recurrence as kernels  # imports Triton

    out = _empty_linear_recurrence(decay, x, state, slots, row_offsets)
    check_contiguous(state)
    if not slots.shape[0]:
        return out.zero_()
    kernels.linear_recurrence(
        decay=decay.contiguous(),
        x=x.contiguous(),
        state=state,
        slots=slots.int(),
        row_offsets=row_offsets.int(),
        out=out,
        tokens=x.shape[0],
        rows=slots.shape[0],
        channels=x.shape[1],
    )
    return out


def _empty_linear_recurrence(
    decay: Tensor, x: Tensor, state: Tensor, slots: Tensor, row_offsets: Tensor
) -> Tensor:
    """Memory for the result of `linear_recurrence`.

    Raises:
        RuntimeError: the arguments do not fit.
    """
    torch._check(
        x.dim() == 2 and decay.shape == x.shape and state.shape[1:] == x.shape[1:],
        lambda: (
            f"decay and x must be [tokens, channels] and state [slots, channels], not "
            f"{list(decay.shape)}, {list(x.shape)} and {list(state.shape)}"
        ),
    )
    check_rows((x,), slots, row_offsets)
    return x.new_empty(x.shape)


torch.library.register_fake("inplace::linear_recurrence", _empty_linear_recurrence, lib=LIBRARY)


def linear_recurrence(
    decay: Tensor, x: Tensor, state: Tensor, slots: Tensor, row_offsets: Tensor
) -> Tensor:
    """``h = decay * h + x``, for each channel alone (RG-LRU, arXiv:2402.19427, section 2.4).

    Args:
        decay, x: ``[tokens, channels]``.
        state: ``[slots, channels]``, mutated.
        slots: ``[rows]``, int32 or int64; a row with slot -1 writes nothing and its output is 0.
        row_offsets: ``[rows + 1]``.

    Returns:
        ``h`` of each token, ``[tokens, channels]``, x's dtype.
    """
    out = torch.ops.inplace.linear_recurrence(decay, x, state, slots, row_offsets)
    assert isinstance(out, Tensor)
    return out
