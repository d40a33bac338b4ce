"""Copies of graphs."""

import copy

import torch


def copied_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy whose nodes have the same names.

    ``copy.deepcopy`` makes ``input_1`` of ``input``, ``id_1`` of ``id``: names of Python's own, and of many a module's arguments, by which
    a program's signature knows its placeholders.
    """
    copied = copy.deepcopy(graph)
    for node, original in zip(copied.nodes, graph.nodes, strict=True):
        node.name = original.name
        if node.op == "placeholder":
            node.target = original.target
    return copied
