"""Run a user's module beside the graph or the engine that was made of it."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from inplace.standalone import Engine
from inplace_builder.capture.capture import Capture
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.compare import same_bits
from inplace_builder.states.attributes import attributes_of
from inplace_builder.states.objects import ObjectArguments
from inplace_builder.states.rewrite import CapturedState
from torch import Tensor, nn
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

HALF = (torch.float16, torch.bfloat16)

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


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree of arguments or results, in order; of objects too."""
    leaves = pytree.tree_leaves(ObjectArguments((tree,), {}).args)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def own_state(module: nn.Module, source: str) -> Tensor:
    """A state of a module by the name that its capture gives it: a buffer or an attribute."""
    states = dict(module.named_buffers())
    for path, value in attributes_of(module).items():
        leaves = pytree.tree_leaves(value)
        names = [path] if isinstance(value, Tensor) else [f"{path}_{x}" for x in range(len(leaves))]
        states |= dict(zip(names, leaves, strict=True))
    plain = {name.replace(".", "_"): tensor for name, tensor in states.items()}
    return plain[source.replace(".", "_")]


class EagerStates:
    """The tensors of a module that runs in eager mode, by the states of its capture.

    Args:
        capture: of the module.
        given: the states that its caller passes, in order.
        module: the module that runs, whose buffers are the others.
    """

    def __init__(self, capture: ExportedCapture, given: Any, module: nn.Module) -> None:
        names = dict.fromkeys(
            state.tensor.module_tensor.name
            for state in capture.states
            if state.tensor.owner == "caller"
        )
        self._names, self._given, self._module = list(names), given, module

    def __call__(self, state: CapturedState) -> Tensor:
        whole = state.tensor.module_tensor
        if whole.owner != "caller":
            return own_state(self._module, whole.source)
        given = tensors(self._given)  # of now: a step may put another tensor into an object
        assert len(given) == len(self._names)
        return given[self._names.index(whole.name)]


def compare_graph(
    module: nn.Module, states: Sequence[Any], inputs: Inputs, *, steps: int = 12, **options: Any
) -> ExportedCapture:
    """Capture ``module`` and run the graph beside it for some steps.

    The graph's states are the middle of an arena whose other slots hold noise. Outputs and states
    must be equal; foreign slots, and what eager PyTorch does not write, equal bit for bit.

    Args:
        module: takes its caller-owned states as the first arguments.
        states: those states.
        inputs: the further arguments of each step.
        steps: how many are run.
        options: of the capture.
    """
    eager, eager_given = deepcopy(module), deepcopy(states)
    capture = capture_exported(module, (*deepcopy(states), *inputs(0)), **options)
    arenas = [_arena(state) for state in capture.states]
    own = slice(1, capture.rows + 1)
    slots = torch.arange(1, capture.rows + 1, dtype=torch.int32)
    graph = capture.exported.module()
    assert isinstance(graph, torch.fx.GraphModule)
    eager_states = EagerStates(capture, eager_given, eager)
    for step in range(steps):
        arguments = inputs(step)
        before = [arena.clone() for arena in arenas]
        leaves = [leaf for leaf in pytree.tree_leaves(arguments) if leaf is not None]
        with torch.no_grad():
            expected = pytree.tree_leaves(eager(*eager_given, *arguments))
            results = pytree.tree_leaves(Interpreter(graph).run(*leaves, slots, *arenas))
        torch.testing.assert_close(results, expected, msg=f"{{}} in step {step}".format)
        for state, arena, old in zip(capture.states, arenas, before, strict=True):
            bound = state.bound(eager_states(state))
            torch.testing.assert_close(arena[own], bound, msg=f"{{}} of {state.name}".format)
            assert torch.equal(arena[0], old[0]) and torch.equal(arena[-1], old[-1])
            same = bound == old[own]
            assert torch.equal(arena[own][same], old[own][same])
    return capture


def _arena(state: CapturedState) -> Tensor:
    """Slots of noise around the slots of the state's rows."""
    bound = state.bound_initial()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2, (1, *bound.shape[1:]), generator=generator).to(bound.dtype)
    other = ~noise if bound.dtype is torch.bool else 1 - noise
    return torch.cat([noise, bound, other])


def compare_engine(
    engine: Engine,
    module: nn.Module,
    states: Callable[[], Sequence[Any]],
    inputs: Inputs,
    *,
    steps: int,
    callers: int = 1,
    device: str = "cpu",
    title: str = "",
    tolerance: float | None = None,
) -> list[list[Tensor]]:
    """Call an engine beside its module in eager mode on a CPU for some steps.

    Outputs and states must be close after each step; what a step of eager PyTorch does not change
    must be equal bit for bit; no state may move.

    Args:
        engine: of the module.
        module: takes its caller-owned states as the first arguments; it is not changed.
        states: makes those states.
        inputs: the further arguments of each step.
        steps: how many are run.
        callers: how many callers, each with states of its own, call in turn.
        device: where the engine's states and inputs are.
        title: for the message of a failure.
        tolerance: relative and absolute; None is what `torch.testing` takes for the type, which
            states of half precision always have: a GPU may round them otherwise.

    Returns:
        The outputs of each step.
    """
    eager = deepcopy(module)
    theirs = [states() for _ in range(callers)]
    mine = [_moved(states(), device) for _ in range(callers)]
    addresses = [tensor.data_ptr() for tensor in (*tensors(mine), *engine.states.values())]
    results = []
    for step in range(steps):
        caller, arguments = step % callers, inputs(step)
        own = [*tensors(mine[caller]), *engine.states.values()]
        before = [tensor.cpu().clone() for tensor in own]
        with torch.no_grad():
            expected = eager(*theirs[caller], *arguments)
        result = engine(*mine[caller], *_moved(arguments, device))
        assert pytree.tree_structure(result) == pytree.tree_structure(expected), title
        say = f"{{}} in step {step} of {title or type(module).__name__}".format
        for one, other in zip(tensors(result), tensors(expected), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance, msg=say)
        buffers = [own_state(eager, name) for name in engine.states]
        for one, other, old in zip(own, [*tensors(theirs[caller]), *buffers], before, strict=True):
            new = one.cpu()
            exact = None if new.dtype in HALF else tolerance
            torch.testing.assert_close(new, other, rtol=exact, atol=exact, msg=say)
            same = other == old
            assert same_bits(new[same], old[same]), say("a state was written where eager did not")
        results.append(tensors(result))
    assert addresses == [tensor.data_ptr() for tensor in (*tensors(mine), *engine.states.values())]
    return results


def _moved(tree: Any, device: str) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)
