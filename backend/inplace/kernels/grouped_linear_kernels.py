"""The kernels of linear layers whose rows have experts.

A *pair* is a token with one of its experts; the rows of an expert are the pairs that have it. Pairs
with an id that is no expert's are the rows of one expert more, whose result is 0.
"""

import triton
import triton.language as tl

from inplace.kernels.linear_kernels import activate


@triton.jit
def multiply_rows(
    x, weight, bias, out, expert, pair, present, n, inputs, width, experts, per_token,
    SHARED: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store outputs ``n`` of the pairs ``pair``, all of one expert, as ``weight @ x.T``.

    ``SHARED``: x has a vector for each token, otherwise one for each pair. ``GATED``: the weight
    has ``2 * width`` outputs, the first half of which is the gate. ``EVEN``: ``inputs`` is a
    multiple of ``BLOCK_K``.
    """
    k = tl.arange(0, BLOCK_K)
    outputs = 2 * width if GATED else width
    inside = (n < width) & (expert < experts)
    pair = tl.where(present, pair, 0).to(tl.int64)
    columns = x + (pair // per_token if SHARED else pair) * inputs
    matrix = weight + expert.to(tl.int64) * inputs * outputs
    rows = matrix + (n if TRANSPOSED else n.to(tl.int64) * inputs)
    up_rows = rows + (width if TRANSPOSED else width.to(tl.int64) * inputs)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    step = k.to(tl.int64) * outputs if TRANSPOSED else k
    w_at, u_at = rows[:, None] + step[None, :], up_rows[:, None] + step[None, :]
    x_at = columns[None, :] + k[:, None]
    further = outputs.to(tl.int64) * BLOCK_K if TRANSPOSED else BLOCK_K
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        known, given = inside[:, None], present[None, :]
        if not EVEN:
            known = known & (start + k < inputs)[None, :]
            given = given & (start + k < inputs)[:, None]
        w = tl.load(w_at, mask=known, other=0.0)
        value = tl.load(x_at, mask=given, other=0.0)
        acc = tl.dot(w, value, acc, input_precision="ieee")
        if GATED:
            u = tl.load(u_at, mask=known, other=0.0)
            up_acc = tl.dot(u, value, up_acc, input_precision="ieee")
        w_at += further
        u_at += further
        x_at += BLOCK_K
    if BIAS:
        own = bias + expert * outputs + n
        acc += tl.load(own, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_acc += tl.load(own + width, mask=inside, other=0.0).to(tl.float32)[:, None]
    y = activate(acc, ACTIVATION)
    if GATED:
        y *= up_acc
    y = tl.where(expert < experts, y, 0.0)  # not 0 x NaN
    at = out + pair[None, :] * width + n[:, None]
    tl.store(at, y.to(out.dtype.element_ty), mask=(n < width)[:, None] & present[None, :])


@triton.jit
def few_pairs_kernel(
    x, expert_ids, weight, bias, out, pairs, inputs, width, experts, per_token,
    SHARED: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, BY_EXPERT: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows of one expert, ``BLOCK_N`` outputs of each a program.

    The second axis of the grid is the expert with ``BY_EXPERT``, otherwise a pair: its program
    works for the expert of the pair if no earlier pair has it, so with few pairs no program is
    there for an expert that is not used. Every program looks at all ids; the list of the rows that
    are its own costs no kernel and no memory.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, PAIRS)
    ids = tl.load(expert_ids + j, mask=j < pairs, other=-1).to(tl.int32)
    ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
    ids = tl.where(j < pairs, ids, -1)
    expert = group
    if not BY_EXPERT:
        expert = tl.sum(tl.where(j == group, ids, 0), 0)
    own = (ids == expert).to(tl.int32)
    place = tl.cumsum(own, 0)
    count = tl.sum(own, 0)
    if not BY_EXPERT:
        first = tl.min(tl.where(ids == expert, j, PAIRS), 0)
        count = tl.where(first == group, count, 0)
    for start in tl.range(0, count, BLOCK_M, num_stages=1):
        m = start + tl.arange(0, BLOCK_M)
        # `place` is at most m for the pairs before the expert's m-th one, and larger from it on
        pair = tl.sum((place[None, :] <= m[:, None]).to(tl.int32), 1)
        multiply_rows(
            x, weight, bias, out, expert, pair, m < count, n, inputs, width, experts, per_token,
            SHARED, BIAS, TRANSPOSED, ACTIVATION, GATED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit
def group_pairs_kernel(
    expert_ids, workspace, pairs, experts, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Sort the pairs by their experts; the pairs of one expert a program.

    The workspace is ``offsets[experts + 1]``, then ``order[pairs]``: the pairs of expert e become
    ``order[offsets[e]:offsets[e + 1]]``, in order. A program counts the pairs of smaller experts
    itself, so none waits for another.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    order = workspace + experts + 1
    smaller = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids + j, mask=j < pairs, other=experts).to(tl.int32)
        ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
        smaller += (ids < expert).to(tl.int32)
    offset = tl.sum(smaller, 0)
    tl.store(workspace + expert, offset)
    for start in range(0, pairs, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids + j, mask=j < pairs, other=experts).to(tl.int32)
        ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
        own = ((ids == expert) & (j < pairs)).to(tl.int32)
        tl.store(order + offset + tl.cumsum(own, 0) - 1, j, mask=own != 0)
        offset += tl.sum(own, 0)


@triton.jit
def many_pairs_kernel(
    x, workspace, weight, bias, out, pairs, inputs, width, experts, per_token,
    SHARED: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grouped products of sorted pairs: ``BLOCK_M`` pairs of one expert a program.

    The second axis of the grid has as many tiles as there can be; those beyond the last do nothing.
    Programs of one tile follow each other, so that its rows and the expert's weights stay in the L2
    cache.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, EXPERTS)
    begin = tl.load(workspace + e, mask=e <= experts, other=pairs)
    end = tl.load(workspace + e + 1, mask=e < experts, other=pairs)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    through = tl.cumsum(tiles, 0)
    expert = tl.sum((through <= tile).to(tl.int32), 0)
    if expert <= experts:
        chosen = e == expert
        before = tl.sum(tl.where(chosen, through - tiles, 0), 0)
        stop = tl.sum(tl.where(chosen, end, 0), 0)
        m = tl.sum(tl.where(chosen, begin, 0), 0) + (tile - before) * BLOCK_M
        m += tl.arange(0, BLOCK_M)
        pair = tl.load(workspace + experts + 1 + m, mask=m < stop, other=0)
        multiply_rows(
            x, weight, bias, out, expert, pair, m < stop, n, inputs, width, experts, per_token,
            SHARED, BIAS, TRANSPOSED, ACTIVATION, GATED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
