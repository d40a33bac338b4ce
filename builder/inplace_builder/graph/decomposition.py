"""PyTorch's own decompositions of operators, and their graphs."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from inplace_builder.graph.export import correct_lstm
from inplace_builder.graph.nodes import value

Decomposition = Callable[..., Any]


@cache
def _tables() -> tuple[dict[Any, Decomposition], ...]:
    return torch._decomp.core_aten_decompositions(), torch._decomp.decomposition_table


def find_decomposition(target: torch._ops.OpOverload) -> Decomposition | None:
    """PyTorch's decomposition of an operator, to core ATen where it can; None if it has none."""
    for table in _tables():
        if target in table:
            return table[target]
    if target.namespace == "prims":  # decompositions make them; each names what computes it
        implementation: Decomposition | None = getattr(target.overloadpacket, "impl_aten", None)
        return implementation
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if target.has_kernel_for_dispatch_key(composite):
        return target.decompose
    return None


def trace_decomposition(
    node: Node, decomposition: Decomposition, *, fixed: bool = False
) -> GraphModule:
    """The graph of a decomposition over a node's inputs.

    oneDNN is off while tracing: with it ``lstm`` would become an operator of oneDNN's own.

    Args:
        node: the call.
        decomposition: of its operator.
        fixed: the extents of the inputs are numbers of the graph, which then asks for none.

    Raises:
        Exception: whatever PyTorch raises where the decomposition does not apply.
    """
    sources = node.all_input_nodes

    def call(*values: Any) -> Any:
        known = dict(zip(sources, values, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: known[each])
        result = decomposition(*args, **kwargs)
        return list(result) if isinstance(result, tuple) else result  # names would become a call

    mode = "fake" if fixed else "symbolic"
    trace = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)
    with torch.no_grad(), correct_lstm(), _without_onednn(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the export already showed the model's warnings
        return trace(*(value(source) for source in sources))


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
