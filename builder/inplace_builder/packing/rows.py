"""From the graph of one sequence to a graph with a row for each of several.

`RowGraph` goes through the graph of one row, whose extents are all known, and puts what each
operator is for many rows into a new graph: by a rule of `inplace_builder.packing.row_rules`, else
by `torch.vmap` of that one operator, else by those of PyTorch's decomposition of it. torch.vmap
never runs an operator row by row; what none of the three covers is refused.
"""

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode

from inplace_builder.errors import BuildError, brief
from inplace_builder.graph.decomposition import find_decomposition, trace_decomposition
from inplace_builder.graph.export import correct_lstm
from inplace_builder.graph.nodes import source_line, value
from inplace_builder.packing.row_decompositions import DECOMPOSITIONS
from inplace_builder.packing.row_rules import RULES, RowTensor, chosen, pointwise

aten: Any = torch.ops.aten


class _NoRuleError(Exception):
    """Why an operator cannot be run for many rows at once."""


class RowGraph:
    """A graph over rows under construction.

    A tensor that differs between rows has an axis of them in front. The number of rows is a number
    of the graph; `make_rows_dynamic` replaces it.

    Attributes:
        graph: the graph.

    Args:
        module: the graph of one row. Every node has a fake value of fixed extents.
        rows: the number of rows to build with.
    """

    def __init__(self, module: GraphModule, rows: int) -> None:
        self.graph = Graph()
        self._module = module
        self._rows = rows
        self._per_row: set[Node] = set()
        self._constants: dict[str, Any] = {}
        self._traced: dict[Any, GraphModule] = {}
        self._fake_mode = value(next(iter(module.graph.nodes))).fake_mode

    def placeholder(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, *, per_row: bool
    ) -> Node:
        """Add an input: ``shape`` is that of the whole tensor."""
        node = self.graph.placeholder(name)
        with self._fake_mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype)
        if per_row:
            self._per_row.add(node)
        return node

    def reshaped(self, node: Node, shape: Sequence[int]) -> Node:
        """A tensor of each row in another shape of one row.

        One that is the same for all rows is repeated for each.
        """
        if node not in self._per_row:
            size = [self._rows, *value(node).shape]
            node = self._emit(torch.ops.aten.expand.default, (node, size))
        return self._emit(torch.ops.aten.reshape.default, (node, [self._rows, *shape]))

    def _emit(self, target: Any, args: tuple[Any, ...]) -> Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*map_arg(args, value))
        self._per_row.add(node)
        return node

    def finish(self, outputs: Sequence[Node]) -> GraphModule:
        """Return the outputs; the graph with the weights that it uses."""
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        attributes = {
            name: self._constants[name]
            if name in self._constants
            else torch.fx.graph_module._get_attr(self._module, name)
            for name in used
        }
        return GraphModule(attributes, self.graph)

    def run(self, module: GraphModule, inputs: Sequence[Node]) -> list[Node]:
        """Add what the graph of one row does with these inputs.

        Returns:
            What it returns, in order.

        Raises:
            BuildError: an operator cannot be run for many rows at once.
        """
        known: dict[Node, Any] = {}
        given = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "get_attr":
                known[node] = self._constant(module, node)
            elif node.op == "output":
                results = map_arg(node.args[0], lambda each: known[each])
                return torch.utils._pytree.tree_leaves(results)
            elif node.op == "call_function":
                known[node] = self._add(node, known)
        raise AssertionError("a graph returns something")

    def _constant(self, module: GraphModule, node: Node) -> Node:
        """A weight, or a constant of a decomposition."""
        tensor = torch.fx.graph_module._get_attr(module, str(node.target))
        name = str(node.target)
        if module is not self._module:
            name = f"of_rows_{len(self._constants)}"
            self._constants[name] = tensor
        copied = self.graph.create_node("get_attr", name)
        copied.meta.update(node.meta)
        if not isinstance(copied.meta.get("val"), torch._subclasses.FakeTensor) and isinstance(
            tensor, Tensor
        ):
            copied.meta["val"] = self._fake_mode.from_tensor(tensor.detach())
        return copied

    def _add(self, node: Node, known: dict[Node, Any]) -> Any:
        """Add one call: the node, or the nodes, of its results."""
        if node.target is operator.getitem and isinstance(known[node.all_input_nodes[0]], list):
            return _result(node, known[node.all_input_nodes[0]])
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: known[each])
        if node.target is torch.ops.higher_order.cond:
            return self._chosen(node, args)
        sources = [known[each] for each in node.all_input_nodes]
        if not any(source in self._per_row for source in sources):
            copied = self.graph.create_node("call_function", node.target, args, kwargs)
            copied.meta = dict(node.meta)
            return copied
        try:
            return self._over_rows(node, args, kwargs)
        except _NoRuleError as reason:
            return self._decomposed(node, sources, reason)
        except NotImplementedError as reason:
            raise _refusal(node, str(reason)) from reason

    def _chosen(self, node: Node, args: Any) -> list[Any]:
        """Both branches of a ``torch.cond``, and for each row the results of one of them."""
        predicate, *_, operands = args
        branches = []
        for branch in node.args[1:3]:
            assert isinstance(branch, Node) and node.graph.owning_module is not None
            module = torch.fx.graph_module._get_attr(node.graph.owning_module, str(branch.target))
            check_branch(node, module)
            branches.append(self.run(module, operands))
        results = []
        for pair in zip(*branches, strict=True):
            traced, nodes = self._trace(node.target, chosen, (predicate, *pair), {})
            results.append(self._inline(traced, nodes, node)[0])
        return results

    def _over_rows(self, node: Node, args: Any, kwargs: Any) -> Any:
        target, failures = node.target, []
        if target in (aten.item.default, aten._local_scalar_dense.default):
            raise NotImplementedError(
                "it asks for a tensor's value, which every row has another of; compute with the "
                "tensor itself"
            )
        if free_unbacked_symbols(node.meta.get("val")):
            raise NotImplementedError(
                "how many elements its result has depends on values, which every row has others "
                "of; keep them all and choose with torch.where, or torch.nonzero_static"
            )
        if not isinstance(target, torch._ops.OpOverload):
            raise _NoRuleError(f"{target} is not an operator of PyTorch's")
        rule = RULES.get(target)
        if rule is None and torch.Tag.pointwise in target.tags:
            rule = lambda *given, **named: pointwise(target, *given, **named)  # noqa: E731
        if rule is not None:
            try:
                traced, nodes = self._trace(target, rule, args, kwargs)
                return self._inline(traced, nodes, node)
            except _NoRuleError as error:
                failures.append(error)
        if not _has_batching_rule(target):
            raise failures[0] if failures else _NoRuleError("torch.vmap has no rule for it")
        traced, nodes = self._trace(target, None, args, kwargs)
        return self._inline(traced, nodes, node)

    def _decomposed(self, node: Node, sources: Sequence[Node], reason: _NoRuleError) -> Any:
        """Add the decomposition of a call that has no rule itself."""
        target = node.target
        decomposition = DECOMPOSITIONS.get(target)
        if decomposition is None and isinstance(target, torch._ops.OpOverload):
            decomposition = find_decomposition(target)
        if decomposition is None:
            raise _refusal(node, str(reason)) from reason
        try:
            functional = torch.func.functionalize(decomposition)
            traced = trace_decomposition(node, functional, fixed=True)
        except Exception as error:  # whatever PyTorch raises
            raise _refusal(node, f"{reason}, and its decomposition: {brief(error)}") from error
        if any(each.target is target for each in traced.graph.nodes):
            raise _refusal(node, str(reason))
        for each in traced.graph.nodes:
            if each.op == "call_function":
                each.meta["stack_trace"] = node.meta.get("stack_trace")
        results = self.run(traced, sources)
        return results if isinstance(node.meta.get("val"), tuple | list) else results[0]

    def _trace(
        self, target: Any, rule: Callable[..., Any] | None, args: Any, kwargs: Any
    ) -> tuple[GraphModule, list[Node]]:
        """The graph of a call over rows, and the nodes that it takes.

        Layers repeat: a call on tensors of the same shapes has the same graph.
        """
        nodes: list[Node] = []

        def note(node: Node) -> Any:
            if not isinstance(value(node), Tensor):
                raise _NoRuleError("its extents depend on values")
            if node not in nodes:
                nodes.append(node)
            return _TensorArgument(nodes.index(node))

        places = map_arg((args, kwargs), note)
        layouts = tuple(
            (
                each in self._per_row,
                tuple(value(each).shape),
                value(each).stride(),
                value(each).dtype,
            )
            for each in nodes
        )
        key = (target, rule is None, repr(places), layouts)
        if key not in self._traced:
            per_row = [each in self._per_row for each in nodes]
            with self._fake_mode:  # tensors of their own: tracing takes one tensor for one input
                tensors = [
                    torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                    for x in map(value, nodes)
                ]
            self._traced[key] = _trace_call(target, rule, places, per_row, tensors, self._fake_mode)
        return self._traced[key], nodes

    def _inline(self, traced: GraphModule, nodes: Sequence[Node], source: Node) -> Any:
        """Put the graph of a call over rows behind what is there."""
        known: dict[Node, Any] = {}
        given = iter(nodes)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "output":
                results = map_arg(node.args[0], lambda each: known[each])
                self._per_row.update(torch.utils._pytree.tree_leaves(results))
                several = isinstance(source.meta.get("val"), tuple | list)
                return list(results) if several or not results else results[0]
            elif node.op == "get_attr":
                known[node] = self._constant(traced, node)
            else:
                copied = self.graph.node_copy(node, lambda each: known[each])
                copied.meta = {
                    "val": node.meta.get("val"),
                    "stack_trace": source.meta.get("stack_trace"),
                }
                known[node] = copied
        raise AssertionError("a graph returns something")


class _TensorArgument:
    """Stands for a tensor among the arguments of a call."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"<{self.index}>"


def _trace_call(
    target: Any,
    rule: Callable[..., Any] | None,
    places: Any,
    per_row: Sequence[bool],
    tensors: Sequence[Tensor],
    fake_mode: Any,
) -> GraphModule:
    """The graph of one call over rows, by its rule or, without one, by `torch.vmap`.

    Raises:
        _NoRuleError: neither takes these arguments.
    """

    def call(*given: Any) -> Any:
        args, kwargs = torch.utils._pytree.tree_map(
            lambda leaf: given[leaf.index] if isinstance(leaf, _TensorArgument) else leaf, places
        )
        result = (rule or target)(*args, **kwargs)
        if result is NotImplemented:
            raise _NoRuleError("its arguments differ between rows in a way that has no rule")
        return list(result) if isinstance(result, tuple | list) else [result]

    def by_rule(*given: Tensor) -> Any:
        return call(*(RowTensor(x) if rows else x for x, rows in zip(given, per_row, strict=True)))

    def by_vmap(*given: Tensor) -> Any:
        with _FewCalls():
            return torch.vmap(call, tuple(0 if rows else None for rows in per_row))(*given)

    trace = make_fx(by_rule if rule else by_vmap, pre_dispatch=rule is not None)
    try:
        with (
            torch.no_grad(),
            fake_mode,
            correct_lstm(),
            _never_row_by_row(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the export already showed the model's warnings
            return trace(*tensors)
    except (_NoRuleError, NotImplementedError):
        raise
    except Exception as error:  # whatever PyTorch raises
        raise _NoRuleError(brief(error)) from error


MAX_CALLS = 200
"""Calls that `torch.vmap` may make for one operator; a rule that makes more goes over the rows."""


class _FewCalls(TorchDispatchMode):
    """Ends a batching rule that calls an operator for one row after the other."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = MAX_CALLS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _NoRuleError("torch.vmap goes over the rows one after the other")
        return func(*args, **(kwargs or {}))


def _has_batching_rule(target: torch._ops.OpOverload) -> bool:
    """Whether `torch.vmap` has a rule for an operator."""
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)
        for key in ("FuncTorchBatched", "FuncTorchBatchedDecomposition")
    )


@contextmanager
def _never_row_by_row() -> Iterator[None]:
    """Let `torch.vmap` fail where it would run an operator for one row after the other."""
    functorch: Any = torch._C._functorch
    enabled = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(enabled)


_INDEX_ARGUMENTS: dict[Any, int] = {
    aten.index.Tensor: 1,
    aten.index_put.default: 1,
    aten.index_select.default: 2,
    aten.index_copy.default: 2,
    aten.index_add.default: 2,
    aten.gather.default: 2,
    aten.scatter.src: 2,
    aten.scatter.value: 2,
    aten.scatter_add.default: 2,
    aten.embedding.default: 1,
    aten.take.default: 1,
}
"""The position of the index among the arguments of operators that have one."""

_WITHIN = (
    aten.remainder.Scalar,
    aten.argmax.default,
    aten.argmin.default,
    aten.arange.default,
)
"""Operators whose result is within limits whatever is computed from."""


def check_branch(cond: Node, branch: GraphModule) -> None:
    """BuildError if a branch of ``torch.cond`` cannot be computed where it is not taken."""
    for node in branch.graph.nodes:
        place = _INDEX_ARGUMENTS.get(node.target)
        if place is None:
            continue
        indices = torch.utils._pytree.tree_leaves(node.args[place])
        for index in indices:
            while isinstance(index, Node) and index.target in _KEEP_VALUES:
                index = index.args[0]
            if isinstance(index, Node) and index.op != "get_attr" and not _is_within(index):
                raise BuildError(
                    f"torch.cond{source_line(cond)} cannot be run for several rows at once: both "
                    f"branches are computed and one is chosen for each row, and {node.target}"
                    f"{source_line(node)} may index outside where its branch is not taken; clamp "
                    f"the index inside the branch"
                )


def _is_within(index: Node) -> bool:
    """Whether an index is within limits; a clamp on one side is not."""
    if index.target is aten.clamp.default:
        limits = [*index.args[1:], *index.kwargs.values()]
        return sum(limit is not None for limit in limits) == 2
    return index.target in _WITHIN


_KEEP_VALUES = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.clone.default,
    aten.to.dtype,
    aten._to_copy.default,
)
"""Operators that change no value."""


def _refusal(node: Node, reason: str) -> BuildError:
    return BuildError(
        f"{node.target}{source_line(node)} cannot be run for several rows at once: {reason}; "
        f"write this line with other operators (products, gather, where)"
    )


def _result(node: Node, results: list[Any]) -> Any:
    """What a ``getitem`` takes of the results of a call; None for one that is not computed."""
    index: Any = node.args[1]
    if index < len(results):
        return results[index]
    if node.users:
        raise _refusal(node.all_input_nodes[0], f"its result {index} is used, which has no rule")
    return None


def make_rows_dynamic(module: GraphModule, rows: int) -> None:
    """Ask for the number of rows wherever a graph has the one that it was built with, in place."""
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        num_rows = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 0))
    for node in list(graph.nodes):

        def as_dynamic(number: Any, node: Node = node) -> Any:
            if type(number) is not int or number == 0 or abs(number) >= 2**31:
                return number
            if number % rows == 1 and number == rows + 1:  # one boundary more than rows
                with graph.inserting_before(node):
                    return graph.call_function(operator.add, (num_rows, 1))
            if number % rows:
                return number
            if number == rows:
                return num_rows
            with graph.inserting_before(node):
                return graph.call_function(operator.mul, (num_rows, number // rows))

        if node.op == "call_function" and node is not num_rows:
            node.args, node.kwargs = (
                torch.fx.node.map_aggregate(given, as_dynamic) for given in (node.args, node.kwargs)
            )
    module.recompile()
