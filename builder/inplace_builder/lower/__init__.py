"""Lowering: a captured graph becomes a TensorRT network whose states are inputs and, where written, outputs.

`lower` walks the graph; every operator has a converter (`registry`, `converters`), an operator on states one for each mechanism.
"""

from collections.abc import Collection, Mapping, Sequence

from inplace.schema.specs import StateSpec
from inplace.trt import TensorRT
from torch import Tensor

from inplace_builder.lower import converters, copying, native, plugins
from inplace_builder.lower import plugins as user
from inplace_builder.lower.compile import CompileOptions, compile_network
from inplace_builder.lower.mechanisms import Eligibility, StateUse, choose, mechanism
from inplace_builder.lower.network import LoweredNetwork, Network, NetworkState, Program
from inplace_builder.lower.registry import converter, state_converter

__all__ = [
    "CompileOptions",
    "Eligibility",
    "LoweredNetwork",
    "Network",
    "NetworkState",
    "StateUse",
    "choose",
    "compile_network",
    "converter",
    "lower",
    "mechanism",
    "state_converter",
]


_REGISTERED = (
    converters,
    copying,
    native,
    plugins,
    user,
)  # importing them registers what they have


def lower(
    exported: Program,
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
        exported: the graph, in torch.export's training IR, or fused.
        outputs: names for what it returns, in order.
        states: which of its inputs are states.
        kinds: for each state the mechanism that updates it.
        tensorrt: what to make it with.
        bind: names of weights that become inputs of the network instead of constants of the plan.
        shapes: what states are bound with, where all their extents are known.
        constants: inputs that are always these tensors, so that the network does not have them.

    Raises:
        BuildError: an operator has no converter, or cannot be lowered as the graph uses it; names it and the model's own line.
    """
    network = Network(tensorrt, shapes=shapes or {}, constants=constants or {})
    return network.lower(exported, outputs, states, kinds or {}, bind)
