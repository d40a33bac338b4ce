"""The rule of the narrow waist: a graph touches state through the ``inplace::`` operators, and through nothing else."""

from collections.abc import Collection

import torch
from inplace.operators import NAMESPACE
from inplace.operators.library import VIEWS, written_arguments

from inplace_builder.errors import BuildError


def check_state_uses(graph: torch.fx.Graph, states: Collection[str]) -> None:
    """Refuse a graph in which something other than an ``inplace::`` operator reads or writes a state.

    Raises:
        BuildError: names the state, the operator and the line of the model that called it.
    """
    for node in graph.nodes:
        if node.op != "placeholder" or node.name not in states:
            continue
        for user in node.users:
            if not (isinstance(user.target, torch._ops.OpOverload) and user.target.namespace == NAMESPACE) and not _for_writers(user):
                what = "returned by the model" if user.op == "output" else f"used by {user.target}"
                raise BuildError(
                    f"state {node.name} is {what}{source_line(user)}: a state may only be used by inplace.operators.read, update and "
                    f"attention; read it first, and write it back with update"
                )


def _for_writers(node: torch.fx.Node) -> bool:
    """Whether a node is the part of a state that operators of the user's own write, and nothing else."""
    return node.target in VIEWS and bool(node.users) and all(node in written_arguments(user) for user in node.users)


def source_line(node: torch.fx.Node) -> str:
    """The model's own line that made this node, as `` at file:line (code)``; empty where tracing kept none."""
    lines = [line.strip() for line in (node.stack_trace or "").strip().splitlines()]
    for where, code in zip(lines[-2::-1], lines[::-1], strict=False):
        if where.startswith("File "):
            return f" at {where.removeprefix('File ')} ({code})"
    return ""
