"""The context of converters: a network under construction and the graph it is made from."""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from inplace.operators.float8 import FLOAT8
from inplace.schema.specs import WORD, StateSpec
from inplace.trt import TensorRT
from torch.fx import Node

from inplace_builder.errors import LoweringError
from inplace_builder.graph.nodes import argument, source_line
from inplace_builder.lower.layers import ITensor, Layers

Cached = TypeVar("Cached")


@dataclass
class NetworkState:
    """A state as converters see it.

    Attributes:
        spec: its description.
        kind: the mechanism that updates it.
        input: the network input it is bound to.
        current: its value after the operators lowered so far; ``input`` until something writes it.
            Its shape is that of ``input``, which may have neighbouring axes of the state merged.
    """

    spec: StateSpec
    kind: str
    input: ITensor
    current: ITensor

    @property
    def written(self) -> bool:
        """Whether an operator has updated it."""
        return self.current is not self.input


class Network(Layers):
    """A network under construction, and the graph it is made from.

    Attributes:
        node: the node that is being lowered.
        values: what each node lowered so far has become.
        parameters: the tensors behind the placeholders of parameters, buffers and constants.
        states: the states by name.
        bound_weights: weights that became network inputs, see `bound`.
        scales: the names of bound weights that are scales of others, by the names of these.
        keep_alive: objects that must live until the network has been built and run; converters
            append to it.
        readers: for each state the values read from it since it was last written. A writer takes
            them as inputs, so that it runs after them.

    Args:
        tensorrt: what the network is made with.
        bind: names of weights that become inputs instead of constants.
    """

    node: Node

    def __init__(self, tensorrt: TensorRT, *, bind: Collection[str] = ()) -> None:
        super().__init__(tensorrt)
        self.values: dict[Node, Any] = {}
        self.parameters: dict[Node, torch.Tensor] = {}
        self.states: dict[str, NetworkState] = {}
        self.bound_weights: dict[str, torch.Tensor] = {}
        self.scales: dict[str, str] = {}
        self.keep_alive: list[object] = []
        self.readers: dict[str, list[ITensor]] = {}
        self._computed: set[Node] = set()  # nodes that are known not to be parameters
        self._bind = bind
        self._weight_inputs: dict[str, ITensor] = {}
        self._cache: dict[Hashable, Any] = {}

    def enter(self, node: Node) -> None:
        """Begin to lower a node: the layers added from now on carry its name and source line."""
        self.node, self.label, self.origin = node, node.name, source_line(node)

    def add_input(
        self, name: str, dtype: torch.dtype, shape: Sequence[int | torch.SymInt]
    ) -> ITensor:
        """Add an input; an extent that is not an integer is dynamic.

        Raises:
            LoweringError: TensorRT does not have the element type, or refuses the input.
        """
        if not self.tensorrt.has_dtype(dtype):
            raise LoweringError(f"input {name} is {dtype}, which TensorRT does not have")
        sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
        tensor = self.network.add_input(name, self.tensorrt.dtype(dtype), sizes)
        if tensor is None:
            error = self.log.last_errors(1)
            raise LoweringError(
                f"{self.tensorrt} refused the input {name} {dtype} {sizes}: {error}"
            )
        return tensor

    def parameter(self, node: object) -> torch.Tensor | None:
        """The parameter, buffer or constant of a node, or what is computed from those only.

        None for anything else.
        """
        if not isinstance(node, Node):
            return None
        if node not in self.parameters and node not in self._computed:
            folded = self._folded(node)
            if folded is None:
                self._computed.add(node)
            else:
                self.parameters[node] = folded
        return self.parameters.get(node)

    def _folded(self, node: Node) -> torch.Tensor | None:
        """The value of a call whose arguments are all parameters, such as a normalised weight."""
        sources = node.all_input_nodes
        if not isinstance(node.target, torch._ops.OpOverload) or not sources or _is_random(node):
            return None
        values: dict[Node, torch.Tensor] = {}
        for source in sources:
            if (known := self.parameter(source)) is None:
                return None
            values[source] = known
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: values[each])
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        return value.detach() if isinstance(value, torch.Tensor) else None

    def value(self, node: Node) -> Any:
        """The value a node was lowered to; a parameter becomes a constant or input at first use."""
        if node not in self.values and node in self.parameters:
            label, self.label = self.label, node.name
            tensor = self.parameters[node]
            self.values[node] = (
                self._bound_once(node.name, tensor)
                if node.name in self._bind
                else self.constant(as_words(tensor))
            )
            self.label = label
        return self.values[node]

    def bound(self, name: str, tensor: torch.Tensor) -> ITensor:
        """A weight as a network input, which the plan does not hold.

        The runtime binds one copy for all profiles and engines. The same name with the same tensor
        is the same input.

        Raises:
            LoweringError: another tensor already has the name.
        """
        if name not in self.bound_weights:
            self.bound_weights[name] = tensor
            words = as_words(tensor)
            self._weight_inputs[name] = self.add_input(name, words.dtype, words.shape)
        elif self.bound_weights[name] is not tensor:
            raise LoweringError(f"two weights are bound as {name!r}; give one of them another name")
        return self._weight_inputs[name]

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

    def cached(self, key: Hashable, make: Callable[[], Cached]) -> Cached:
        """The value of ``make`` for this key, made once: layers of a model share their masks."""
        if key not in self._cache:
            self._cache[key] = make()
        value: Cached = self._cache[key]
        return value

    def update_state(self, state: NetworkState, current: ITensor) -> None:
        """Record the value of a state from here on."""
        state.current = current

    def result(self) -> torch.Tensor:
        """The current node's result in the captured graph: a fake tensor with shape and dtype."""
        value = self.node.meta["val"]
        assert isinstance(value, torch.Tensor), f"{self.node} returns {type(value)}"
        return value

    def meta(self, argument: object) -> Any:
        """An argument of the current node in the captured graph: a fake tensor, or the argument."""
        return argument.meta["val"] if isinstance(argument, Node) else argument


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a network takes it: 8-bit floats are four in a word of 32 bits.

    Raises:
        LoweringError: there are 8-bit floats that do not fill words.
    """
    if tensor.dtype != FLOAT8:
        return tensor
    if tensor.shape[-1] % WORD:
        raise LoweringError(
            f"a weight {tuple(tensor.shape)} of {tensor.dtype} does not fill words of four; its "
            f"inputs must be a multiple"
        )
    return tensor.contiguous().view(torch.int32)


def _is_random(node: Node) -> bool:
    """Whether an operator draws random numbers; dropout does so only in training."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [each.name for each in node.target._schema.arguments]
    return "train" not in names or bool(argument(node, names.index("train"), "train", True))
