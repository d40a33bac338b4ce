"""Put new calls into a graph, with the metadata that later passes ask for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node


class Emitter:
    """Inserts calls at one place of a graph.

    Every call carries the fake value it would have (``meta["val"]``) and the source line of the node it stands for, so that a pass after
    this one sees no difference from a traced node.

    Args:
        graph: where to insert.
        source: the node whose line of the model the new calls inherit.
    """

    def __init__(self, graph: Graph, source: Node) -> None:
        self._graph = graph
        self._source = source

    @contextmanager
    def before(self, node: Node) -> Iterator["Emitter"]:
        """Insert before this node."""
        with self._graph.inserting_before(node):
            yield self

    @contextmanager
    def after(self, node: Node) -> Iterator["Emitter"]:
        """Insert after this node."""
        with self._graph.inserting_after(node):
            yield self

    def call(self, target: Any, *arguments: Any, **named: Any) -> Node:
        """Insert one call."""
        node = self._graph.call_function(target, arguments, named)
        if (trace := self._source.meta.get("stack_trace")) is not None:
            node.meta["stack_trace"] = trace
        concrete = torch.fx.node.map_arg((arguments, named), value)
        node.meta["val"] = target(*concrete[0], **concrete[1])
        return node


def value(node: Node) -> Any:
    """The fake tensor, or the symbolic number, that a node stands for."""
    return node.meta["val"]


def shape(node: Node) -> tuple[Any, ...]:
    """The extents of a node's tensor; a dynamic one is a ``torch.SymInt``."""
    return tuple(value(node).shape)


def dtype(node: Node) -> torch.dtype:
    """The element type of a node's tensor."""
    found = value(node).dtype
    assert isinstance(found, torch.dtype)
    return found
