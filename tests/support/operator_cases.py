"""Every operator that has a converter, in small modules.

The CPU tests compile them, the GPU tests compare them with PyTorch.
"""

import torch
from torch import nn

from support.core_cases import CORE
from support.operator_case import (
    B16,
    BOOL,
    I32,
    I64,
    POSITIVE,
    POSITIVE_WHOLE,
    TRUTH,
    TWO,
    WHOLE_32,
    Arg,
    Batch,
    F,
    H,
    X,
    Z,
    fn,
    op,
)
from support.scatter_cases import SCATTERS

aten = torch.ops.aten

Y = Arg(("n", 8))
HALF_X, BF16_X = Arg(("n", 8), H), Arg(("n", 8), B16)
IDS = Arg(("n",), I64, 0, 8)

ARITHMETIC = [
    op(aten.add.Tensor, X, Y),
    op(aten.add.Tensor, X, Y, alpha=0.5, name="add-alpha"),
    op(aten.add.Tensor, X, POSITIVE_WHOLE, name="add-promotes"),
    op(aten.add.Tensor, TRUTH, TRUTH),
    op(aten.add.Tensor, BF16_X, 1e-3, name="add-half-scalar"),
    op(aten.add.Scalar, POSITIVE_WHOLE, 3),
    op(aten.sub.Tensor, X, Arg((8,)), alpha=2, name="sub-broadcast-alpha"),
    op(aten.sub.Scalar, X, 1.5),
    op(aten.rsub.Scalar, X, 1.0),
    op(aten.rsub.Tensor, X, Y),
    op(aten.mul.Tensor, Z, Arg((4, 1)), name="mul-broadcast"),
    op(aten.mul.Tensor, TRUTH, TRUTH),
    op(aten.mul.Scalar, HALF_X, 0.1),
    op(aten.div.Tensor, X, POSITIVE),
    op(aten.div.Tensor, POSITIVE_WHOLE, Arg(("n", 8), I32, 1, 9), name="div-of-integers"),
    op(aten.div.Scalar, X, 3.0),
    op(aten.div.Tensor_mode, WHOLE_32, Arg(("n", 8), I32, 1, 5), rounding_mode="floor"),
    op(aten.div.Scalar_mode, X, 0.7, rounding_mode="floor"),
    op(aten.floor_divide.default, WHOLE_32, Arg(("n", 8), I32, 1, 5)),
    op(aten.floor_divide.Scalar, WHOLE_32, 4),
    op(aten.remainder.Scalar, WHOLE_32, 4),
    op(aten.remainder.Tensor, X, POSITIVE),
    op(aten.maximum.default, X, Y),
    op(aten.max.other, X, Y),
    op(aten.minimum.default, X, Y),
    op(aten.min.other, X, Y),
    op(aten.clamp.default, X, -0.5, 1),
    op(aten.clamp.default, WHOLE_32, None, 3),
    op(aten.clamp.Tensor, X, Arg((8,), low=-1.0, high=0.0), Arg((8,), low=0.0, high=1.0)),
    op(aten.clamp_min.default, BF16_X, 0.1),
    op(aten.clamp_max.default, X, 0.1),
    op(aten.pow.Tensor_Scalar, X, 3.0),
    op(aten.pow.Tensor_Scalar, POSITIVE_WHOLE, 2),
    op(aten.pow.Tensor_Scalar, POSITIVE, -0.5, name="pow-inverse-root"),
    op(aten.pow.Tensor_Scalar, POSITIVE, 1.7, name="pow-fraction"),
    op(aten.pow.Tensor_Scalar, X, 0, name="pow-zero"),
    op(aten.pow.Tensor_Tensor, POSITIVE, Y),
    op(aten.pow.Scalar, 10000.0, Arg(("n", 8), low=0.0, high=1.0)),
]

FUNCTIONS = [
    *(
        op(overload, POSITIVE)
        for overload in (
            aten.log.default,
            aten.sqrt.default,
            aten.rsqrt.default,
            aten.reciprocal.default,
        )
    ),
    *(
        op(overload, X)
        for overload in (
            aten.exp.default,
            aten.erf.default,
            aten.cos.default,
            aten.sin.default,
            aten.floor.default,
            aten.ceil.default,
            aten.round.default,
            aten.tanh.default,
            aten.sigmoid.default,
            aten.silu.default,
            aten.relu.default,
            aten.gelu.default,
            aten.neg.default,
            aten.abs.default,
        )
    ),
    *(
        op(overload, BF16_X)
        for overload in (
            aten.silu.default,
            aten.gelu.default,
            aten.cos.default,
            aten.neg.default,
            aten.relu.default,
        )
    ),
    op(aten.gelu.default, HALF_X, approximate="tanh", name="gelu-tanh"),
    op(aten.neg.default, POSITIVE_WHOLE),
    op(aten.to.dtype, X, B16),
    op(aten.to.dtype, X, I32, name="to-int"),
    op(aten.to.dtype, WHOLE_32, BOOL, name="to-bool"),
    op(aten.to.dtype, TRUTH, F, name="to-from-bool"),
    op(aten.to.device, X, torch.device("cpu"), H),
    op(aten.to.dtype_layout, X, dtype=H),
    op(aten.to.other, X, Arg((8,), H)),
    op(aten.type_as.default, X, Arg((8,), H)),
    op(aten._to_copy.default, X, dtype=H),
    op(aten.clone.default, X),
    op(aten.contiguous.default, X),
    op(aten.alias.default, X),
    op(aten.detach.default, X),
    op(aten.positive.default, X),
    op(aten.dropout.default, X, 0.5, False),
    op(aten.feature_dropout.default, Z, 0.5, False),
    fn("constant-in-forward", lambda x: x * torch.tensor(2.5), X),
]

LOGIC = [
    *(
        op(getattr(aten, name).Tensor, WHOLE_32, POSITIVE_WHOLE)
        for name in ("eq", "ne", "gt", "lt", "ge", "le")
    ),
    *(op(getattr(aten, name).Scalar, X, 0.5) for name in ("eq", "ne", "gt", "lt", "ge", "le")),
    op(aten.eq.Tensor, TRUTH, TRUTH, name="eq-of-bools"),
    op(aten.gt.Scalar, WHOLE_32, 1.5, name="gt-promotes"),
    *(
        op(getattr(aten, f"logical_{name}").default, TRUTH, WHOLE_32)
        for name in ("and", "or", "xor")
    ),
    *(
        op(getattr(aten, f"bitwise_{name}").Tensor, TRUTH, Arg((8,), BOOL))
        for name in ("and", "or", "xor")
    ),
    *(op(getattr(aten, f"__{name}__").Tensor, TRUTH, TRUTH) for name in ("and", "or", "xor")),
    op(aten.logical_not.default, WHOLE_32),
    op(aten.bitwise_not.default, TRUTH),
    op(aten.where.self, TRUTH, X, Y),
    op(aten.where.ScalarOther, TRUTH, X, 0.0),
    op(aten.where.ScalarSelf, TRUTH, 1.0, X),
    op(aten.where.Scalar, TRUTH, 1.0, 0.0),
    op(aten.masked_fill.Scalar, X, TRUTH, float("-inf")),
    op(aten.masked_fill.Tensor, X, TRUTH, Arg(())),
]

SHAPES = [
    fn("view", lambda x: x.view(x.shape[0], -1, 2, 4), Z),
    fn("reshape", lambda x: x.transpose(1, 2).reshape(x.shape[0], 4, -1), Z),
    fn("view-two-unknown", lambda x: x.view(x.shape[0], x.shape[1], 2, 4), TWO),
    fn("view-merges-unknown", lambda x: x.view(-1, 4), TWO),
    fn("view-splits-unknown", lambda x: x.view(x.shape[0], 2, -1), Arg(("n", 8))),
    op(aten._unsafe_view.default, Arg((4, 6)), [2, 12]),
    op(aten.unsqueeze.default, X, 1),
    op(aten.unsqueeze.default, TWO, -1, name="unsqueeze-two-unknown"),
    op(aten.squeeze.dim, Arg(("n", 1, 8)), 1),
    op(aten.squeeze.dims, Arg((1, "n", 1, 8)), [0, 2]),
    op(aten.squeeze.default, Arg((2, 1, 8))),
    op(aten.flatten.using_ints, Z, 1),
    op(aten.unflatten.int, X, 1, [2, 4]),
    fn("view_as", aten.view_as.default, X, Arg(("n", 2, 4))),
    fn("reshape_as", aten.reshape_as.default, X, Arg(("n", 2, 4))),
    op(aten.permute.default, Z, [2, 0, -2]),
    op(aten.transpose.int, Z, 1, -1),
    op(aten.swapaxes.default, Z, 0, 1),
    op(aten.t.default, X),
    op(aten.numpy_T.default, X),
    op(aten.mT.default, Z),
    op(aten.expand.default, Arg(("n", 1, 8)), [-1, 4, -1]),
    fn("expand-to-unknown", lambda x, y: x.expand(y.shape[0], y.shape[1], -1), Arg((1, 8)), TWO),
    op(aten.expand_as.default, Arg((1, 8)), X),
    fn(
        "broadcast_to", lambda x: aten.broadcast_to.default(x, [x.shape[0], 4, 8]), Arg(("n", 1, 8))
    ),
    op(aten.repeat.default, X, [2, 1, 3]),
    op(aten.slice.Tensor, X, 1, 2, 7, 2),
    op(aten.slice.Tensor, X, 1, -3, 2**63 - 1, name="slice-from-end"),
    op(aten.slice.Tensor, X, 0, 1, 2**63 - 1, name="slice-unknown"),
    op(aten.slice.Tensor, TWO, 1, 0, -1, name="slice-two-unknown"),
    fn("slice-to-unknown", lambda table, x: table[: x.shape[0]] + x, Arg((16, 8)), X),
    op(aten.narrow.default, X, 1, 2, 3),
    op(aten.select.int, Z, 1, 2),
    op(aten.select.int, Z, 0, -1, name="select-last-of-unknown"),
    fn("split", lambda x: list(aten.split.Tensor(x, 3, 1)), X),
    fn("split-sizes", lambda x: list(aten.split_with_sizes.default(x, [1, 5, 2], -1)), X),
    fn("split.sizes", lambda x: list(aten.split.sizes(x, [1, 5, 2], dim=1)), X),
    fn("chunk", lambda x: list(aten.chunk.default(x, 3, -1)), X),
    fn("tensor_split", lambda x: list(aten.tensor_split.sections(x, 3, 1)), X),
    fn("unbind", lambda x: list(aten.unbind.int(x, 1)), Z),
    op(aten.cat.default, [X, WHOLE_32], 1),
    op(aten.concat.default, [X, Y], 0),
    op(aten.stack.default, [X, Y], -1),
    fn("full", lambda x: aten.full.default([x.shape[0], 3], 1.5), X),
    op(aten.full_like.default, X, 0.5),
    fn("new_full", lambda x: aten.new_full.default(x, [x.shape[0], 2], 3.0), X),
    fn("zeros", lambda x: aten.zeros.default([x.shape[0], 2]) + x[:, :2], X),
    op(aten.zeros_like.default, POSITIVE_WHOLE),
    fn("new_zeros", lambda x: aten.new_zeros.default(x, [x.shape[0], 2]), X),
    fn("ones", lambda x: aten.ones.default([x.shape[0], 2], dtype=I64), X),
    op(aten.ones_like.default, TRUTH),
    fn("new_ones", lambda x: aten.new_ones.default(x, [2, x.shape[0]]), X),
    fn("scalar_tensor", lambda x: x + aten.scalar_tensor.default(2.0), X),
    fn("arange", lambda x: torch.arange(x.shape[0]), X),
    fn("arange-start", lambda x: torch.arange(2, x.shape[0] + 2, dtype=I32), X),
    fn(
        "arange-step", lambda x: torch.arange(0, 3 * x.shape[0], 3) + torch.arange(1, 2, dtype=F), X
    ),
    fn("arange-constant", lambda x: x * torch.arange(8), X),
    fn(
        "extents",
        lambda x: torch.full((x.shape[0] * 2 + x.shape[1] // 2 + 1, x.shape[1] % 3 + 1), 1.0),
        TWO,
    ),
]

INDEXING = [
    fn("embedding", lambda ids, table: table(ids), IDS, table=nn.Embedding(8, 16)),
    op(aten.index_select.default, Z, 1, Arg((3,), I32, 0, 4)),
    op(aten.gather.default, Z, 1, Arg(("n", 2, 8), I64, 0, 4)),
    fn("index", lambda x, i: x[i], Arg((8, 5)), Arg(("n",), I64, -8, 8)),
    fn("index-inner", lambda x, i: x[:, i], Z, Arg(("m", 2), I32, 0, 4)),
]

MATRICES = [
    fn("linear", lambda x, part: part(x), Z, part=nn.Linear(8, 16)),
    fn("linear-vector", lambda x, part: part(x[0]), X, part=nn.Linear(8, 16, bias=False)),
    fn("linear-two-unknown", lambda x, part: part(x), TWO, part=nn.Linear(8, 16)),
    fn("linear-bfloat16", lambda x, part: part(x), BF16_X, part=nn.Linear(8, 16).to(B16)),
    fn("linear-float16", lambda x, part: part(x), HALF_X, part=nn.Linear(8, 16).to(H)),
    op(aten.matmul.default, Z, Arg((8, 5))),
    op(aten.matmul.default, X, Arg((8,)), name="matmul-vector"),
    op(aten.matmul.default, Arg((8,)), Arg(("n", 8, 3)), name="vector-matmul"),
    op(aten.mm.default, X, Arg((8, 5))),
    op(aten.bmm.default, Z, Arg(("n", 8, 5))),
    op(aten.addmm.default, Arg((5,)), X, Arg((8, 5))),
    op(aten.addmm.default, Arg((5,)), X, Arg((8, 5)), beta=0.5, alpha=2, name="addmm-scaled"),
    op(aten.baddbmm.default, Arg(("n", 1, 5)), Z, Arg(("n", 8, 5))),
]

_QKV = [Arg(("n", 4, extent, 8)) for extent in ("m", "m", "m")]
_SDPA = aten.scaled_dot_product_attention.default
ATTENTION = [
    op(_SDPA, *_QKV, name="sdpa"),
    op(_SDPA, *_QKV, None, 0.0, True, name="sdpa-causal"),
    op(
        _SDPA,
        Arg((2, 4, "n", 8)),
        *[Arg((2, 4, "m", 8))] * 2,
        Arg(("n", "m")),
        name="sdpa-mask",
        scale=0.5,
    ),
    op(_SDPA, Arg((2, 4, 3, 8)), *[Arg((2, 4, 3, 8))] * 2, name="sdpa-static"),
    fn(
        "sdpa-bool-mask",
        lambda q, k, v, mask: _SDPA(q, k, v, attn_mask=mask),
        Arg(("n", 4, 3, 8)),
        *[Arg(("n", 4, 5, 8))] * 2,
        mask=torch.ones(3, 5, dtype=BOOL).tril(2),
    ),
    op(
        _SDPA,
        Arg(("n", 4, "m", 8), B16),
        *[Arg(("n", 2, "m", 8), B16)] * 2,
        name="sdpa-grouped-bfloat16",
        enable_gqa=True,
    ),
]

NORMALIZATIONS = [
    fn("layer_norm", lambda x, part: part(x), Z, part=nn.LayerNorm(8)),
    fn(
        "layer_norm-plain",
        lambda x, part: part(x),
        Z,
        part=nn.LayerNorm([4, 8], elementwise_affine=False),
    ),
    fn("layer_norm-float16", lambda x, part: part(x), HALF_X, part=nn.LayerNorm(8).half()),
    fn("rms_norm", lambda x, part: part(x), BF16_X, part=nn.RMSNorm(8).to(B16)),
    op(aten.softmax.int, Z, 1),
    op(aten.softmax.int, HALF_X, -1, F, name="softmax-float16-to-float32"),
    op(aten._softmax.default, X, -1, False),
    op(aten.log_softmax.int, X, -1),
    op(aten._log_softmax.default, X, -1, False),
]

REDUCTIONS = [
    op(aten.mean.dim, X, [-1], True),
    op(aten.mean.dim, BF16_X, [1], dtype=F, name="mean-dtype"),
    op(aten.mean.default, X),
    op(aten.sum.dim_IntList, Z, [0, 2]),
    op(aten.sum.dim_IntList, TRUTH, [1], name="sum-counts"),
    op(aten.sum.default, WHOLE_32),
    op(aten.amax.default, Z, [1], True),
    op(aten.amin.default, HALF_X, [-1]),
    op(aten.max.default, X),
    op(aten.min.default, X),
    op(aten.argmax.default, X, -1, True),
    op(aten.argmax.default, BF16_X, 0),
    op(aten.argmax.default, Arg((8,)), 0, name="argmax-vector"),
    op(aten.argmin.default, X, 1),
    fn("max.dim", lambda x: list(aten.max.dim(x, 1)), Z),
    fn("min.dim", lambda x: list(aten.min.dim(x, -1, True)), Z),
    fn("topk", lambda x: list(aten.topk.default(x, 3)), X),
    fn("topk-smallest", lambda x: list(aten.topk.default(x, 2, 1, False)), Z),
]

CASES = [
    *ARITHMETIC,
    *CORE,
    *FUNCTIONS,
    *LOGIC,
    *SHAPES,
    *INDEXING,
    *MATRICES,
    *ATTENTION,
    *NORMALIZATIONS,
    *REDUCTIONS,
    *SCATTERS,
]
assert len({case.name for case in CASES}) == len(CASES), "two cases have one name"
BATCHES = [Batch(tuple(CASES[first : first + 28])) for first in range(0, len(CASES), 28)]
