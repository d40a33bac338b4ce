"""Patterns that models write as several operators: norms, activations, operators without effect."""

import math

import torch
from torch.fx import Node

from inplace_builder.graph.nodes import (
    CASTS,
    AnyNode,
    is_call,
    only_user,
    operand_orders,
    without_casts,
)

aten = torch.ops.aten


ACTIVATIONS: dict[object, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.gelu.default: "gelu",
}


SCALARS = (int, float)


def has_no_effect(node: AnyNode) -> bool:
    """Whether it is dropout outside of training, or a cast to the type that its input has."""
    if is_call(node, aten.dropout.default):
        return node.args[2] is False
    return is_call(node, *CASTS) and node.meta["val"].dtype == node.args[0].meta["val"].dtype


def match_rms_norm(node: AnyNode) -> tuple[AnyNode, float] | None:
    """Match ``x * rsqrt(mean(x²) + eps)``, in float32 or in the type of ``x``.

    Returns:
        ``x`` and ``eps``, or None.
    """
    for x, inverse in operand_orders(node, aten.mul.Tensor):
        if not is_call(inverse, aten.rsqrt.default):
            continue
        shifted = inverse.args[0]
        if not is_call(shifted, aten.add.Tensor) or not isinstance(shifted.args[1], SCALARS):
            continue
        mean = shifted.args[0]
        if (
            not is_call(mean, aten.mean.dim)
            or list(mean.args[1]) not in ([-1], [mean.meta["val"].dim() - 1])
            or mean.args[2:] != (True,)
        ):
            continue
        if _is_square(mean.args[0], x):
            return without_casts(x), float(shifted.args[1])
    return None


def _is_square(node: AnyNode, x: AnyNode) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args[0] is x and bool(node.args[1] == 2)
    return is_call(node, aten.mul.Tensor) and node.args[0] is x and node.args[1] is x


def activation(node: AnyNode) -> str | None:
    """The name that ``inplace::linear`` has for an activation."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return ACTIVATIONS.get(node.target)


def match_tanh_gelu(node: AnyNode) -> AnyNode:
    """Match GELU's approximation ``0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))``, arXiv:1606.08415.

    Returns:
        ``x``, or None.
    """
    for half, shifted in operand_orders(node, aten.mul.Tensor):
        x = _multiplied(half, 0.5)
        tanh = _added(shifted, 1.0)
        if x is None or not is_call(tanh, aten.tanh.default):
            continue
        inner = _multiplied(tanh.args[0], math.sqrt(2 / math.pi))
        for one, cubic in operand_orders(inner, aten.add.Tensor):
            cube = _multiplied(cubic, 0.044715)
            if one is x and is_call(cube, aten.pow.Tensor_Scalar) and cube.args == (x, 3):
                return x
    return None


def _multiplied(node: AnyNode, factor: float) -> AnyNode:
    """What a node multiplies by this factor; None if it does not."""
    for x, scalar in operand_orders(node, aten.mul.Tensor):
        if isinstance(scalar, SCALARS) and math.isclose(scalar, factor):
            return x
    return None


def _added(node: AnyNode, term: float) -> AnyNode:
    """What a node adds this term to; None if it does not."""
    for x, scalar in operand_orders(node, aten.add.Tensor):
        if isinstance(scalar, SCALARS) and scalar == term:
            return x
    return None


def flattened(node: AnyNode, width: int) -> AnyNode:
    """The node at which attention's output ``[tokens, heads, dim]`` is ``[..., heads * dim]``.

    Args:
        node: a user of that output; views with one user are followed from there.
        width: ``heads * dim``.

    Returns:
        The node, or None.
    """
    current: AnyNode = node
    while current is not None and is_call(
        current,
        aten.unsqueeze.default,
        aten.reshape.default,
        aten.view.default,
        aten.contiguous.default,
    ):
        if current.meta["val"].shape[-1] == width:
            return current
        current = only_user(current)
    return None


def same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all extents are equal; compared as texts, which adds no guard to the graph."""
    return one.dim() == other.dim() and all(
        str(a) == str(b) for a, b in zip(one.shape, other.shape, strict=True)
    )
