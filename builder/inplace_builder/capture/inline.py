"""A captured module as a plain one again: the inverse of `lift_mutated_buffers`."""

from copy import deepcopy

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inplace_builder.capture.exported import ExportedCapture
from inplace_builder.graph.nodes import placeholders_by_name, returned_values
from inplace_builder.states.lift import SLOTS, FunctionalGraph, StateTensor

aten = torch.ops.aten


def inline_lifted_buffers(lifted: FunctionalGraph | ExportedCapture) -> GraphModule:
    """A plain module that holds its own states again.

    States that the module owned become buffers under their old names. Each call updates them in
    place, so `torch.export.export` takes the module and finds them mutated. States that the caller
    owned stay arguments that a call updates.

    Args:
        lifted: what `lift_mutated_buffers` returned: buffers and arguments get the module's own
            shapes. Or a capture: its graph is on the ``inplace::`` operators, and a state has a
            slot axis in front if the module's own tensor has none (`CapturedState.bound`).

    Returns:
        A module of the inputs, then the caller's states, that returns a tuple of the outputs.
    """
    module = deepcopy(lifted.graph_module)
    if isinstance(lifted, FunctionalGraph):
        _write_back(module, lifted.states, lifted.num_outputs)
        for state in lifted.states:
            if state.owner == "module":
                _make_buffer(module, state.name, state.source, state.initial.clone())
    else:
        tensors: dict[str, Tensor] = {}
        for captured in lifted.states:
            whole = captured.tensor.module_tensor
            if whole.owner == "module":
                tensor = tensors.setdefault(whole.source, whole.initial.clone())
                buffer = captured.tensor.source.translate(_INDEX_TO_NAME)
                _make_buffer(module, captured.name, buffer, captured.bound(tensor))
        _make_buffer(module, SLOTS, f"_{SLOTS}", lifted.slots())
    _move_placeholders_first(module)
    module.recompile()
    return module


def _write_back(module: GraphModule, states: tuple[StateTensor, ...], num_outputs: int) -> None:
    """Copy each state's new value into it at the end of the graph.

    All new values are cloned before any is written: one may be a part of another state, or that
    state itself. Outputs are cloned, so that none is a state's own memory.
    """
    graph = module.graph
    last, returned = graph.output_node(), returned_values(graph)
    placeholders = placeholders_by_name(graph)
    with graph.inserting_before(last):
        new_values = [
            graph.call_function(aten.clone.default, (new,)) for new in returned[num_outputs:]
        ]
        outputs = tuple(
            graph.call_function(aten.clone.default, (output,)) if _is_tensor(output) else output
            for output in returned[:num_outputs]
        )
        for state, new in zip(states, new_values, strict=True):
            graph.call_function(aten.copy_.default, (placeholders[state.name], new))
    last.args = (outputs,)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


_INDEX_TO_NAME = str.maketrans({"[": "_", "]": "", ":": "", ",": "", " ": ""})
"""Makes a buffer's name of the name of a part: ``cache_3`` of ``cache[3]``."""


def _make_buffer(module: GraphModule, name: str, target: str, tensor: Tensor) -> None:
    """Replace a placeholder by a buffer of the module."""
    node = placeholders_by_name(module.graph)[name]
    _register(module, target, tensor)
    with module.graph.inserting_before(node):
        buffer = module.graph.create_node("get_attr", target)
    buffer.meta.update(node.meta)
    node.replace_all_uses_with(buffer)
    module.graph.erase_node(node)


def _move_placeholders_first(module: GraphModule) -> None:
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
