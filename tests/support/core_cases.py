"""Core ATen beyond a decoder's: convolutions, pools, pads, norms, order, accumulation.

`CORE` has the operators with a converter of their own, `DECOMPOSED` functions that PyTorch
decomposes into them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.operator_case import (
    B16,
    BOOL,
    I32,
    I64,
    POSITIVE,
    TRUTH,
    TWO,
    WHOLE,
    WHOLE_32,
    Arg,
    Case,
    H,
    X,
    Z,
    fn,
    op,
)

aten = torch.ops.aten

SMALL, UNIT = Arg(("n", 8), low=-1e-3, high=1e-3), Arg(("n", 8), low=-0.9, high=0.9)
SOUND, IMAGE = Arg(("n", 4, 12)), Arg(("n", 4, 7, 9))
VOLUME = Arg(("n", 2, 4, 5, 6))
PLACES = Arg(("n", 5), I64, 0, 8)


def part(name: str, module: nn.Module, *inputs: Arg) -> Case:
    """A module of ``torch.nn`` alone."""
    return fn(name, lambda *xs, part: part(*xs), *inputs, part=module)


FUNCTIONS = [
    *(
        op(getattr(aten, name).default, UNIT)
        for name in ("tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "atanh")
    ),
    op(aten.acosh.default, Arg(("n", 8), low=1.0, high=3.0)),
    op(aten.log2.default, POSITIVE),
    op(aten.log10.default, POSITIVE),
    op(aten.exp2.default, X),
    op(aten.log1p.default, POSITIVE),
    fn("log1p-small", lambda x: torch.log1p(x) * 1e3, SMALL),
    fn("log1p-large", lambda x: torch.log1p(x * 1e30), POSITIVE),
    op(aten.expm1.default, X),
    fn("expm1-small", lambda x: torch.expm1(x) * 1e3, SMALL),
    fn("expm1-large", lambda x: torch.expm1(x * 20) * 1e-30, X),
    fn("isnan", lambda x: aten.isnan.default(torch.log(x)), X),
    fn("isinf", lambda x: aten.isinf.default(1 / torch.relu(x)), X),
    op(aten.sign.default, X),
    op(aten.sign.default, WHOLE),
    op(aten.relu.default, WHOLE),
    op(aten.abs.default, WHOLE),
    op(aten.floor.default, Arg(("n", 8), I64, 1 << 40, (1 << 40) + 99)),
    op(aten.relu.default, Arg(("n", 8), torch.int32, -9, 9)),
    op(aten.sgn.default, TRUTH),
    op(aten.trunc.default, X),
    op(aten.fix.default, WHOLE),
    op(aten.leaky_relu.default, X, 0.2),
    op(aten.elu.default, X, 1.5, 2.0, 0.5),
    op(aten.softplus.default, X, 2.0, 3.0),
    op(aten.softplus.default, Arg(("n", 8), B16)),
    op(aten.hardtanh.default, X),
    op(aten.hardtanh.default, X, -0.5, 0.25, name="hardtanh-bounds"),
    op(aten.clamp_min.Tensor, X, Arg((8,))),
    op(aten.clamp_max.Tensor, X, Arg((8,))),
    op(aten.div.Tensor_mode, X, POSITIVE, rounding_mode="trunc", name="div-trunc"),
    op(
        aten.div.Tensor_mode,
        WHOLE_32,
        Arg(("n", 8), I32, 1, 5),
        rounding_mode="trunc",
        name="div-trunc-integers",
    ),
    op(aten.fmod.Tensor, X, POSITIVE),
    op(aten.fmod.Scalar, WHOLE_32, 4),
    op(aten.atan2.default, X, Arg(("n", 8))),
    fn("atan2-axes", lambda y, x: torch.atan2(torch.sign(y).relu(), torch.sign(x)), WHOLE, X),
    op(aten.bitwise_left_shift.Tensor_Scalar, WHOLE, 2),
    op(aten.__lshift__.Scalar, WHOLE, 2),
    op(aten.bitwise_right_shift.Tensor_Scalar, WHOLE, 1),
    op(aten.__rshift__.Scalar, WHOLE, 1),
    *(op(getattr(aten, f"bitwise_{name}").Scalar, TRUTH, True) for name in ("and", "or", "xor")),
]

CONVOLUTIONS = [
    part("conv1d", nn.Conv1d(8, 6, 3, stride=2, padding=1), Arg(("n", 8, 20))),
    part(
        "conv1d-groups",
        nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False),
        Arg(("n", 8, "m")),
    ),
    part("conv1d-float16", nn.Conv1d(8, 6, 3).half(), Arg(("n", 8, 20), H)),
    part("conv1d-alone", nn.Conv1d(4, 6, 3), Arg((4, 12))),
    part("conv1d-same", nn.Conv1d(4, 6, 4, padding="same", dilation=2), SOUND),
    part("conv2d", nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), IMAGE),
    part("conv2d-depthwise", nn.Conv2d(4, 8, 3, groups=4, padding_mode="zeros"), IMAGE),
    part("conv2d-same", nn.Conv2d(4, 6, (2, 3), padding="same"), IMAGE),
    part("conv2d-valid", nn.Conv2d(4, 6, 3, padding="valid"), IMAGE),
    part("conv3d", nn.Conv3d(2, 3, (2, 3, 3), padding=1), VOLUME),
    part("conv3d-same", nn.Conv3d(2, 3, 2, padding="same"), VOLUME),
    part("conv_transpose1d", nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), SOUND),
    part(
        "conv_transpose1d-output",
        nn.ConvTranspose1d(4, 6, 3, stride=3, output_padding=2, dilation=2),
        SOUND,
    ),
    part(
        "conv_transpose2d",
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        IMAGE,
    ),
    fn(
        "conv_transpose1d-dilations",
        lambda x, w: [
            functional.conv_transpose1d(x, w, dilation=rate).sum(2) for rate in (1, 2, 3)
        ],
        SOUND,
        w=nn.Parameter(torch.rand(4, 6, 3)),
    ),
    part("conv_transpose3d", nn.ConvTranspose3d(2, 3, 2, bias=False), VOLUME),
    fn(
        "convolution",
        lambda x, w, b: aten.convolution.default(x, w, b, [2], [1], [1], False, [0], 1),
        SOUND,
        w=nn.Parameter(torch.randn(6, 4, 3)),
        b=nn.Parameter(torch.randn(6)),
    ),
    fn(
        "convolution-transposed",
        lambda x, w: aten.convolution.default(x, w, None, [2, 2], [0, 1], [1, 1], True, [1, 0], 1),
        IMAGE,
        w=nn.Parameter(torch.randn(4, 3, 3, 3)),
    ),
    part("weight_norm", nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), SOUND),
]

POOLS = [
    part("max_pool1d", nn.MaxPool1d(3, 2, 1), SOUND),
    part("max_pool2d", nn.MaxPool2d((3, 2), (2, 1), (1, 0)), IMAGE),
    part("max_pool2d-ceil", nn.MaxPool2d(2, 2, ceil_mode=True), IMAGE),
    part("max_pool2d-varies", nn.MaxPool2d(2, 1), Arg((1, 2, 8, "n"), low=0.0)),
    part("max_pool3d", nn.MaxPool3d(2), VOLUME),
    *(
        fn(
            f"max_pool{axes}d_with_indices",
            lambda x, pool=pool, axes=axes: pool(x, [2] * axes)[0],
            image,
        )
        for axes, pool, image in (
            (1, aten.max_pool1d_with_indices.default, SOUND),
            (2, aten.max_pool2d_with_indices.default, IMAGE),
            (3, aten.max_pool3d_with_indices.default, VOLUME),
        )
    ),
    part("avg_pool1d", nn.AvgPool1d(3, 2, 1), SOUND),
    part("avg_pool2d", nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    part("avg_pool2d-ceil", nn.AvgPool2d(3, 2, 1, ceil_mode=True), Arg(("n", 4, 8, 10))),
    part(
        "avg_pool2d-ceil-inside",
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        Arg(("n", 4, 8, 10)),
    ),
    part("avg_pool2d-divisor", nn.AvgPool2d(2, divisor_override=3), IMAGE),
    part("avg_pool3d", nn.AvgPool3d((2, 3, 2)), VOLUME),
    part("adaptive_avg_pool1d", nn.AdaptiveAvgPool1d(5), SOUND),
    part("adaptive_avg_pool2d", nn.AdaptiveAvgPool2d((3, 1)), IMAGE),
    part("adaptive_avg_pool2d-one", nn.AdaptiveAvgPool2d(1), Arg((2, 3, "n", "m"))),
    part("adaptive_avg_pool3d", nn.AdaptiveAvgPool3d((2, 5, 4)), VOLUME),
    op(aten._adaptive_avg_pool2d.default, IMAGE, [2, 4]),
    op(aten._adaptive_avg_pool3d.default, VOLUME, [2, 2, 4]),
    part("adaptive_max_pool1d", nn.AdaptiveMaxPool1d(5), SOUND),
    part("adaptive_max_pool2d", nn.AdaptiveMaxPool2d((3, 1)), IMAGE),
    part("adaptive_max_pool3d", nn.AdaptiveMaxPool3d((2, 5, 4)), VOLUME),
]

PADS = [
    op(aten.constant_pad_nd.default, Z, [1, 2, 3, -1], 0.5),
    op(aten.constant_pad_nd.default, TWO, [0, 0, 2, 1], name="constant_pad-varies"),
    op(aten.constant_pad_nd.default, TRUTH, [3, 0], True),
    op(aten.constant_pad_nd.default, WHOLE, [-2, 1], 7),
    op(aten.pad.default, Z, [2, 1]),
    op(aten.pad.default, Z, [2, 1, 1, 3], "circular", name="pad-circular"),
    op(aten.pad.default, Z, [7, 6], "reflect", name="pad-reflect"),
    op(aten.reflection_pad1d.default, Z, [2, 3]),
    op(aten.reflection_pad2d.default, Z, [2, 3, 1, 1]),
    op(aten.reflection_pad3d.default, VOLUME, [1, 2, 1, 1, 3, 0]),
    op(aten.replication_pad1d.default, Arg((2, 3, "n")), [2, 3]),
    op(aten.replication_pad2d.default, IMAGE, [2, 3, 1, 1]),
    op(aten.replication_pad3d.default, VOLUME, [1, 2, 1, 1, 3, 0]),
    op(aten.flip.default, Z, [0, -1]),
    op(aten.roll.default, Z, [1, -3], [1, 2]),
    op(aten.roll.default, TRUTH, [9], [1], name="roll-flags"),
    op(aten.roll.default, TWO, [1], [0], name="roll-varies"),
    op(aten.roll.default, X, [3], name="roll-flat"),
    fn(
        "roll-a-window-of-flags",
        lambda window, x: torch.roll(torch.cat([window, x > 0], 1)[:, 1:], 1, 1),
        TRUTH,
        Arg(("n", 1)),
    ),
    op(aten.unfold.default, Z, 2, 3, 2),
    op(aten.unfold.default, TWO, 1, 1, 1, name="unfold-varies"),
    op(aten.diagonal.default, Arg((3, 4, 5)), 1, 0, 2),
    op(aten.diagonal_scatter.default, Arg((4, 5)), Arg((4,)), 1),
    op(aten.diagonal.default, Arg(("n", 4, 5)), 1, 1, 2, name="diagonal-varies"),
    op(
        aten.diagonal_scatter.default,
        Arg(("n", 4, 5)),
        Arg(("n", 4)),
        *(1, 1, 2),
        name="diagonal_scatter-varies",
    ),
    op(aten.as_strided.default, Arg((4, 5)), [3, 2], [4, 2], 1),
]


def trained(norm: nn.Module) -> nn.Module:
    """A norm with statistics and weights of its own."""
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


NORMS = [
    part("batch_norm1d", trained(nn.BatchNorm1d(4)), SOUND),
    part("batch_norm1d-vectors", trained(nn.BatchNorm1d(8)), X),
    part("batch_norm2d-float16", trained(nn.BatchNorm2d(4)).half(), Arg((2, 4, 7, 9), H)),
    part("batch_norm-own", nn.BatchNorm1d(4, track_running_stats=False), Arg((3, 4, 12))),
    part("instance_norm", nn.InstanceNorm1d(4, affine=True), SOUND),
    part(
        "instance_norm-statistics",
        trained(nn.InstanceNorm2d(4, track_running_stats=True, affine=True)),
        IMAGE,
    ),
    part("group_norm", trained(nn.GroupNorm(2, 4)), Arg(("n", 4, "m"))),
    part("group_norm-bfloat16", nn.GroupNorm(4, 4).to(B16), Arg(("n", 4, 12), B16)),
    fn(
        "native_batch_norm",
        lambda x, w, b: aten._native_batch_norm_legit_no_training.default(x, w, b, b, w, 0.1, 1e-3)[
            0
        ],
        SOUND,
        w=torch.rand(4) + 0.5,
        b=torch.rand(4),
    ),
    fn(
        "native_batch_norm-own",
        lambda x: aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-3)[0],
        Arg((3, 4, 12)),
    ),
    fn(
        "native_group_norm",
        lambda x: aten.native_group_norm.default(x, None, None, x.shape[0], 4, 12, 2, 1e-3)[0],
        SOUND,
    ),
    fn(
        "native_layer_norm",
        lambda x: aten.native_layer_norm.default(x, [8], None, None, 1e-3)[0],
        Z,
    ),
    fn(
        "fused_rms_norm",
        lambda x, w: aten._fused_rms_norm.default(x, [8], w, 1e-3)[0],
        Z,
        w=torch.rand(8),
    ),
]

REDUCTIONS = [
    op(aten.prod.default, Arg((3, 4))),
    op(aten.prod.dim_int, Z, 1, True),
    op(aten.prod.dim_int, WHOLE, -1),
    op(aten.any.default, TRUTH),
    op(aten.any.dim, WHOLE, 1, True),
    op(aten.any.dims, Z, [0, 2]),
    op(aten.all.default, TRUTH),
    op(aten.all.dim, X, -1),
    op(aten.all.dims, Z, [1, 2], True),
    *(op(getattr(aten, name).correction, Z, [1, 2]) for name in ("var", "std")),
    op(aten.var.correction, TWO, [0, 1], correction=0, keepdim=True, name="var-varies"),
    *(op(getattr(aten, name).dim, Z, [2], False, True) for name in ("var", "std")),
    *(op(getattr(aten, name).default, Arg((3, 4)), False) for name in ("var", "std")),
    *(
        fn(
            f"{name}-{which}",
            lambda x, call=call, which=which, more=more: list(getattr(call, which)(x, *more)),
            Arg((3, 4, 5)),
        )
        for name, call in (("var_mean", aten.var_mean), ("std_mean", aten.std_mean))
        for which, more in (("correction", ([1],)), ("dim", ([0, 2],)), ("default", (True,)))
    ),
    op(aten.argmax.default, X, name="argmax-of-all"),
    op(aten.argmin.default, X, name="argmin-of-all"),
]

ORDER = [
    fn("sort", lambda x: list(aten.sort.default(x)), X),
    fn("sort-integers", lambda x: list(aten.sort.stable(x, stable=True, dim=0)), WHOLE),
    fn(
        "sort-descending",
        lambda x: list(aten.sort.stable(x, stable=True, dim=1, descending=True)),
        WHOLE,
    ),
    fn("sort-flags", lambda x: aten.sort.default(x, 1)[0], TRUTH),
    fn("sort-varies", lambda x: list(aten.sort.default(x, 0, True)), X),
    op(aten.argsort.default, Z, 1, True),
    op(aten.argsort.stable, WHOLE, stable=True, dim=-1),
    op(
        aten.argsort.stable,
        Arg((3, 17000), I64, -99, 99),
        stable=True,
        dim=0,
        name="argsort-stable-beside-a-long-axis",
    ),
    fn(
        "bucketize",
        aten.bucketize.Tensor,
        X,
        boundaries=torch.arange(-2.0, 3),
    ),
    fn(
        "searchsorted",
        lambda x, edges: aten.searchsorted.Tensor(edges, x, right=True, out_int32=True),
        WHOLE,
        edges=torch.arange(-2, 3),
    ),
    fn(
        "searchsorted-rows",
        lambda x: aten.searchsorted.Tensor(x.sort(-1).values, x * 0.5, side="right"),
        X,
    ),
    fn(
        "searchsorted-sorter",
        lambda x: aten.searchsorted.Tensor(x, x * 0.5, sorter=x.argsort(-1)),
        X,
    ),
    op(aten.cumsum.default, Z, 1),
    op(aten.cumsum.default, X, 0, name="cumsum-varies"),
    op(aten.cumsum.default, TRUTH, 1),
    op(aten.cumprod.default, Arg(("n", 8), H), -1),
    op(aten.cumprod.default, Z, 0, name="cumprod-varies"),
]


def spread(places: Tensor) -> Tensor:
    """Different places of an axis of 8 in every row, computed from random ones."""
    return (places[:, :1] + torch.tensor([0, 5, 2])) % 8


ACCUMULATED = [
    op(aten.scatter_add.default, X, 1, PLACES, Arg(("n", 5))),
    op(
        aten.scatter_add.default,
        X,
        1,
        Arg((1, 5), I64, 0, 8),
        Arg(("n", 6)),
        name="scatter_add-part",
    ),
    op(
        aten.scatter_add.default,
        WHOLE,
        -1,
        PLACES,
        Arg(("n", 5), I64, -9, 9),
        name="scatter_add-whole",
    ),
    op(aten.scatter_add.default, Arg(("n", 8), B16), 1, PLACES, Arg(("n", 5), B16)),
    op(
        aten.scatter_add.default,
        Z,
        0,
        Arg((6, 4, 8), I64, 0, 1),
        Arg((6, 4, 8)),
        name="scatter_add-dynamic",
    ),
    *(
        op(
            aten.scatter_reduce.two,
            X,
            1,
            PLACES,
            Arg(("n", 5)),
            name,
            include_self=own,
            name=f"scatter_reduce-{name}-{own}",
        )
        for name in ("sum", "prod", "mean", "amax", "amin")
        for own in (True, False)
    ),
    op(aten.scatter_reduce.two, WHOLE, 1, PLACES, Arg(("n", 5), I64, -9, 9), "amax"),
    op(aten.scatter.reduce, X, 1, PLACES, Arg(("n", 5)), reduce="add"),
    op(aten.scatter.value_reduce, X, 1, PLACES, 0.5, reduce="multiply"),
    op(aten.index_add.default, Z, 1, Arg((3,), I32, 0, 4), Arg(("n", 3, 8)), alpha=0.5),
    fn(
        "index_put-accumulates",
        lambda x, at, new: aten.index_put.default(x, [None, at], new, True),
        X,
        Arg((3,), I64, -8, 8),
        Arg(("n", 3)),
    ),
    fn(
        "index_put-two",
        lambda x, new, places: aten.index_put.default(
            x, [torch.arange(x.shape[0])[:, None], spread(places) - 8], new
        ),
        X,
        Arg(("n", 3)),
        PLACES,
    ),
    fn(
        "index_put-two-apart",
        lambda x, i, j: aten.index_put.default(x, [i % 3, None, j % 5], torch.tensor(2.0), True),
        Arg((3, 4, 5)),
        Arg(("n",), I64, 0, 9),
        Arg(("n",), I64, 0, 9),
    ),
    fn(
        "index_put-inner",
        lambda x, i, j, new: aten.index_put.default(x, [None, i % 4, j % 8], new, True),
        Z,
        Arg(("m",), I64, 0, 9),
        Arg(("m",), I64, 0, 9),
        Arg(("n", "m")),
    ),
    op(aten.index_put.default, X, [TRUTH], Arg(()), name="index_put-mask"),
    op(
        aten.index_put.default,
        Z,
        [Arg(("n", 4), BOOL)],
        Arg((8,)),
        True,
        name="index_put-mask-rows",
    ),
    op(aten._unsafe_index_put.default, X, [Arg(("m",), I64, 0, 1)], Arg((8,)), True),
    fn(
        "index-two",
        lambda x, i, j: x[i, j],
        Arg((5, 8)),
        Arg(("n", 1), I64, -5, 5),
        Arg(("m",), I64, 0, 8),
    ),
    fn(
        "index-apart",
        lambda x, i, j: x[i, :, j],
        Arg((5, 4, 8)),
        Arg(("n",), I64, 0, 5),
        Arg(("n",), I64, 0, 8),
    ),
    fn(
        "index-inner-two",
        lambda x, i, j: x[:, i, j],
        Z,
        Arg(("m",), I64, 0, 4),
        Arg(("m",), I64, 0, 8),
    ),
    op(aten._unsafe_index.Tensor, X, [None, Arg(("m",), I64, 0, 8)]),
    op(aten.histc.default, X, 5, -2, 2),
    op(aten.histc.default, X, 4, name="histc-own-range"),
    *(
        fn(
            f"embedding_bag-{mode}",
            lambda ids, table: table(ids),
            Arg(("n", 5), I64, 0, 8),
            table=nn.EmbeddingBag(8, 6, mode=mode, padding_idx=2),
        )
        for mode in ("sum", "mean", "max")
    ),
    fn(
        "embedding_bag-weights",
        lambda ids, weights, offsets, table: functional.embedding_bag(
            ids,
            table.weight,
            offsets,
            per_sample_weights=weights,
            mode="sum",
            include_last_offset=True,
        ),
        Arg((6,), I64, 0, 8),
        Arg((6,)),
        table=nn.Embedding(8, 6),
        offsets=torch.tensor([0, 2, 2, 6]),
    ),
    *(
        fn(
            str(overload),
            lambda ids, at, weight, overload=overload: overload(weight, ids, at)[0],
            Arg((6,), I64, 0, 8),
            Arg((1,), I64, 0, 1),
            weight=torch.randn(8, 6),
        )
        for overload in (
            aten.embedding_bag.default,
            aten._embedding_bag.default,
            aten._embedding_bag_forward_only.default,
        )
    ),
    op(aten.repeat_interleave.Tensor, Arg((3,), I64, 2, 3), output_size=6),
    op(aten.one_hot.default, Arg(("n", 3), I64, 0, 8), 8),
    fn(
        "repeat_interleave",
        lambda x, repeats: x.repeat_interleave(repeats, 0, output_size=6),
        Arg((3, 8)),
        repeats=torch.tensor([1, 3, 2]),
    ),
    op(aten.masked_scatter.default, X, TRUTH, Arg(("n", 8))),
    op(aten._cdist_forward.default, Z, Arg(("n", 5, 8)), 2.0, None),
    op(aten._cdist_forward.default, Z, Arg(("n", 5, 8)), 1.5, None, name="cdist-order"),
    op(aten._cdist_forward.default, Z, Arg(("n", 5, 8)), 1.0, None, name="cdist-sum"),
    op(aten._cdist_forward.default, Z, Arg(("n", 5, 8)), float("inf"), None, name="cdist-largest"),
]

MADE = [
    op(aten.zero.default, X),
    fn("empty", lambda x: aten.empty.memory_format([x.shape[0], 2]).fill_(1.5), X),
    fn("empty_like", lambda x: aten.empty_like.default(x).fill_(1.5), X),
    fn("new_empty", lambda x: aten.new_empty.default(x, [2, x.shape[0]]).zero_(), X),
    fn(
        "empty_strided", lambda x: aten.empty_strided.default([2, 3], [3, 1]).zero_() + x[:1, :3], X
    ),
    fn("new_empty_strided", lambda x: aten.new_empty_strided.default(x, [2, 3], [3, 1]).zero_(), X),
    fn("empty_permuted", lambda x: aten.empty_permuted.default([2, 8], [0, 1]).zero_() + x[:1], X),
    op(aten.fill.Scalar, X, 2.0),
    op(aten.fill.Tensor, X, Arg(())),
    op(aten.copy.default, X, Arg(("n", 1), H)),
]

CORE = [
    *FUNCTIONS,
    *CONVOLUTIONS,
    *POOLS,
    *PADS,
    *NORMS,
    *REDUCTIONS,
    *ORDER,
    *ACCUMULATED,
    *MADE,
]

Function = Callable[..., Any]


def named(*functions: tuple[str, Function]) -> list[Case]:
    """Functions of one tensor ``[n, 8]``."""
    return [fn(name, function, X) for name, function in functions]


DECOMPOSED = [
    *named(
        ("square", torch.square),
        ("celu", lambda x: functional.celu(x, 0.5)),
        ("selu", functional.selu),
        ("relu6", functional.relu6),
        ("hardswish", functional.hardswish),
        ("hardsigmoid", functional.hardsigmoid),
        ("mish", functional.mish),
        ("logsigmoid", functional.logsigmoid),
        ("softsign", functional.softsign),
        ("threshold", lambda x: functional.threshold(x, 0.1, 20.0)),
        ("glu", lambda x: functional.glu(x, 1)),
        ("logsumexp", lambda x: torch.logsumexp(x, 1)),
        ("norm", lambda x: torch.linalg.vector_norm(x, dim=1)),
        ("normalize", lambda x: functional.normalize(x, dim=1)),
        ("frac", torch.frac),
        ("lerp", lambda x: torch.lerp(x, x + 1, 0.3)),
        ("addcmul", lambda x: torch.addcmul(x, x, x, value=0.5)),
        ("count_nonzero", lambda x: torch.count_nonzero(x > 0, 1)),
        ("repeat_interleave-number", lambda x: x.repeat_interleave(3, 1)),
        ("tril", lambda x: x[:, None].expand(-1, 8, -1).tril()),
        ("diag_embed", torch.diag_embed),
        ("xlogy", lambda x: torch.xlogy(x, x.abs() + 0.5)),
        ("nan_to_num", lambda x: torch.nan_to_num(1 / torch.relu(x))),
        ("isfinite", lambda x: torch.isfinite(1 / torch.relu(x))),
        ("aminmax", lambda x: list(torch.aminmax(x, dim=1))),
        ("index_fill", lambda x: x.index_fill(1, torch.tensor([1, 3]), 2.0)),
        ("movedim", lambda x: x[..., None].movedim(-1, 0)),
        ("tile", lambda x: x.tile(2, 1)),
        ("std", lambda x: torch.std(x, 1)),
    ),
    fn("einsum", lambda a, b: torch.einsum("nij,njk->nik", a, b), Z, Arg(("n", 8, 3))),
    fn("cdist", torch.cdist, Z, Arg(("n", 5, 8))),
    fn("prelu", lambda x, part: part(x), Z, part=nn.PReLU(4)),
    fn("im2col", lambda x: functional.unfold(x, (3, 2), padding=1), IMAGE),
    fn("col2im", lambda x: functional.fold(x, (4, 5), (2, 2)), Arg(("n", 8, 12))),
    *(
        fn(
            f"interpolate-{mode}",
            lambda x, mode=mode: functional.interpolate(x, (10, 5), mode=mode),
            Arg((2, 3, 6, 7)),
        )
        for mode in ("nearest", "bilinear", "bicubic")
    ),
    fn(
        "interpolate-linear",
        lambda x: functional.interpolate(x, scale_factor=2, mode="linear", align_corners=True),
        SOUND,
    ),
    fn(
        "grid_sample",
        lambda x, grid: functional.grid_sample(x, grid, align_corners=False),
        Arg((2, 3, 6, 7)),
        Arg((2, 4, 5, 2), low=-0.9, high=0.9),
    ),
    *(
        fn(
            name,
            lambda x, part: list(part(x)),
            Arg((2, 3, 4)),
            part=made,
        )
        for name, made in (
            ("gru", nn.GRU(4, 5, batch_first=True)),
            ("rnn", nn.RNN(4, 5, 2, batch_first=True)),
        )
    ),
    fn(
        "lstm",
        lambda x, part: [part(x)[0], *part(x)[1]],
        Arg((2, 3, 4)),
        part=nn.LSTM(4, 5, 2, batch_first=True),
    ),
    fn(
        "lstm-last-state",
        lambda x, part, head: head(part(x)[1][0][-1]),
        Arg((2, 3, 4)),
        part=nn.LSTM(4, 5, batch_first=True),
        head=nn.Linear(5, 3),
    ),
    fn(
        "lstm-projection",
        lambda x, part, head: head(part(x)[1][0][-1]),
        Arg((3, 2, 4)),
        part=nn.LSTM(4, 5, proj_size=2),
        head=nn.Linear(2, 3),
    ),
    fn(
        "lstm-last-states-of-a-dynamic-batch",
        lambda x, part, head: head(torch.cat([*part(x)[1][0], *part(x)[1][1]], 1)),
        Arg((3, "n", 4)),
        part=nn.LSTM(4, 5, bidirectional=True, bias=False),
        head=nn.Linear(20, 3),
    ),
    fn(
        "gru_cell",
        lambda x, h, part: part(x, h),
        Arg(("n", 4)),
        Arg(("n", 5)),
        part=nn.GRUCell(4, 5),
    ),
    fn(
        "lstm_cell",
        lambda x, h, part: list(part(x, (h, h))),
        Arg(("n", 4)),
        Arg(("n", 5)),
        part=nn.LSTMCell(4, 5),
    ),
    fn(
        "attention",
        lambda x, part: part(x, x, x, need_weights=False)[0],
        Arg((2, 3, 8)),
        part=nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    fn("channel_shuffle", lambda x: functional.channel_shuffle(x, 2), IMAGE),
    fn("pixel_shuffle", lambda x: functional.pixel_shuffle(x, 2), IMAGE),
    fn("local_response", lambda x: functional.local_response_norm(x, 3), IMAGE),
]
