"""Compute with complex numbers as pairs of real tensors: TensorRT has no complex numbers.

Each complex tensor of the graph becomes two tensors, its real and its imaginary part. Operators
that move elements, or add them, are applied to both parts; products, absolute values, angles,
exponentials and Fourier transforms are written out. An operator without a rule here is decomposed
like one without a converter, and refused if that does not help.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from inplace_builder.graph.nodes import Emitter, dtype, insert_constant, shape
from inplace_builder.graph.program import GraphProgram, weights_of

aten = torch.ops.aten


REFUSED = "complex_refused"
"""Key of a node's metadata: why it cannot be computed by real numbers."""


Part: TypeAlias = Node | float | None
"""One part of a complex tensor: a real tensor, one number for all elements, or nothing for 0."""


class Pair(NamedTuple):
    """A complex tensor or number."""

    real: Part
    imag: Part


Rule = Callable[..., Any]
"""Called as ``rule(emit, node, *args, **kwargs)``, complex tensors being pairs.

It returns a pair for a complex result, else a node, and raises `NotRealError` where it does not
apply.
"""


Function = TypeVar("Function", bound=Rule)


class NotRealError(Exception):
    """Why real numbers do not compute an operator as the graph uses it."""


_rules: dict[Any, Rule] = {}


def pair_rule(*targets: Any) -> Callable[[Function], Function]:
    """Register the decorated function for these operators."""

    def register(rule: Function) -> Function:
        _rules.update(dict.fromkeys(targets, rule))
        return rule

    return register


def complex_operators() -> frozenset[torch._ops.OpOverload]:
    """Every operator that is computed on pairs."""
    return frozenset(each for each in _rules if isinstance(each, torch._ops.OpOverload))


def has_complex_rule(target: object) -> bool:
    """Whether an operator on complex numbers is computed on pairs."""
    return target in _rules


def is_complex(node: object) -> bool:
    """Whether a node is a complex tensor, or several."""
    meta = node.meta.get("val") if isinstance(node, Node) else None
    values = meta if isinstance(meta, list | tuple) else (meta,)
    return any(isinstance(each, torch.Tensor) and each.is_complex() for each in values)


def touches_complex(node: Node) -> bool:
    """Whether a call takes or returns complex tensors."""
    return is_complex(node) or any(map(is_complex, node.all_input_nodes))


def remove_complex(program: GraphProgram) -> bool:
    """Replace complex tensors by pairs of real ones, in place; whether there were any.

    What cannot be replaced stays, with the reason under `REFUSED` in its metadata.
    """
    graph = program.graph
    if not any(map(touches_complex, graph.nodes)):
        return False
    fake = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
    pairs: dict[Node, Any] = _weights(program, fake)
    for node in list(graph.nodes):
        if node.op != "call_function" or not touches_complex(node):
            continue
        if any(is_complex(each) and each not in pairs for each in node.all_input_nodes):
            continue  # what made that input is refused
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        if (rule := _rules.get(node.target)) is None:
            node.meta[REFUSED] = "TensorRT has no complex numbers, and it has no form on real ones"
            continue
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda each: pairs.get(each, each)
        )
        emit = PairEmitter(program, node, fake)
        with emit.before(node):
            try:
                result = rule(emit, node, *args, **kwargs)
            except NotRealError as reason:
                node.meta[REFUSED] = str(reason)
                continue
            if is_complex(node):
                pairs[node] = result
            else:
                node.replace_all_uses_with(result)
    graph.eliminate_dead_code(
        lambda node: (
            node.op in ("placeholder", "output") or (node.is_impure() and node not in pairs)
        )
    )
    return True


class PairEmitter(Emitter):
    """Inserts calls and constants.

    Args:
        program: whose graph to insert into.
        source: the node whose line of the model the new calls inherit.
        fake: makes the values of constants.
    """

    def __init__(self, program: GraphProgram, source: Node, fake: Any) -> None:
        super().__init__(program.graph, source)
        self._program, self._fake = program, fake

    def call(self, target: Any, *arguments: Any, **named: Any) -> Node:
        """Insert one call; one without tensors makes a fake tensor too."""
        with self._fake:
            return super().call(target, *arguments, **named)

    def constant(self, tensor: torch.Tensor, name: str) -> Node:
        """Insert a buffer of the program's module."""
        node = insert_constant(self._program.graph, tensor, name)
        node.meta["val"] = self._fake.from_tensor(tensor.detach(), static_shapes=True)
        return node


def _weights(program: GraphProgram, fake: Any) -> dict[Node, Any]:
    """The parts of complex parameters, buffers and constants."""
    pairs = {}
    first = next(node for node in program.graph.nodes if node.op != "placeholder")
    for node, tensor in weights_of(program).items():
        if tensor.is_complex() and node.users:
            emit = PairEmitter(program, node, fake)
            with emit.before(first):
                parts = (tensor.real, tensor.imag)
                pairs[node] = Pair(*(emit.constant(part, node.name) for part in parts))
    return pairs


# Arithmetic of parts: what is 0 costs no layer.


def as_pair(x: Any) -> Pair:
    """Anything that may be an operand as a pair."""
    if isinstance(x, Pair):
        return x
    if isinstance(x, complex):
        return Pair(x.real if x.real or not x.imag else None, x.imag or None)
    return Pair(x, None)


def add(emit: PairEmitter, a: Part, b: Part) -> Part:
    """``a + b``."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Node):
        return emit.call(aten.add.Tensor, a, b)
    return emit.call(aten.add.Tensor, b, a) if isinstance(b, Node) else a + b


def negative(emit: PairEmitter, a: Part) -> Part:
    """``-a``."""
    if isinstance(a, Node):
        return emit.call(aten.neg.default, a)
    return None if a is None else -a


def subtract(emit: PairEmitter, a: Part, b: Part) -> Part:
    """``a - b``."""
    if isinstance(a, Node) and isinstance(b, Node):
        return emit.call(aten.sub.Tensor, a, b)
    return add(emit, a, negative(emit, b))


def multiply(emit: PairEmitter, a: Part, b: Part) -> Part:
    """``a * b``."""
    if a is None or b is None:
        return None
    if a == 1.0 or b == 1.0:
        return b if a == 1.0 else a
    if isinstance(a, Node):
        return emit.call(aten.mul.Tensor, a, b)
    return emit.call(aten.mul.Tensor, b, a) if isinstance(b, Node) else a * b


def product(
    emit: PairEmitter,
    a: Pair,
    b: Pair,
    times: Callable[[PairEmitter, Part, Part], Part] = multiply,
) -> Pair:
    """``(a + bi)(c + di) = ac - bd + (ad + bc)i``, for any product of two parts."""

    def of(x: Part, y: Part) -> Part:
        return None if x is None or y is None else times(emit, x, y)

    return Pair(
        subtract(emit, of(a.real, b.real), of(a.imag, b.imag)),
        add(emit, of(a.real, b.imag), of(a.imag, b.real)),
    )


def as_tensors(emit: PairEmitter, pair: Pair, element_type: torch.dtype) -> Pair:
    """A pair as two tensors of the same shape, which are the parts of this complex type.

    Raises:
        NotRealError: it is a number.
    """
    real, imag = (_cast(emit, part, element_type.to_real()) for part in pair)
    if not isinstance(real, Node):
        if not isinstance(imag, Node):
            raise NotRealError("it makes a complex number of no tensor")
        return Pair(emit.call(aten.full_like.default, imag, real or 0.0), imag)
    if not isinstance(imag, Node):
        return Pair(real, emit.call(aten.full_like.default, real, imag or 0.0))
    if not _same_shape(real, imag):  # one of them is broadcast
        real, imag = (
            emit.call(aten.add.Tensor, a, emit.call(aten.zeros_like.default, b))
            for a, b in ((real, imag), (imag, real))
        )
    return Pair(real, imag)


def _cast(emit: PairEmitter, part: Part, element_type: torch.dtype) -> Part:
    if not isinstance(part, Node) or dtype(part) == element_type:
        return part
    return emit.call(aten.to.dtype, part, element_type)


def _same_shape(a: Node, b: Node) -> bool:
    extents = zip(shape(a), shape(b), strict=False)
    return len(shape(a)) == len(shape(b)) and all(statically_known_true(x == y) for x, y in extents)
