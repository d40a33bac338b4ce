"""Lifted buffers put back: the inverse of `lift_mutated_buffers`."""

from copy import deepcopy

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.capture.exported import ExportedCapture
from inplace_builder.states.lift import FunctionalGraph
from inplace_builder.states.rewrite import SLOTS
from inplace_builder.states.state import Owner, StateTensor

aten = torch.ops.aten


def inline_lifted_buffers(lifted: FunctionalGraph | ExportedCapture) -> GraphModule:
    """A plain module that holds its own states again.

    Module-owned states become buffers under their old names, updated in place by each call, so `torch.export.export` takes the module and
    finds them mutated. Caller-owned ones stay arguments that a call updates.

    Args:
        lifted: what `lift_mutated_buffers` made: its buffers and arguments have the module's own shapes. Or a capture: its graph is on the
            ``inplace::`` operators, and states have a slot axis in front where the module's own is none (`State.bound`).

    Returns:
        A module of the inputs, then the caller-owned states, that returns a tuple of the outputs.
    """
    module = deepcopy(lifted.graph_module)
    if isinstance(lifted, FunctionalGraph):
        _write_back(module, lifted.states, lifted.num_outputs)
        for state in lifted.states:
            if state.owner is Owner.MODULE:
                _make_buffer(module, state.name, state.source, state.initial.clone())
    else:
        wholes: dict[str, Tensor] = {}
        for part in lifted.states:
            whole = part.tensor.module_tensor
            if whole.owner is Owner.MODULE:
                held = wholes.setdefault(whole.source, whole.initial.clone())
                _make_buffer(
                    module, part.name, part.tensor.source.translate(_NO_INDEX), part.bound(held)
                )
        _make_buffer(module, SLOTS, f"_{SLOTS}", lifted.slots())
    _placeholders_first(module)
    module.recompile()
    return module


def _write_back(module: GraphModule, states: tuple[StateTensor, ...], outputs: int) -> None:
    """Copy each state's new value into it, when all of them are computed and nothing that is returned is a state's own memory."""
    graph = module.graph
    last = graph.output_node()
    returned = last.args[0]
    assert isinstance(returned, tuple)
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    with graph.inserting_before(last):
        # a value may be a part of another state, or that state itself: it is taken before any is written
        values = [graph.call_function(aten.clone.default, (value,)) for value in returned[outputs:]]
        kept = tuple(
            graph.call_function(aten.clone.default, (x,)) if _is_tensor(x) else x
            for x in returned[:outputs]
        )
        for state, value in zip(states, values, strict=True):
            graph.call_function(aten.copy_.default, (placeholders[state.name], value))
    last.args = (kept,)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


_NO_INDEX = str.maketrans({"[": "_", "]": "", ":": "", ",": "", " ": ""})
"""Makes the name of a buffer of that of a part: ``cache[3]`` is ``cache_3``."""


def _make_buffer(module: GraphModule, name: str, target: str, tensor: Tensor) -> None:
    """Let the module hold what was passed."""
    node = next(
        node for node in module.graph.nodes if node.op == "placeholder" and node.name == name
    )
    _register(module, target, tensor)
    with module.graph.inserting_before(node):
        buffer = module.graph.create_node("get_attr", target)
    buffer.meta.update(node.meta)
    node.replace_all_uses_with(buffer)
    module.graph.erase_node(node)


def _placeholders_first(module: GraphModule) -> None:
    graph = module.graph
    for node in reversed([node for node in graph.nodes if node.op == "get_attr"]):
        last = next((other for other in reversed(graph.nodes) if other.op == "placeholder"), None)
        if last is not None:
            last.append(node)


def _register(module: torch.nn.Module, target: str, tensor: Tensor) -> None:
    *parents, name = target.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, torch.nn.Module())
        module = getattr(module, parent)
    module.register_buffer(name, tensor)
