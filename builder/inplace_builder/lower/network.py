"""The lowering context: walks a captured graph once and turns each node into layers."""

import operator
import types
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from inplace.operators import NAMESPACE
from inplace.operators.library import VIEWS
from inplace.schema.specs import StateSpec
from inplace.trt import TensorRT
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node

from inplace_builder.errors import BuildError
from inplace_builder.fusion.fuse import Fused
from inplace_builder.graph.nodes import source_line
from inplace_builder.lower.layers import ITensor, Layers
from inplace_builder.lower.registry import find_converter

Program: TypeAlias = torch.export.ExportedProgram | Fused


aten = torch.ops.aten


Made = TypeVar("Made")


CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
"""Operators that only check what the capture already knows."""


@dataclass
class NetworkState:
    """A state as converters see it.

    Attributes:
        spec: its description.
        kind: the mechanism that updates it.
        input: the network input it is bound to.
        current: what it holds after the operators lowered so far; ``input`` until something writes it.
    """

    spec: StateSpec
    kind: str
    input: ITensor
    current: ITensor

    @property
    def written(self) -> bool:
        """Whether an operator has updated it."""
        return self.current is not self.input


@dataclass
class LoweredNetwork:
    """A network that is ready to be built.

    Attributes:
        network: TensorRT's definition.
        builder: what made it, and builds it.
        inputs: names of its inputs in order: the program's, then the states, then bound weights.
        outputs: names of its outputs in order: the program's, then those of written states.
        state_outputs: for each state that is written, the name of the output that holds it afterwards.
        bound_weights: weights that are inputs of the network, by the name they are bound under.
        context: keeps alive what the network refers to (constants, plugins).
    """

    network: Any
    builder: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state_outputs: Mapping[str, str]
    bound_weights: Mapping[str, torch.Tensor]
    context: "Network" = field(repr=False)


class Network(Layers):
    """A network under construction, and the graph it is made from.

    Attributes:
        node: the node that is being lowered.
        states: the states by name.
        bound_weights: weights that became network inputs, see `bound`.
        keep: objects that must live until the network has been built and run, for converters to append to.
        readers: for each state what was read of it since it was last written, for a writer to come after.
    """

    node: Node

    def __init__(
        self,
        tensorrt: TensorRT,
        *,
        shapes: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
        constants: Mapping[str, torch.Tensor] = types.MappingProxyType({}),
    ) -> None:
        super().__init__(tensorrt)
        self._shapes, self._constants = shapes, constants
        self.states: dict[str, NetworkState] = {}
        self.bound_weights: dict[str, torch.Tensor] = {}
        self.keep: list[object] = []
        self.readers: dict[str, list[ITensor]] = {}
        self._values: dict[Node, Any] = {}
        self._parameters: dict[Node, torch.Tensor] = {}
        self._made: dict[Hashable, Any] = {}
        self._bind: Collection[str] = ()

    # What converters ask

    def parameter(self, node: object) -> torch.Tensor | None:
        """The parameter, buffer or constant tensor a placeholder stands for; None for any other node or argument."""
        return self._parameters.get(node) if isinstance(node, Node) else None

    def value(self, node: Node) -> Any:
        """What a node was lowered to; a parameter becomes a constant of the network when it is first asked for."""
        if node not in self._values and node in self._parameters:
            label, self.label = self.label, node.name
            tensor = self._parameters[node]
            self._values[node] = (
                self._bound_once(node.name, tensor)
                if node.name in self._bind
                else self.constant(tensor)
            )
            self.label = label
        return self._values[node]

    def bound(self, name: str, tensor: torch.Tensor) -> ITensor:
        """A weight as a network input: the plan does not hold it, the runtime binds one copy for all profiles and engines.

        The same name with the same tensor is the same input.

        Raises:
            BuildError: another tensor already has the name.
        """
        if name in self.bound_weights:
            if self.bound_weights[name] is not tensor:
                raise BuildError(
                    f"two weights are to be bound as {name!r}; give one of them another name"
                )
        else:
            self.bound_weights[name] = tensor
            self.keep.append(self._input(name, tensor.dtype, tensor.shape))
        return next(x for x in self.keep if getattr(x, "name", None) == name)

    def _bound_once(self, name: str, tensor: torch.Tensor) -> ITensor:
        """Tied weights are one tensor under several names: bound once."""
        for known, other in self.bound_weights.items():
            if (
                other.data_ptr() == tensor.data_ptr()
                and other.shape == tensor.shape
                and other.stride() == tensor.stride()
            ):
                return self.bound(known, other)
        return self.bound(name, tensor)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` makes, made once for all nodes that ask with this key: masks are the same in every layer of a model."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    def written(self, state: NetworkState, current: ITensor) -> None:
        """Record what a state holds from here on."""
        state.current = current

    def result(self) -> torch.Tensor:
        """What the node that is being lowered returns in the captured graph: a tensor without data, for its shape and dtype."""
        value = self.node.meta["val"]
        assert isinstance(value, torch.Tensor), f"{self.node} returns {type(value)}"
        return value

    def meta(self, argument: object) -> Any:
        """An argument of the node as the captured graph has it: a tensor without data, or the argument itself."""
        return argument.meta["val"] if isinstance(argument, Node) else argument

    # The walk

    def lower(
        self,
        exported: Program,
        outputs: Sequence[str],
        states: Sequence[StateSpec],
        kinds: Mapping[str, str],
        bind: Collection[str] = (),
    ) -> LoweredNetwork:
        """Lower a whole graph; see `inplace_builder.lower.lower`."""
        self._bind = bind
        specs = {state.name: state for state in states}
        self._find_parameters(exported)
        inputs, result = [], None
        for node in exported.graph.nodes:
            self.node, self.label, self.origin = node, node.name, source_line(node)
            if node.op == "placeholder" and node not in self._parameters:
                self._values[node] = self._placeholder(node, specs.get(node.name), kinds)
                if isinstance(node.meta["val"], torch.Tensor):
                    inputs.append(node.name)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                result = node
            elif node.op not in ("placeholder", "get_attr"):
                raise BuildError(
                    f"{node.op} {node.target}{self.origin} cannot be lowered; capture a graph of operators only"
                )
        assert result is not None
        self._mark_outputs(exported, result, outputs)
        state_outputs = self._mark_states()
        return LoweredNetwork(
            network=self.network,
            builder=self.builder,
            inputs=(*inputs, *self.bound_weights),
            outputs=(*outputs, *state_outputs.values()),
            state_outputs=state_outputs,
            bound_weights=self.bound_weights,
            context=self,
        )

    def _find_parameters(self, exported: Program) -> None:
        for node in exported.graph.find_nodes(op="get_attr"):
            self._parameters[node] = getattr(exported.graph_module, node.target)
        placeholders = {
            node.name: node for node in exported.graph.nodes if node.op == "placeholder"
        }
        for spec in exported.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                assert spec.target is not None
                found = exported.state_dict.get(spec.target)
                self._parameters[placeholders[spec.arg.name]] = (
                    exported.constants[spec.target] if found is None else found
                )
        self._parameters |= {placeholders[name]: tensor for name, tensor in self._constants.items()}

    def _placeholder(self, node: Node, spec: StateSpec | None, kinds: Mapping[str, str]) -> Any:
        meta = node.meta["val"]
        if not isinstance(meta, torch.Tensor):
            return meta
        tensor = self._input(node.name, meta.dtype, self._shapes.get(node.name, meta.shape))
        if spec is None:
            self.extents.define(tensor, meta.shape)
            return tensor
        state = NetworkState(spec, kinds[spec.name], tensor, tensor)
        self.states[spec.name] = state
        return state

    def _input(self, name: str, dtype: torch.dtype, shape: Sequence[int | torch.SymInt]) -> ITensor:
        if not self.tensorrt.has_dtype(dtype):
            raise BuildError(f"input {name} is {dtype}, which TensorRT does not have")
        sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
        tensor = self.network.add_input(name, self.tensorrt.dtype(dtype), sizes)
        if tensor is None:
            raise BuildError(
                f"{self.tensorrt} refused the input {name} {dtype} {sizes}: {self.log.last_errors(1)}"
            )
        return tensor

    def _call(self, node: Node) -> Any:
        if node.target in CHECKS:
            return None
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, Node)
            return self._values[source][index]
        if isinstance(
            node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat | int | float
        ):
            return node.meta[
                "val"
            ]  # an extent: an expression over those of the inputs, whatever computes it here
        if not isinstance(node.target, torch._ops.OpOverload):
            raise BuildError(f"{node.target}{self.origin} is no operator that can be lowered")
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), self.value)
        kind = self._kind(node)
        if kind == "user" and node.target.namespace != NAMESPACE:
            if node.target in VIEWS:
                return arguments[0][0]  # it is bound with the extents that the operator takes
            from inplace_builder.lower.plugins import call_user_operator

            return call_user_operator(self, node, *arguments)
        found = find_converter(node.target, kind)
        if found is None:
            what = "no converter" if kind is None else f"no converter for states of the kind {kind}"
            raise BuildError(
                f"operator {node.target} has {what}{self.origin}; register one with inplace_builder.lower.registry"
            )
        if found.supports is not None and (because := found.supports(node, self)) is not None:
            raise BuildError(f"operator {node.target} cannot be lowered{self.origin}: {because}")
        args, kwargs = arguments
        return found.convert(self, *args, **kwargs)

    def _kind(self, node: Node) -> str | None:
        """The mechanism of the states that an ``inplace::`` operator takes; None where it takes none."""
        taken = [
            self._values[source]
            for source in node.all_input_nodes
            if isinstance(self._values.get(source), NetworkState)
        ]
        if not taken:
            return None
        target = node.target
        kinds: set[str] = {state.kind for state in taken}
        if kinds != {"user"} and not (
            isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
        ):
            raise BuildError(
                f"{target}{self.origin} uses the state {taken[0].spec.name}; only inplace:: operators may"
            )
        if len(kinds) > 1:
            named = ", ".join(f"{state.spec.name}: {state.kind}" for state in taken)
            raise BuildError(
                f"{target}{self.origin} takes states of different kinds ({named}); give them one"
            )
        return kinds.pop()

    def _mark_outputs(self, exported: Program, result: Node, names: Sequence[str]) -> None:
        by_name = {node.name: node for node in exported.graph.nodes}
        specs = [spec.arg for spec in exported.graph_signature.output_specs]
        found = [by_name[spec.name] for spec in specs if not isinstance(spec, ConstantArgument)]
        if len(found) != len(names):
            raise BuildError(
                f"the graph returns {len(found)} tensors, its description names {list(names)}"
            )
        for node, name in zip(found, names, strict=True):
            if not isinstance(node.meta["val"], torch.Tensor):
                raise BuildError(f"output {name} is no tensor of the graph; return tensors only")
            self.label, self.origin = f"output.{name}", ""
            self._mark(name, self.value(node), node.meta["val"].dtype)

    def _mark_states(self) -> dict[str, str]:
        found = {}
        for state in self.states.values():
            if state.written:
                name = found[state.spec.name] = f"{state.spec.name}_updated"
                state.current.name = name
                self.network.mark_output(state.current)
        return found

    def _mark(self, name: str, tensor: ITensor, dtype: torch.dtype) -> None:
        """Mark through an identity: a tensor that is an input, a constant or another output cannot be marked again under a new name."""
        layer = self.added(self.network.add_identity(tensor))
        output = layer.get_output(0)
        output.name = name
        if self.dtype_of(output) != dtype:
            raise BuildError(
                f"output {name} is {self.dtype_of(output)} in the network and {dtype} in the graph"
            )
        self.network.mark_output(output)
