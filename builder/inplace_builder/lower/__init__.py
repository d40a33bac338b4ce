"""Lowering: a captured graph becomes a TensorRT network, and the network a plan.

States are inputs of the network and, where they are written, also outputs. `lower` walks the graph;
every operator has a converter, an operator on states one for each mechanism.
"""

from inplace_builder.lower import (
    complex_rules,
    copy_states,
    fourier,
    kv_cache_update,
    plugins,
    static_slots,
)
from inplace_builder.lower.compile import CompileOptions, compile_network
from inplace_builder.lower.converters import (
    accumulate,
    arithmetic,
    convolution,
    functions,
    indexing,
    indices,
    logic,
    matrix,
    normalization,
    padding,
    pooling,
    reduction,
    scatter,
    shape,
    sorting,
    unsupported,
)
from inplace_builder.lower.decompose import lowerable
from inplace_builder.lower.lowering import LoweredNetwork, lower
from inplace_builder.lower.mechanisms import Eligibility, StateUse, choose_mechanisms, mechanism
from inplace_builder.lower.network import Network, NetworkState
from inplace_builder.lower.registry import converter, state_converter

__all__ = [
    "CompileOptions",
    "Eligibility",
    "LoweredNetwork",
    "Network",
    "NetworkState",
    "StateUse",
    "choose_mechanisms",
    "compile_network",
    "converter",
    "lower",
    "lowerable",
    "mechanism",
    "state_converter",
]


CONVERTER_MODULES = (
    arithmetic,
    functions,
    indexing,
    indices,
    logic,
    matrix,
    convolution,
    normalization,
    padding,
    pooling,
    reduction,
    sorting,
    scatter,
    accumulate,
    shape,
    unsupported,
    complex_rules,
    fourier,
    static_slots,
    copy_states,
    kv_cache_update,
    plugins,
)
"""All modules with converters; importing them registers their converters and mechanisms."""
