"""Attention over slots on a GPU: which kernels a step takes, with which blocks and scratch memory.

Nothing here reads device memory. Every decision follows from the spec and from token and row
counts, so a launch can be captured into a CUDA graph and stays right for any cached lengths.
"""

from dataclasses import dataclass

import triton

from inplace.kernels.attention_kernels import append_kernel, decode_kernel, prefill_kernel
from inplace.kernels.linear import shared_memory
from inplace.kernels.memory import Memory

MAX_DIM = 512
"""Largest head dimension that the kernels take."""


MAX_SPLITS = 64
"""Most programs that share one row and kv head (split-KV); a power of two."""


MIN_SPLITS = 4
"""Fewest programs that share a long slot, however many rows a step has: one of them may be long."""


TARGET_PROGRAMS = 512
"""Programs that fill a data-centre GPU (an H100 has 132 multiprocessors); more gain nothing."""


BLOCK_BYTES = 32 * 1024
"""Keys and values of a decode program's block; at 4 warps a quarter of a thread's registers."""


LATENT_SHARED_MEMORY = 144 * 1024
"""What a prefill program needs for 64 queries over latents of 512 elements, in 16 bits."""


@dataclass(frozen=True)
class AttentionSpec:
    """The static properties of one attention call.

    Attributes:
        heads, kv_heads: query head h reads kv head ``h // (heads / kv_heads)``.
        dim, value_dim: of a key and of a value, up to `MAX_DIM`.
        scale: factor of ``query @ key``.
        append, causal, window, ring, softcap: as in `inplace.operators.attention`.
        rotary: if not 0, the kernels apply the rotary embedding to the first ``rotary`` components
            of queries and new keys; component i is paired with ``i + rotary / 2``
            (arXiv:2104.09864, as transformers' Llama).
        sinks: each query head has a logit without a value, as in `inplace.operators.attention`.
        attention_chunk: as in `inplace.operators.attention`.
        bias_heads: heads of the bias: 1 for one that all share, 0 for no bias.
        latent: there is no value state: a value is the first ``value_dim`` elements of its key,
            which has more.
        quantized: the states are 8-bit floats (e4m3) with a scale of each kv head.

    Raises:
        ValueError: a combination that the kernels do not take.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    scale: float
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

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads are not a multiple of {self.kv_heads} kv heads"
            )
        if not (1 <= self.key_width <= MAX_DIM and 1 <= self.value_dim <= MAX_DIM):
            raise ValueError(
                f"head dimensions {self.key_width} and {self.value_dim} must be from 1 to {MAX_DIM}"
            )
        if self.latent and self.rotary:
            raise ValueError("keys that hold their values are not rotated")
        if self.latent and self.quantized:
            raise ValueError("keys that hold their values have no scales")
        if self.rotary % 2 or not 0 <= self.rotary <= self.dim:
            raise ValueError(
                f"rotary is {self.rotary}; it must be even and at most the head dimension "
                f"{self.dim}"
            )
        if min(self.window, self.attention_chunk, self.softcap) < 0:
            raise ValueError(
                f"window {self.window}, attention_chunk {self.attention_chunk} and softcap "
                f"{self.softcap} must not be negative"
            )
        if self.bias_heads not in (0, 1, self.heads) or (self.bias_heads and self.ring):
            raise ValueError(
                f"a bias is of 1 or {self.heads} heads, not {self.bias_heads}, and its states are "
                f"not rings"
            )

    @property
    def key_width(self) -> int:
        """Elements of a key that are not those of its value."""
        return self.dim - self.value_dim if self.latent else self.dim

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class DecodeBlocks:
    """How a decode step is divided.

    Attributes:
        min_split: fewest positions of a split.
        keys: positions of a block.
        warps, stages: of a program.
    """

    min_split: int = 128
    keys: int = 128
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class PrefillBlocks:
    """How a mixed step is divided.

    Attributes:
        queries: queries of a block: tokens times packed heads.
        keys: positions of a block.
        warps, stages: of a program.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def _padded(extent: int) -> int:
    """The extent of a block for `tl.dot`: a power of two, at least 16."""
    block: int = triton.next_power_of_2(extent)
    return max(16, block)


def decode_blocks(spec: AttentionSpec, itemsize: int) -> DecodeBlocks:
    """Blocks of a decode step over states whose elements have ``itemsize`` bytes in registers.

    Heads of 64 in 16 bits were measured on an H100: one block of 128 positions a program, no
    pipeline. Wider positions keep the bytes of a block, which is in registers from the first load
    on. Latents have more query heads, and results as wide as themselves: wide ones take more warps,
    by the registers that the compiler spills. ``min_split`` is always the same, because the
    workspace follows from it.
    """
    width = (_padded(spec.key_width) + _padded(spec.value_dim)) * itemsize  # bytes of a position
    warps = 8 if width >= (512 if spec.latent else 1024) else 4
    block_bytes = BLOCK_BYTES * warps // 4 if spec.latent else BLOCK_BYTES
    keys = DecodeBlocks.keys
    while keys > 16 and keys * width > block_bytes:
        keys //= 2
    return DecodeBlocks(keys=keys, warps=warps, stages=1 if keys == DecodeBlocks.keys else 2)


def prefill_blocks(spec: AttentionSpec, itemsize: int, tokens: int) -> PrefillBlocks:
    """Blocks of a mixed step; heads of 64 in 16 bits were measured on an H100 with 512 tokens."""
    widest = max(_padded(spec.key_width), _padded(spec.value_dim))
    if itemsize > 2:
        return PrefillBlocks(
            queries=32, keys=32 if widest <= 128 else 16, warps=4 if widest <= 128 else 8, stages=1
        )
    if widest <= 64:
        return PrefillBlocks(queries=64, keys=128, warps=4, stages=2)
    if widest <= 128:
        return PrefillBlocks(queries=64, keys=64, warps=4, stages=2)
    if widest <= 256:
        return PrefillBlocks(queries=64, keys=32, warps=8, stages=2)
    if spec.latent:  # a block is loaded once, for scores and results
        queries = 64 if shared_memory() >= LATENT_SHARED_MEMORY else 32
        return PrefillBlocks(queries=queries, keys=32, warps=8, stages=2)
    return PrefillBlocks(queries=32, keys=16, warps=8, stages=1)


def _group_block(spec: AttentionSpec) -> int:
    """Query heads of one decode program."""
    return min(32, _padded(spec.group))


def _head_blocks(spec: AttentionSpec) -> int:
    """Programs of a decode row and split: its kv heads times the blocks of their query heads."""
    blocks: int = triton.cdiv(spec.group, _group_block(spec))
    return spec.kv_heads * blocks


def _num_splits(spec: AttentionSpec, rows: int, capacity: int, min_split: int) -> int:
    """Programs that share one row and kv head of a decode step."""
    reach = min(capacity, spec.window or capacity, spec.attention_chunk or capacity)
    filling: int = triton.cdiv(TARGET_PROGRAMS, rows * _head_blocks(spec))
    parts: int = triton.cdiv(reach, min_split)
    return max(1, min(MAX_SPLITS, parts, max(MIN_SPLITS, filling)))


def attention_workspace(
    spec: AttentionSpec,
    tokens: int,
    rows: int,
    capacity: int,
    min_split: int = DecodeBlocks.min_split,
) -> int:
    """Bytes of scratch memory for every step of at most so many tokens and rows; may be 0.

    The memory may hold anything and must be 16-byte aligned.
    """
    splits = {r: _num_splits(spec, r, capacity, min_split) for r in range(1, min(rows, tokens) + 1)}
    if all(count == 1 for count in splits.values()):
        return 0
    return max(r * count for r, count in splits.items()) * spec.heads * (spec.value_dim + 1) * 4


def attention_locks(spec: AttentionSpec, rows: int) -> int:
    """How many int32 counters a step of at most so many rows needs.

    They must be 0 before the first launch; every launch leaves them 0.
    """
    return rows * _head_blocks(spec)


def attention(
    spec: AttentionSpec,
    *,
    query: Memory,
    key: Memory | None,
    value: Memory | None,
    query_stride: int,
    key_stride: int,
    value_stride: int,
    cos: Memory | None,
    sin: Memory | None,
    key_state: Memory,
    value_state: Memory | None,
    capacity: int,
    slots: Memory,
    row_offsets: Memory,
    write_indices: Memory,
    sinks: Memory | None,
    bias: Memory | None,
    out: Memory,
    workspace: Memory | None,
    locks: Memory | None,
    tokens: int,
    rows: int,
    key_scale: Memory | None = None,
    value_scale: Memory | None = None,
    pdl: bool = False,
    settled: bool = False,
) -> None:
    """Launch one step of ``inplace::attention`` on the current stream.

    If ``tokens == rows``, every row must have exactly one token; otherwise rows have any number of
    tokens. The runtime has checked that rows fit their slots: what would be written beyond a slot
    is dropped here without an error.

    Args:
        spec: the static properties.
        query: component d of head h of token t at element ``t * query_stride + h * dim + d``;
            fp32, fp16 or bf16.
        key, value: the same way over kv heads; None exactly when ``spec.append`` is False; no value
            if ``spec.latent``.
        query_stride, key_stride, value_stride: elements from token to token: the three may be
            slices of one merged projection.
        cos, sin: ``[tokens, rotary]``, any floating dtype; None exactly when ``spec.rotary`` is 0.
        key_state, value_state: ``[slots, kv_heads, capacity, dim]`` and ``[…, value_dim]``,
            contiguous; the query's dtype, or float8_e4m3fn if ``spec.quantized``. No value state if
            ``spec.latent``.
        capacity: positions of a slot.
        slots, row_offsets, write_indices: int32 ``[rows]``, ``[rows + 1]``, ``[rows]``; a slot of
            -1 is a null row.
        sinks: ``[heads]``, any floating dtype; None exactly when ``spec.sinks`` is False.
        bias: ``[tokens, spec.bias_heads, capacity]``, contiguous, any floating dtype; None exactly
            when ``spec.bias_heads`` is 0.
        out: ``[tokens, heads, value_dim]``, contiguous.
        workspace: `attention_workspace` bytes, as float32; None where that is 0.
        locks: `attention_locks` int32 zeros, not shared with a launch that may run at the same
            time; None where the workspace is 0.
        tokens, rows: extents of the step.
        key_scale, value_scale: ``[kv_heads]`` float32; None exactly when ``spec.quantized`` is
            False.
        pdl: use programmatic dependent launch (compute capability 9.0 or later). The kernels then
            wait for their predecessor on the stream before they read or write anything.
        settled: with ``pdl``, the caller guarantees that no earlier kernel of this step writes
            ``slots``, ``write_indices`` or a cached position of the states: they are loaded before
            the wait. Must be False where one of them is computed in the step (a cast, an addition),
            or where the step updates the states before this call.

    Raises:
        ValueError: arguments that contradict the spec.
    """
    needs_value = spec.append and not spec.latent
    if (spec.append, needs_value) != (key is not None, value is not None):
        raise ValueError("key and value must be given exactly when append is True")
    if spec.latent != (value_state is None):
        raise ValueError("a value state must be given exactly when the spec is not latent")
    if (spec.rotary > 0) != (cos is not None and sin is not None):
        raise ValueError(
            f"cos and sin must be given exactly when rotary is not 0; rotary is {spec.rotary}"
        )
    if spec.sinks != (sinks is not None):
        raise ValueError("sinks must be given exactly when the spec has them")
    if (spec.bias_heads > 0) != (bias is not None):
        raise ValueError("a bias must be given exactly when the spec has heads of one")
    if (spec.quantized,) * 2 != (key_scale is not None, value_scale is not None):
        raise ValueError("scales must be given exactly when the states are quantized")
    if tokens == 0 or rows == 0:
        return
    # The query stands for what is absent; the kernels do not read it.
    key, value = key if key is not None else query, value if value is not None else query
    value_state = value_state if value_state is not None else key_state
    cos, sin = cos if cos is not None else query, sin if sin is not None else query
    sinks = sinks if sinks is not None else query
    bias = bias if bias is not None else query
    key_scale = key_scale if key_scale is not None else query
    value_scale = value_scale if value_scale is not None else query
    itemsize = query.dtype.itemsize  # cached numbers of 8 bits become the query's type
    if tokens == rows:
        launch_decode(
            spec, decode_blocks(spec, itemsize), query, key, value, query_stride, key_stride,
            value_stride, cos, sin, key_state, value_state, capacity, slots, write_indices, sinks,
            bias, key_scale, value_scale, out, workspace, locks, rows, pdl, settled,
        )  # fmt: skip
        return
    if spec.append:
        launch_append(
            spec, key, value, key_stride, value_stride, cos, sin, key_state, value_state, capacity,
            slots, row_offsets, write_indices, key_scale, value_scale, tokens, rows, pdl,
        )  # fmt: skip
    launch_prefill(
        spec, prefill_blocks(spec, itemsize, tokens), query, query_stride, cos, sin, key_state,
        value_state, capacity, slots, row_offsets, write_indices, sinks, bias, key_scale,
        value_scale, out, tokens, rows, pdl,
    )  # fmt: skip


def launch_decode(
    spec: AttentionSpec, blocks: DecodeBlocks, query: Memory, key: Memory, value: Memory,
    query_stride: int, key_stride: int, value_stride: int, cos: Memory, sin: Memory,
    key_state: Memory, value_state: Memory, capacity: int, slots: Memory, write_indices: Memory,
    sinks: Memory, bias: Memory, key_scale: Memory, value_scale: Memory, out: Memory,
    workspace: Memory | None, locks: Memory | None, rows: int, pdl: bool, settled: bool = False,
) -> None:  # fmt: skip
    """Launch a step of one token a row, arguments as `attention`; benchmarks pass other blocks.

    Raises:
        ValueError: the step needs a workspace or locks and has none.
    """
    splits = _num_splits(spec, rows, capacity, blocks.min_split)
    if splits > 1 and (workspace is None or locks is None):
        size = attention_workspace(spec, rows, rows, capacity, blocks.min_split)
        raise ValueError(
            f"{rows} rows over a capacity of {capacity} need a workspace of {size} bytes, and locks"
        )
    block_h = min(_group_block(spec), triton.next_power_of_2(spec.group))
    block_v = _padded(spec.value_dim)
    decode_kernel[(rows, _head_blocks(spec), splits)](
        query, key, value, cos, sin, key_state, value_state, slots, write_indices, sinks, bias,
        key_scale, value_scale, out,
        out if workspace is None else workspace, slots if locks is None else locks,
        query_stride, key_stride, value_stride, capacity, splits, spec.scale,
        KV_HEADS=spec.kv_heads, GROUP=spec.group, DIM=spec.dim, VALUE_DIM=spec.value_dim,
        ROTARY=spec.rotary, APPEND=spec.append, WINDOW=spec.window,
        CHUNK=spec.attention_chunk, RING=spec.ring, SOFTCAP=spec.softcap, SINKS=spec.sinks,
        BIAS_HEADS=spec.bias_heads, LATENT=spec.latent, QUANTIZED=spec.quantized,
        SPLIT_KV=splits > 1,
        MIN_SPLIT=blocks.min_split,
        BLOCK_G=_group_block(spec), BLOCK_H=block_h, BLOCK_N=blocks.keys,
        BLOCK_D=_padded(spec.key_width), BLOCK_V=block_v,
        BLOCK_C=min(MAX_SPLITS, max(1, 4096 // (block_h * block_v))),
        STAGES=blocks.stages, PDL=pdl, PREFETCH=pdl and settled,
        num_warps=blocks.warps, launch_pdl=pdl,
    )  # fmt: skip


def launch_append(
    spec: AttentionSpec, key: Memory, value: Memory, key_stride: int, value_stride: int,
    cos: Memory, sin: Memory, key_state: Memory, value_state: Memory, capacity: int,
    slots: Memory, row_offsets: Memory, write_indices: Memory, key_scale: Memory,
    value_scale: Memory, tokens: int, rows: int, pdl: bool,
) -> None:  # fmt: skip
    """Append the keys and values of a mixed step, arguments as `attention`."""
    block_t = 16
    append_kernel[(triton.cdiv(tokens, block_t), spec.kv_heads)](
        key, value, cos, sin, key_state, value_state, slots, row_offsets, write_indices, key_scale,
        value_scale, key_stride, value_stride, capacity, rows, tokens,
        KV_HEADS=spec.kv_heads, DIM=spec.dim, VALUE_DIM=spec.value_dim, ROTARY=spec.rotary,
        RING=spec.ring, LATENT=spec.latent, QUANTIZED=spec.quantized,
        BLOCK_R=triton.next_power_of_2(rows), BLOCK_T=block_t,
        BLOCK_D=_padded(spec.key_width), BLOCK_V=_padded(spec.value_dim), PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip


def launch_prefill(
    spec: AttentionSpec, blocks: PrefillBlocks, query: Memory, query_stride: int,
    cos: Memory, sin: Memory, key_state: Memory, value_state: Memory, capacity: int,
    slots: Memory, row_offsets: Memory, write_indices: Memory, sinks: Memory, bias: Memory,
    key_scale: Memory, value_scale: Memory, out: Memory, tokens: int, rows: int, pdl: bool,
) -> None:  # fmt: skip
    """Attend in a mixed step whose keys are in their slots, arguments as `attention`.

    Benchmarks pass other blocks.
    """
    # At most 16 heads in a pack; all packs of about the same size.
    pack = triton.cdiv(spec.group, triton.cdiv(spec.group, 16))
    grid = (
        tokens // (blocks.queries // pack) + rows,
        spec.kv_heads * triton.cdiv(spec.group, pack),
    )
    prefill_kernel[grid](
        query, cos, sin, key_state, value_state, slots, row_offsets, write_indices, sinks, bias,
        key_scale, value_scale, out, query_stride, capacity, spec.scale, rows,
        KV_HEADS=spec.kv_heads, GROUP=spec.group, DIM=spec.dim, VALUE_DIM=spec.value_dim,
        ROTARY=spec.rotary, APPEND=spec.append, CAUSAL=spec.causal, WINDOW=spec.window,
        CHUNK=spec.attention_chunk, RING=spec.ring, SOFTCAP=spec.softcap, SINKS=spec.sinks,
        BIAS_HEADS=spec.bias_heads, LATENT=spec.latent, QUANTIZED=spec.quantized, PACK=pack,
        BLOCK_R=triton.next_power_of_2(rows), BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
        BLOCK_D=_padded(spec.key_width), BLOCK_V=_padded(spec.value_dim), STAGES=blocks.stages,
        PDL=pdl, num_warps=blocks.warps, launch_pdl=pdl,
    )  # fmt: skip
