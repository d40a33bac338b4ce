"""Lowering: a captured graph becomes a TensorRT network whose states are inputs and, where written, outputs.

`lower` walks the graph; every operator has a converter (`registry`, `converters`), an operator on states one for each mechanism.
"""

from collections.abc import Mapping, Sequence

import torch
from inplace.manifest import StateSpec
from inplace.trt import TensorRT

from inplace_builder.lower import converters as converters
from inplace_builder.lower.compile import CompileOptions, compile_network
from inplace_builder.lower.network import Lowered, Network, State
from inplace_builder.lower.registry import converter, state_converter

__all__ = ["CompileOptions", "Lowered", "Network", "State", "compile_network", "converter", "lower", "state_converter"]


def lower(
    exported: torch.export.ExportedProgram,
    *,
    outputs: Sequence[str],
    states: Sequence[StateSpec] = (),
    kinds: Mapping[str, str] | None = None,
    tensorrt: TensorRT,
) -> Lowered:
    """Make the network of a captured graph.

    Args:
        exported: the graph, in torch.export's training IR.
        outputs: names for what it returns, in order.
        states: which of its inputs are states.
        kinds: for each state the mechanism that updates it.
        tensorrt: what to make it with.

    Raises:
        BuildError: an operator has no converter, or cannot be lowered as the graph uses it; names it and the model's own line.
    """
    return Network(tensorrt).lower(exported, outputs, states, kinds or {})
