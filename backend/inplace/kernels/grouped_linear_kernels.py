"""The kernels of linear layers whose rows have experts.

A *pair* is a token with one of its experts; the rows of an expert are the pairs that have it. Pairs
with an id that is not an expert's are the rows of one expert more, whose result is 0.
"""

import triton
import triton.language as tl

from inplace.kernels.linear_kernels import activate


@triton.jit
def multiply_rows(
    x, weight, bias, scale, out, expert, pair, present, n, inputs, width, experts, per_token,
    SHARED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """Store outputs ``n`` of the pairs ``pair``, all of one expert.

    ``SHARED``: x has a vector for each token, otherwise one for each pair. ``GATED``: the weight
    has ``2 * width`` outputs, the first half of which is the gate. ``EVEN``: ``inputs`` is a
    multiple of ``BLOCK_K``. ``SCALED``: weights are 8-bit floats, with a scale for each output.
    ``MASKED``: nothing is read for pairs that are not present and for
    outputs beyond the last one; otherwise what is read for them belongs to others. ``ROWS_FIRST``:
    the product is ``x @ weight.T``, otherwise ``weight @ x.T``, whose second extent may be 16.
    """
    k = tl.arange(0, BLOCK_K)
    outputs = 2 * width if GATED else width
    inside = (n < width) & (expert < experts)
    pair = tl.where(present, pair, 0)
    vectors = x + (pair // per_token if SHARED else pair).to(tl.int64) * inputs
    matrix = weight + tl.where(expert < experts, expert, 0).to(tl.int64) * inputs * outputs
    existing = tl.where(n < width, n, 0)
    rows = matrix + (existing if TRANSPOSED else existing.to(tl.int64) * inputs)
    up_rows = rows + (width if TRANSPOSED else tl.cast(width, tl.int64) * inputs)
    step = k.to(tl.int64) * outputs if TRANSPOSED else k
    w_at, u_at = rows[:, None] + step[None, :], up_rows[:, None] + step[None, :]
    if ROWS_FIRST:
        x_at = vectors[:, None] + k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        x_at = vectors[None, :] + k[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        up_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    further = tl.cast(outputs, tl.int64) * BLOCK_K if TRANSPOSED else BLOCK_K
    for start in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        known = inside[:, None]
        given = present[:, None] if ROWS_FIRST else present[None, :]
        if not EVEN:
            rest = start + k < inputs
            known = known & rest[None, :]
            given = given & (rest[None, :] if ROWS_FIRST else rest[:, None])
        if MASKED or not EVEN:
            w = tl.load(w_at, mask=known, other=0.0)
            value = tl.load(x_at, mask=given, other=0.0)
        else:
            w, value = tl.load(w_at), tl.load(x_at)
        w = w.to(value.dtype)  # of 8-bit floats, without rounding
        if ROWS_FIRST:
            acc = tl.dot(value, tl.trans(w), acc, input_precision="ieee")
        else:
            acc = tl.dot(w, value, acc, input_precision="ieee")
        if GATED:
            if MASKED or not EVEN:
                u = tl.load(u_at, mask=known, other=0.0)
            else:
                u = tl.load(u_at)
            u = u.to(value.dtype)
            if ROWS_FIRST:
                up_acc = tl.dot(value, tl.trans(u), up_acc, input_precision="ieee")
            else:
                up_acc = tl.dot(u, value, up_acc, input_precision="ieee")
        w_at += further
        u_at += further
        x_at += BLOCK_K
    if SCALED:
        own = scale + expert * outputs + n
        factor = tl.load(own, mask=inside, other=0.0)
        acc *= factor[None, :] if ROWS_FIRST else factor[:, None]
        if GATED:
            factor = tl.load(own + width, mask=inside, other=0.0)
            up_acc *= factor[None, :] if ROWS_FIRST else factor[:, None]
    if BIAS:
        own = bias + expert * outputs + n
        added = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        acc += added[None, :] if ROWS_FIRST else added[:, None]
        if GATED:
            added = tl.load(own + width, mask=inside, other=0.0).to(tl.float32)
            up_acc += added[None, :] if ROWS_FIRST else added[:, None]
    y = activate(acc, ACTIVATION)
    if GATED:
        y *= up_acc
    y = tl.where(expert < experts, y, 0.0).to(out.dtype.element_ty)  # not 0 x NaN
    to = out + pair.to(tl.int64) * width
    if ROWS_FIRST:
        tl.store(to[:, None] + n[None, :], y, mask=present[:, None] & (n < width)[None, :])
    else:
        tl.store(to[None, :] + n[:, None], y, mask=present[None, :] & (n < width)[:, None])


@triton.jit
def few_pairs_kernel(
    x, expert_ids, weight, bias, scale, out, pairs, inputs, width, experts, per_token,
    SHARED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
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
            x, weight, bias, scale, out, expert, pair, m < count, n, inputs, width, experts,
            per_token, SHARED, BIAS, SCALED, TRANSPOSED, ACTIVATION, GATED, EVEN, True,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES, False,
        )  # fmt: skip


@triton.jit
def group_pairs_kernel(
    expert_ids, workspace, pairs, experts,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sort the pairs by their experts; the pairs of one expert a program.

    The workspace is ``offsets[experts + 2]``, ``order[pairs]`` and ``owners[tiles]``. The pairs of
    expert e become ``order[offsets[e]:offsets[e + 1]]``, in order. Its tiles of ``BLOCK_M`` pairs
    begin at tile ``offsets[e] // BLOCK_M + e``, where there is room for all of them, and
    ``owners`` has e for them and for those that the room leaves empty. A program counts the pairs
    of smaller experts itself, so none waits for another.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    order = workspace + experts + 2
    owners = order + pairs
    smaller = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids + j, mask=j < pairs, other=experts).to(tl.int32)
        ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
        smaller += (ids < expert).to(tl.int32)
    begin = tl.sum(smaller, 0)
    tl.store(workspace + expert, begin)
    end = begin
    for start in range(0, pairs, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids + j, mask=j < pairs, other=experts).to(tl.int32)
        ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
        own = ((ids == expert) & (j < pairs)).to(tl.int32)
        tl.store(order + end + tl.cumsum(own, 0) - 1, j, mask=own != 0)
        end += tl.sum(own, 0)
    if expert == experts:
        tl.store(workspace + experts + 1, pairs)
    last = end // BLOCK_M + expert + 1
    for first in range(begin // BLOCK_M + expert, last, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        tl.store(owners + tile, tl.zeros_like(tile) + expert, mask=tile < last)


@triton.jit
def multiply_tile(
    x, order, weight, bias, scale, out, expert, first, end, n, inputs, width, experts, per_token,
    SHARED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """Store outputs ``n`` of up to ``BLOCK_M`` sorted pairs of an expert, from ``first`` on."""
    m = first + tl.arange(0, BLOCK_M)
    pair = tl.load(order + m, mask=m < end, other=0)
    multiply_rows(
        x, weight, bias, scale, out, expert, pair, m < end, n, inputs, width, experts, per_token,
        SHARED, BIAS, SCALED, TRANSPOSED, ACTIVATION, GATED, EVEN, False,
        BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ROWS_FIRST,
    )  # fmt: skip


@triton.jit
def many_pairs_kernel(
    x, workspace, weight, bias, scale, out, pairs, inputs, width, experts, per_token, together,
    SHARED: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, REST: tl.constexpr, ROWS_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grouped products of sorted pairs: ``BLOCK_M`` pairs of one expert a program.

    The pairs of an expert that are left after its whole tiles are multiplied as ``REST`` pairs if
    so many are enough; 0 if not. ``together`` tiles take the same outputs one after another, so
    that the weight of these outputs is read from memory once for all tiles of an expert, and stays
    in the L2 cache as long as that takes. Some programs find no pairs and do nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tiles = pairs // BLOCK_M + experts + 1
    blocks = (width + BLOCK_N - 1) // BLOCK_N
    index = tl.program_id(0)
    group = index // (together * blocks)
    size = min(tiles - group * together, together)
    place = index % (together * blocks)
    tile = group * together + place % size
    n = place // size * BLOCK_N + tl.arange(0, BLOCK_N)
    order = workspace + experts + 2
    expert = tl.load(order + pairs + tile)
    begin, end = tl.load(workspace + expert), tl.load(workspace + expert + 1)
    first = begin + (tile - begin // BLOCK_M - expert) * BLOCK_M
    if first < end:
        if REST == 0:
            multiply_tile(
                x, order, weight, bias, scale, out, expert, first, end, n, inputs, width, experts,
                per_token, SHARED, BIAS, SCALED, TRANSPOSED, ACTIVATION, GATED, EVEN,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ROWS_FIRST,
            )  # fmt: skip
        elif end - first <= REST:
            multiply_tile(
                x, order, weight, bias, scale, out, expert, first, end, n, inputs, width, experts,
                per_token, SHARED, BIAS, SCALED, TRANSPOSED, ACTIVATION, GATED, EVEN,
                REST, BLOCK_N, BLOCK_K, STAGES, False,
            )  # fmt: skip
        else:
            multiply_tile(
                x, order, weight, bias, scale, out, expert, first, end, n, inputs, width, experts,
                per_token, SHARED, BIAS, SCALED, TRANSPOSED, ACTIVATION, GATED, EVEN,
                BLOCK_M, BLOCK_N, BLOCK_K, STAGES, ROWS_FIRST,
            )  # fmt: skip


@triton.jit
def sum_pairs_kernel(
    x, weights, out, width, PER_TOKEN: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Program (token, block of columns): the weighted sum over the pairs of the token."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for place in tl.static_range(PER_TOKEN):
        pair = token * PER_TOKEN + place
        value = tl.load(x + pair * width + n, mask=n < width, other=0.0)
        total += value.to(tl.float32) * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * width + n, total.to(out.dtype.element_ty), mask=n < width)
