"""What transformers writes as several operators and is one thing: norms, activations, operators that do nothing."""

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


GATES: dict[object, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.gelu.default: "gelu",
}


SCALARS = (int, float)


def does_nothing(node: AnyNode) -> bool:
    """Dropout outside of training, and casts to the type that is there."""
    if is_call(node, aten.dropout.default):
        return node.args[2] is False
    return is_call(node, *CASTS) and node.meta["val"].dtype == node.args[0].meta["val"].dtype


def normalized(node: AnyNode) -> tuple[AnyNode, float] | None:
    """``x`` and eps if the node is ``x * rsqrt(mean(x²) + eps)``, in float32 or x's own type."""
    for wide, inverse in operand_orders(node, aten.mul.Tensor):
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
        square = mean.args[0]
        squared = (
            is_call(square, aten.pow.Tensor_Scalar)
            and square.args[1] == 2
            and square.args[0] is wide
        )
        if squared or (
            is_call(square, aten.mul.Tensor) and square.args[0] is wide and square.args[1] is wide
        ):
            return without_casts(wide), float(shifted.args[1])
    return None


def activation(node: AnyNode) -> str | None:
    """The name that ``inplace::linear`` has for an activation."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return GATES.get(node.target)


def written_gelu(node: AnyNode) -> AnyNode:
    """``x`` if the node is ``0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))``, GELU's approximation (arXiv:1606.08415) written out; or None."""
    for half, bent in operand_orders(node, aten.mul.Tensor):
        x = _times(half, 0.5)
        turned = _plus(bent, 1.0)
        if x is None or not is_call(turned, aten.tanh.default):
            continue
        for one, cubic in operand_orders(
            _times(turned.args[0], math.sqrt(2 / math.pi)), aten.add.Tensor
        ):
            cube = _times(cubic, 0.044715)
            if one is x and is_call(cube, aten.pow.Tensor_Scalar) and cube.args == (x, 3):
                return x
    return None


def _times(node: AnyNode, factor: float) -> AnyNode:
    return next(
        (
            a
            for a, b in operand_orders(node, aten.mul.Tensor)
            if isinstance(b, SCALARS) and math.isclose(b, factor)
        ),
        None,
    )


def _plus(node: AnyNode, term: float) -> AnyNode:
    return next(
        (
            a
            for a, b in operand_orders(node, aten.add.Tensor)
            if isinstance(b, SCALARS) and b == term
        ),
        None,
    )


def flattened(node: AnyNode, width: int) -> AnyNode:
    """The node at which the attention's output ``[tokens, heads, dim]`` has become ``[..., heads * dim]``, following single views."""
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
    """Whether all extents are equal; compared as written, which adds no guard to the graph."""
    return one.dim() == other.dim() and all(
        str(a) == str(b) for a, b in zip(one.shape, other.shape, strict=True)
    )
