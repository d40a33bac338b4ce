"""Exporting a graph again after it was rewritten."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decompositions
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.overrides import TorchFunctionMode

from inplace_builder.graph.nodes import copy_graph


def copy_module(module: GraphModule) -> GraphModule:
    """A copy of the graph over the same tensors, to keep while the first is rewritten."""
    return GraphModule(module, copy_graph(module.graph))


def without_unused_attributes(module: GraphModule) -> GraphModule:
    """The same graph, with only the attributes that it still uses.

    A mask that became a part of `inplace::attention` then needs no memory.
    """
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return GraphModule(
        {target: torch.fx.graph_module._get_attr(module, target) for target in used}, module.graph
    )


class InterpretedModule(torch.nn.Module):
    """Runs a graph node by node, so that an export of it keeps the model's source lines."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self.body = graph_module

    def forward(self, *arguments: Any) -> Any:
        """Run the graph."""
        with torch.fx.traceback.preserve_node_meta():
            return Interpreter(self.body).run(*arguments)


def rename_inputs(exported: ExportedProgram, names: Sequence[str]) -> None:
    """Give the placeholders these names, in place: a variadic ``forward`` loses them.

    Another node that has one of the names gets a new one.
    """
    signature, nodes = exported.graph_signature, {node.name: node for node in exported.graph.nodes}
    inputs = [nodes[name] for name in signature.user_inputs]

    def rename(node: Node, new: str) -> None:
        signature.replace_all_uses(node.name, new)
        for spec in signature.input_specs:
            if spec.arg.name == node.name:
                spec.arg.name = new
        node.name = new
        if node.op == "placeholder":
            node.target = new

    suffixes = (f"_{number}" for number in itertools.count())
    taken = {*nodes, *names}
    for node in nodes.values():
        if node.name in names:
            free = (node.name + suffix for suffix in suffixes if node.name + suffix not in taken)
            rename(node, next(free))
    for node, name in zip(inputs, names, strict=True):
        rename(node, name)
    exported.graph_module.recompile()


def size_oblivious() -> contextlib.AbstractContextManager[None]:
    """Export without special treatment of extents 0 and 1: one graph for one row and for many."""
    config: Any = torch.fx.experimental._config
    patched: contextlib.AbstractContextManager[None] = config.patch(backed_size_oblivious=True)
    return patched


class LengthIndependent(TorchFunctionMode):
    """Export shape changes and products of packed tokens without a guard on their number.

    Where a tensor is not contiguous, PyTorch 2.11 asks whether it has one token only, in spite of
    `size_oblivious`. Here it is copied first, without the question.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer a call of torch."""
        options = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("reshape", "flatten", "contiguous", "linear") and not options:
            return func(_contiguous(args[0]), *args[1:])
        if name in ("matmul", "__matmul__") and not options:
            matrix, tokens = args
            if matrix.dim() == 2 and tokens.dim() == 3:
                return torch.nn.functional.linear(_contiguous(tokens.mT), matrix).mT
            if max(matrix.dim(), tokens.dim()) > 3 and min(matrix.dim(), tokens.dim()) > 2:
                return func(_contiguous(matrix), _contiguous(tokens))
        return func(*args, **options)


def _contiguous(x: Tensor) -> Tensor:
    """A tensor that is contiguous for every number of tokens: itself, or a copy."""
    expected: Any = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if isinstance(size, int) and size == 1:
            continue
        if not guard_or_false(stride == expected):
            return x.clone(memory_format=torch.contiguous_format)
        expected = expected * size
    return x


@contextlib.contextmanager
def correct_lstm() -> Iterator[None]:
    """Trace ``lstm`` with last states of the right rank.

    The decomposition of PyTorch 2.11 squeezes the batch's axis of the last states instead of the
    axis that it added in front. Where the batch has several rows they keep the added axis, and what
    a model computes from them gets a wrong shape.
    """
    module: Any = decompositions
    original = module.one_layer_lstm
    module.one_layer_lstm = _one_layer_lstm
    try:
        yield
    finally:
        module.one_layer_lstm = original


def _one_layer_lstm(
    x: Tensor,
    hidden: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One direction of one layer of an LSTM.

    Args:
        x: ``[time, batch, features]``.
        hidden: the first states, ``[batch, hidden]``.
        params: the weights of the input and the hidden state, then their biases if there are any,
            then the projection if there is one.
        has_biases: whether there are biases.
        reverse: whether it goes from the last time to the first.

    Returns:
        The outputs, ``[time, batch, hidden]``, and the last states, ``[batch, hidden]``.
    """
    biases = params[2:4] if has_biases else (None, None)
    projection = params[-1] if len(params) % 2 else None
    steps = torch.nn.functional.linear(x, params[0], biases[0]).unbind(0)
    state, outputs = hidden, []
    for step in reversed(steps) if reverse else steps:
        state = decompositions.lstm_cell(
            step, *state, params[1], biases[1], projection, chunk_dim=1
        )
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state
