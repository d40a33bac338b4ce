"""How far verification must run a sequence: past whatever may change with the position.

Two things in a graph change what a step computes at some position: a window, and a number that
positions are compared with or divided by (a temperature that grows every 8192 positions, an
embedding that is clamped). Rings that wrap are `inplace_builder.served.verify`'s own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from inplace.schema.programs import Program
from inplace.schema.specs import Role
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from inplace_builder.capture.capture import Capture

aten = torch.ops.aten


MAX_RECTANGULAR = 4096
"""Constants of a rectangular program beyond this are not verified.

It takes one step per position.
"""


_THRESHOLDS = frozenset(
    {
        aten.floor_divide,
        aten.div,
        aten.remainder,
        aten.fmod,
        aten.sub,
        aten.rsub,
        aten.clamp,
        aten.clamp_min,
        aten.clamp_max,
        aten.minimum,
        aten.maximum,
        aten.ge,
        aten.gt,
        aten.le,
        aten.lt,
        aten.eq,
        aten.ne,
        aten.mul,
    }
)
"""Operators between a position and a number after which a result may change at that number."""


def positions_to_verify(capture: Capture, capacity: int) -> int:
    """The number of positions that some sequence must reach.

    Args:
        capture: the captured model.
        capacity: maximum number of positions of a sequence.

    Returns:
        Twice the largest window (or chunk of chunked attention) and a chunk, and a chunk past each
        constant; at most the capacity.
    """
    program = capture.program
    target = torch.ops.inplace.attention.default
    attentions = capture.exported.graph.find_nodes(op="call_function", target=target)
    options = ("window", "attention_chunk")
    window = max((node.kwargs.get(x, 0) for node in attentions for x in options), default=0)
    limit = capacity if program.row_layout == "packed" else min(capacity, MAX_RECTANGULAR)
    stated = max((number for number in capture.thresholds if number < limit), default=0)
    constants = position_constants(capture.exported, program)
    past = max((constant for constant in constants if constant < limit), default=0)
    past_windows = 2 * (max(window, stated) + program.chunk)
    past_constants = past + program.chunk + 3  # single tokens too, after the chunk that crosses it
    return min(capacity, max(past_windows, past_constants))


def position_constants(exported: ExportedProgram, program: Program) -> set[int]:
    """The numbers above 1 that a graph combines with positions by an operator of `_THRESHOLDS`.

    A value counts as a position while it is computed from positions and constants alone. A factor
    below 1 counts as the division by its inverse.
    """
    names = {
        spec.name for spec in program.inputs if spec.role in (Role.POSITIONS, Role.WRITE_INDICES)
    }
    constants = _constants(exported)
    fixed: set[Node] = set()
    positions: set[Node] = set()
    result: set[int] = set()
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                positions.add(node)
            elif node.name in constants:
                fixed.add(node)
            continue
        if node.op == "get_attr":
            fixed.add(node)
            continue
        inputs = set(node.all_input_nodes)
        if node.op != "call_function" or not inputs <= fixed | positions:
            continue
        if not inputs & positions:
            fixed.add(node)
            continue
        positions.add(node)
        if getattr(node.target, "overloadpacket", None) in _THRESHOLDS:
            for given in (*node.args, *node.kwargs.values()):
                result |= _threshold(given, constants)
    return result


def _constants(exported: ExportedProgram) -> Mapping[str, Any]:
    """The tensor of each placeholder that no caller gives."""
    signature = exported.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {
        name: exported.state_dict.get(target, exported.constants.get(target))
        for name, target in targets.items()
    }


def _threshold(given: object, constants: Mapping[str, Any]) -> set[int]:
    """The position at which one operand changes a result; empty if there is none."""
    if isinstance(given, Node):
        while given.op == "call_function" and len(given.all_input_nodes) == 1:  # copies of it
            given = given.all_input_nodes[0]
        given = constants.get(given.name)
        if not isinstance(given, Tensor) or given.numel() != 1 or given.is_meta:
            return set()
        given = given.item()
    if isinstance(given, bool) or not isinstance(given, int | float) or not given:
        return set()
    number = abs(given)
    number = 1 / number if number < 1 else number
    return {int(number)} if 1 < number < 1 << 31 else set()
