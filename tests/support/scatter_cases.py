"""Functional operators that replace a part of a tensor."""

import torch

from support.operator_case import BOOL, I64, TRUTH, Arg, Case, X, Z, fn, op

aten = torch.ops.aten
INDICES = Arg((3,), I64, 0, 8)


def distinct(indices: torch.Tensor) -> torch.Tensor:
    """Three different indices of an axis of 8, computed from random ones."""
    return (indices[:1] + torch.tensor([0, 5, 2])) % 8


SCATTERS: list[Case] = [
    op(aten.slice_scatter.default, X, Arg(("n", 3)), 1, 2, 5),
    op(aten.slice_scatter.default, X, Arg(("n", 3)), 1, -4, -1, name="slice_scatter-from-the-end"),
    op(aten.slice_scatter.default, X, Arg(("n", 4)), 1, 0, 8, 2, name="slice_scatter-strided"),
    op(aten.slice_scatter.default, X, Arg((1, 8)), 0, 0, 1, name="slice_scatter-of-a-dynamic-axis"),
    op(aten.slice_scatter.default, X, Arg(("n", 8)), 0, 0, 2**63 - 1, name="slice_scatter-whole"),
    fn(
        "slice_scatter-of-nothing",
        lambda x: aten.slice_scatter(x, x[:, 5:5] * 2, 1, 5, 5),
        X,
    ),
    op(
        aten.slice_scatter.default,
        Z,
        Arg(("n", 2, 8)),
        1,
        1,
        4,
        2,
        name="slice_scatter-in-the-middle",
    ),
    op(aten.slice_scatter.default, TRUTH, Arg(("n", 2), BOOL), 1, 3, 5, name="slice_scatter-flags"),
    op(
        aten.slice_scatter.default,
        Arg(("n", 8), I64, -9, 9),
        Arg(("n", 2), I64, -9, 9),
        1,
        6,
        8,
        name="slice_scatter-integers",
    ),
    op(
        aten.slice_scatter.default,
        Arg(("n", 8), torch.bfloat16),
        Arg(("n", 1), torch.bfloat16),
        1,
        7,
        8,
        name="slice_scatter-bfloat16",
    ),
    op(aten.select_scatter.default, Z, Arg(("n", 8)), 1, 2),
    op(aten.select_scatter.default, Z, Arg(("n", 4)), -1, -2, name="select_scatter-from-the-end"),
    fn(
        "index_copy",
        lambda x, new, at: x.index_copy(1, distinct(at), new),
        X,
        Arg(("n", 3)),
        INDICES,
    ),
    fn("index_copy-one", lambda x, new, at: x.index_copy(1, at[0], new), X, Arg(("n", 1)), INDICES),
    fn(
        "index_put",
        lambda x, new, at: aten.index_put.default(x, [None, distinct(at) - 8], new),
        X,
        Arg(("n", 3)),
        INDICES,
    ),
    fn(
        "index_put-broadcast",
        lambda x, new, at: aten.index_put.default(x, [None, at[:1] % 4], new),
        Z,
        Arg((8,)),
        INDICES,
    ),
    fn(
        "index_put-scalar",
        lambda x, new, at: aten.index_put.default(x, [None, at[0]], new),
        X,
        Arg(("n",)),
        INDICES,
    ),
    op(aten.scatter.src, X, 1, Arg(("n", 1), I64, 0, 8), Arg(("n", 1))),
    op(aten.scatter.src, X, 1, Arg((1, 1), I64, 0, 8), Arg(("n", 2)), name="scatter-of-a-part"),
    op(aten.scatter.value, X, 1, Arg(("n", 1), I64, 0, 8), 0.5),
]
