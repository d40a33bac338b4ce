"""Run a user's module and the graph made of it side by side."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from inplace_builder.capture.capture import Capture
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.states.state import CapturedState, Owner
from torch import Tensor, nn
from torch.fx import Interpreter

Inputs = Callable[[int], Sequence[Any]]
"""The arguments of a step, by its number, caller-owned states left out."""


def operators(capture: Capture | ExportedCapture) -> dict[str, int]:
    """How often the graph has each of the ``inplace::`` operators."""
    counts: dict[str, int] = {}
    for node in capture.exported.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "inplace":
            name = node.target._opname
            counts[name] = counts.get(name, 0) + 1
    return counts


class Owned:
    """The tensors of a module that runs in eager mode, by the states of its capture.

    Args:
        capture: of the module.
        given: the states that its caller passes, in order.
        module: the module that runs, whose buffers are the others.
    """

    def __init__(self, capture: ExportedCapture, given: Any, module: nn.Module) -> None:
        tensors = [
            leaf for leaf in torch.utils._pytree.tree_leaves(given) if isinstance(leaf, Tensor)
        ]
        names = dict.fromkeys(
            state.tensor.module_tensor.name
            for state in capture.states
            if state.tensor.owner is Owner.CALLER
        )
        self._given, self._module = dict(zip(names, tensors, strict=True)), module

    def __call__(self, state: CapturedState) -> Tensor:
        whole = state.tensor.module_tensor
        return (
            self._given[whole.name]
            if whole.owner is Owner.CALLER
            else self._module.get_buffer(whole.source)
        )


def compare(
    module: nn.Module, states: Sequence[Any], inputs: Inputs, *, steps: int = 12, **options: Any
) -> ExportedCapture:
    """Capture ``module``, whose first arguments are its caller-owned states, and run both for some steps.

    The graph's states lie in the middle of an arena whose other slots hold noise. Outputs and states must be equal, foreign slots and what
    eager PyTorch leaves untouched bit-identical.
    """
    eager = deepcopy(module)
    mine = deepcopy(states)
    capture = capture_exported(module, (*deepcopy(states), *inputs(0)), **options)
    rows = capture.rows
    generator = torch.Generator().manual_seed(0)
    arenas = []
    for state in capture.states:
        bound = state.bound_initial()
        noise = torch.randint(0, 2, (1, *bound.shape[1:]), generator=generator).to(bound.dtype)
        arenas.append(torch.cat([noise, bound, 1 - noise if bound.dtype != torch.bool else ~noise]))
    slots = torch.arange(1, rows + 1, dtype=torch.int32)
    graph = capture.exported.module()
    assert isinstance(graph, torch.fx.GraphModule)
    owned = Owned(capture, mine, eager)
    with torch.no_grad():
        for step in range(steps):
            arguments = inputs(step)
            before = [arena.clone() for arena in arenas]
            wanted = eager(*mine, *arguments)
            flat = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if leaf is not None]
            found = Interpreter(graph).run(*flat, slots, *arenas)
            wanted, found = (
                torch.utils._pytree.tree_leaves(wanted),
                torch.utils._pytree.tree_leaves(found),
            )
            torch.testing.assert_close(found, wanted, msg=f"{{}} in step {step}".format)
            for state, arena, old in zip(capture.states, arenas, before, strict=True):
                own = owned(state)
                torch.testing.assert_close(
                    arena[1 : rows + 1], state.bound(own), msg=f"{{}} of {state.name}".format
                )
                assert torch.equal(arena[0], old[0]) and torch.equal(arena[rows + 1], old[rows + 1])
                same = state.bound(own) == old[1 : rows + 1]
                assert torch.equal(arena[1 : rows + 1][same], old[1 : rows + 1][same])
    return capture
