"""Walk a captured graph once and turn each node into layers of a TensorRT network."""

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from inplace.operators import NAMESPACE
from inplace.operators.float8 import FLOAT8
from inplace.operators.state import VIEWS
from inplace.schema.specs import Alias, Lowering, StateSpec, in_words
from inplace.trt import TensorRT
from torch import Tensor
from torch.export.graph_signature import ConstantArgument
from torch.fx import Node

from inplace_builder.errors import LoweringError
from inplace_builder.graph.nodes import source_line
from inplace_builder.graph.program import AnyProgram, weights_of
from inplace_builder.lower.complex_numbers import REFUSED, touches_complex
from inplace_builder.lower.decompose import FAILURE, ORIGIN
from inplace_builder.lower.layers import ITensor
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.plugins import add_user_operator
from inplace_builder.lower.registry import find_converter, unsupported_reason

aten = torch.ops.aten


ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
"""Operators that only check what the capture already knows; they become no layers."""


ADVICE = (
    "docs/operators.md lists what is lowered; register a converter with "
    "inplace_builder.lower.registry, or build with engine='torch'"
)
"""Ends the error about operators without converter."""


@dataclass(frozen=True)
class LoweredNetwork:
    """A network that is ready to be built.

    Attributes:
        network: TensorRT's definition.
        builder: what made it, and builds it.
        inputs: names of its inputs in order: the program's, then the states, then bound weights.
        outputs: names of its outputs in order: the program's, then those of written states.
        state_outputs: for each state that is written, the output that holds its new value.
        bound_weights: weights that are inputs of the network, by the name they are bound under.
        context: keeps alive what the network refers to (constants, plugins).
    """

    network: Any
    builder: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state_outputs: Mapping[str, str]
    bound_weights: Mapping[str, Tensor]
    context: Network = field(repr=False)

    def dynamic_inputs(self) -> frozenset[str]:
        """Names of the inputs with an extent that is not fixed."""
        inputs = (self.network.get_input(index) for index in range(self.network.num_inputs))
        return frozenset(tensor.name for tensor in inputs if -1 in tuple(tensor.shape))

    def aliases(self, lowering: Iterable[Lowering]) -> tuple[Alias, ...]:
        """One alias for each written state, of the kind that its lowering names."""
        kinds = {record.state: record.kind for record in lowering}
        return tuple(
            Alias(output=output, input=state, kind=kinds[state])
            for state, output in self.state_outputs.items()
        )


def lower(
    exported: AnyProgram,
    *,
    outputs: Sequence[str],
    states: Sequence[StateSpec] = (),
    kinds: Mapping[str, str] | None = None,
    tensorrt: TensorRT,
    bind: Collection[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> LoweredNetwork:
    """Make the network of a captured graph.

    Args:
        exported: the program, in torch.export's training IR, or a rewritten copy of one.
        outputs: names for what it returns, in order.
        states: which of its inputs are states.
        kinds: for each state the mechanism that updates it.
        tensorrt: what to make it with.
        bind: names of weights that become inputs of the network instead of constants of the plan.
        shapes: shapes that states are bound with, where all their extents are known.
        constants: inputs that are always these tensors; the network does not have them as inputs.

    Raises:
        LoweringError: operators have no converter, or cannot be lowered as the graph uses them;
            names every one of them with the model's own line.
    """
    context = Network(tensorrt, bind=bind)
    context.parameters |= weights_of(exported)
    if constants:
        placeholders = exported.graph.find_nodes(op="placeholder")
        context.parameters |= {
            node: constants[node.name] for node in placeholders if node.name in constants
        }
    walk = _Walk(context, states, kinds or {}, shapes or {})
    walk.check(exported.graph)
    returned = _check_outputs(exported, outputs)
    for node in exported.graph.nodes:
        walk.visit(node)
    _mark_outputs(context, returned)
    state_outputs = _mark_states(context)
    return LoweredNetwork(
        network=context.network,
        builder=context.builder,
        inputs=(*walk.inputs, *context.bound_weights),
        outputs=(*outputs, *state_outputs.values()),
        state_outputs=state_outputs,
        bound_weights=context.bound_weights,
        context=context,
    )


@dataclass(frozen=True)
class _Problem:
    """Why a node cannot be lowered, and whether a converter would help."""

    text: str
    lacks_converter: bool


class _Walk:
    """Lowers the nodes of a graph, one after the other.

    Attributes:
        inputs: names of the tensor inputs so far, in order.

    Args:
        context: the network under construction.
        states, kinds, shapes: as of `lower`.
    """

    def __init__(
        self,
        context: Network,
        states: Sequence[StateSpec],
        kinds: Mapping[str, str],
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self._context, self._kinds, self._shapes = context, kinds, shapes
        self._specs = {state.name: state for state in states}
        self.inputs: list[str] = []

    def check(self, graph: torch.fx.Graph) -> None:
        """Refuse a graph with operators that cannot be lowered.

        Raises:
            LoweringError: names all of them, each with the model's lines that call it.
        """
        user_states: set[Node] = set()
        problems: dict[_Problem, None] = {}
        for node in graph.nodes:
            sources = node.all_input_nodes
            kinds = {self._kinds[each.name] for each in sources if self._is_state(each)}
            if "user" in kinds or not user_states.isdisjoint(sources):
                if node.target in VIEWS:
                    user_states.add(node)
            elif len(kinds) <= 1 and (problem := self._problem(node, next(iter(kinds), None))):
                problems[problem] = None
        if not problems:
            return
        if len(problems) == 1:
            (problem,) = problems
            advice = f"; {ADVICE}" if problem.lacks_converter else ""
            raise LoweringError(problem.text + advice)
        listed = "".join(f"\n  {problem.text}" for problem in problems)
        raise LoweringError(
            f"{len(problems)} uses of operators cannot be lowered:{listed}\n{ADVICE}"
        )

    def _is_state(self, node: Node) -> bool:
        return node.op == "placeholder" and node.name in self._specs

    def _problem(self, node: Node, kind: str | None) -> _Problem | None:
        """Why a node cannot be lowered, or None.

        Args:
            node: the node.
            kind: the mechanism of the states that it takes; None where it takes none.
        """
        target = node.target
        if not _needs_converter(node) or (kind is not None and target.namespace != NAMESPACE):  # type: ignore[union-attr]
            return None
        self._context.enter(node)
        made_by = "".join(f", part of {each}," for each in node.meta.get(ORIGIN, ())[:1])
        if touches_complex(node) and kind is None:
            if REFUSED not in node.meta:
                return None  # it uses the result of an operator that is refused
            text = f"operator {target}{made_by} cannot be lowered{self._context.origin}: "
            return _Problem(text + node.meta[REFUSED], lacks_converter=False)
        converter = find_converter(target, kind)  # type: ignore[arg-type]
        if converter is None:
            what = "no converter" if kind is None else f"no converter for states of kind {kind}"
            why = node.meta.get(FAILURE) or unsupported_reason(target)  # type: ignore[arg-type]
            detail = f" ({why})" if why else ""
            text = f"operator {target}{made_by} has {what}{self._context.origin}{detail}"
            return _Problem(text, lacks_converter=True)
        reason = converter.validator and converter.validator(node, self._context)
        if reason is None:
            return None
        text = f"operator {target}{made_by} cannot be lowered{self._context.origin}: {reason}"
        return _Problem(text, lacks_converter=False)

    def visit(self, node: Node) -> None:
        """Lower one node.

        Raises:
            LoweringError: it cannot be lowered.
        """
        context = self._context
        context.enter(node)
        if node.op == "placeholder" and node not in context.parameters:
            context.values[node] = self._placeholder(node)
        elif node.op == "call_function":
            context.values[node] = self._call(node)
        elif node.op not in ("placeholder", "get_attr", "output"):
            raise LoweringError(
                f"{node.op} {node.target}{context.origin} cannot be lowered; "
                f"capture a graph of operators only"
            )

    def _placeholder(self, node: Node) -> Any:
        meta = node.meta["val"]
        if not isinstance(meta, Tensor):
            return meta
        self.inputs.append(node.name)
        context, spec = self._context, self._specs.get(node.name)
        dtype, shape = meta.dtype, self._shapes.get(node.name, meta.shape)
        if spec is not None and dtype == FLOAT8:
            dtype, shape = torch.int32, in_words(shape)
        tensor = context.add_input(node.name, dtype, shape)
        if spec is None:
            context.extents.define(tensor, meta.shape)
            return tensor
        state = context.states[spec.name] = NetworkState(
            spec, self._kinds[spec.name], tensor, tensor
        )
        return state

    def _call(self, node: Node) -> Any:
        context, target = self._context, node.target
        if target in ASSERTIONS:
            return None
        if target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            return context.values[source][index]
        if _is_number(node):
            return node.meta["val"]  # an extent: an expression over those of the inputs
        if not isinstance(target, torch._ops.OpOverload):
            raise LoweringError(f"{target}{context.origin} is not an operator that can be lowered")
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), context.value)
        kind = self._kind(node, target)
        if kind == "user" and target.namespace != NAMESPACE:
            if target in VIEWS:
                return args[0]  # the state is bound with the extents that the operator takes
            return add_user_operator(context, target, args, kwargs)
        converter = find_converter(target, kind)
        assert converter is not None, f"{target} was not checked"
        return converter.convert(context, *args, **kwargs)

    def _kind(self, node: Node, target: torch._ops.OpOverload) -> str | None:
        """The mechanism of the states that an operator takes; None where it takes none."""
        values = (self._context.values.get(source) for source in node.all_input_nodes)
        states = [value for value in values if isinstance(value, NetworkState)]
        if not states:
            return None
        kinds = {state.kind for state in states}
        if kinds != {"user"} and target.namespace != NAMESPACE:
            raise LoweringError(
                f"{target}{self._context.origin} uses the state {states[0].spec.name}; "
                f"only inplace:: operators may"
            )
        if len(kinds) > 1:
            named = ", ".join(f"{state.spec.name}: {state.kind}" for state in states)
            raise LoweringError(
                f"{target}{self._context.origin} takes states of different kinds ({named}); "
                f"give them one"
            )
        return kinds.pop()


def _is_number(node: Node) -> bool:
    number = torch.SymInt | torch.SymBool | torch.SymFloat | int | float
    return isinstance(node.meta.get("val"), number)


def _needs_converter(node: Node) -> bool:
    """Whether a node becomes layers through a converter of its operator."""
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target not in ASSERTIONS
        and not _is_number(node)
    )


def _check_outputs(exported: AnyProgram, names: Sequence[str]) -> dict[str, Node]:
    """What the program returns, by name.

    Raises:
        LoweringError: it is not a tensor, or not as many; TensorRT does not have its type.
    """
    by_name = {node.name: node for node in exported.graph.nodes}
    arguments = [spec.arg for spec in exported.graph_signature.output_specs]
    nodes = [by_name[arg.name] for arg in arguments if not isinstance(arg, ConstantArgument)]
    if len(nodes) != len(names):
        raise LoweringError(
            f"the graph returns {len(nodes)} tensors, its description names {list(names)}"
        )
    for name, node in zip(names, nodes, strict=True):
        meta = node.meta["val"]
        if not isinstance(meta, Tensor):
            raise LoweringError(f"output {name} is not a tensor of the graph; return tensors only")
        if meta.is_complex():
            raise LoweringError(
                f"output {name} is {meta.dtype}, which TensorRT does not have{source_line(node)}; "
                f"return torch.view_as_real of it"
            )
    return dict(zip(names, nodes, strict=True))


def _mark_outputs(context: Network, returned: Mapping[str, Node]) -> None:
    for name, node in returned.items():
        context.label, context.origin = f"output.{name}", ""
        _mark_output(context, name, context.value(node), node.meta["val"].dtype)


def _mark_output(context: Network, name: str, tensor: ITensor, dtype: torch.dtype) -> None:
    """Mark through an identity layer.

    A tensor that is an input, a constant or another output cannot be marked under a new name.
    """
    output = context.output(context.network.add_identity(tensor))
    output.name = name
    if context.dtype_of(output) != dtype:
        raise LoweringError(
            f"output {name} is {context.dtype_of(output)} in the network and {dtype} in the graph"
        )
    context.network.mark_output(output)


def _mark_states(context: Network) -> dict[str, str]:
    """Mark the new values of written states as outputs; their names by state."""
    outputs = {}
    for state in context.states.values():
        if state.written:
            name = outputs[state.spec.name] = f"{state.spec.name}_updated"
            state.current.name = name
            context.network.mark_output(state.current)
    return outputs
