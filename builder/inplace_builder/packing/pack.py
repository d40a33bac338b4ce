"""From a decoder of one sequence to one of packed rows: the tokens of several sequences behind one another on the axis of tokens.

Allowed only where it is proved: attention is `inplace::attention`, which keeps rows apart, and no other operator mixes tokens
(`passes.tokenwise`). What depended on the position of the one sequence takes each token's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from inplace.schema.specs import Role
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import CASTS, AnyNode, as_node, dtype, is_call, shape
from inplace_builder.graph.tokens import VIEWS
from inplace_builder.packing.prove import ProvenDecoder
from inplace_builder.states.attention import AttentionMatch

aten = torch.ops.aten


inplace = torch.ops.inplace


def pack_rows(
    decoder: ProvenDecoder, names: Sequence[str], states: Sequence[str], rings: Sequence[bool]
) -> GraphModule:
    """Rewrite the graph, in place, to packed rows.

    Args:
        decoder: what was proved.
        names: the inputs: token ids, then by the names of their roles what the runtime fills.
        states: names of the keys of every layer, then of the values.
        rings: for each layer whether its states are rings.

    Returns:
        A module of the inputs and the states that gives each row's next token ``[rows, 1]`` and scores ``[rows, vocabulary]``.
    """
    graph = decoder.module.graph
    old = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(next(iter(graph.nodes))):
        made = {name: graph.placeholder(f"packed_{name}") for name in (*names, *states)}
    work = _Packing(decoder, made, names[0])
    work.inputs(old[-1])
    for layer, (found, ring) in enumerate(zip(decoder.attentions, rings, strict=True)):
        work.attend(found, made[states[layer]], made[states[len(rings) + layer]], ring=ring)
    if decoder.num_tokens == 1:
        work.widen()
    work.tidy()
    work.choose()
    for found in decoder.attentions:
        graph.erase_node(found.node)  # dead code elimination keeps it, for it might drop out
    graph.eliminate_dead_code()
    for node in old:
        if node.users:
            raise BuildError(f"internal: the packed graph still uses {node.name}")
        graph.erase_node(node)
    return GraphModule(decoder.module, graph)


class _Packing:
    """A graph being rewritten. New nodes carry no fake values: the graph is exported again."""

    def __init__(self, decoder: ProvenDecoder, made: Mapping[str, Node], ids: str) -> None:
        self.decoder, self.graph, self.axes = (
            decoder,
            decoder.module.graph,
            decoder.token_axes.axis_of,
        )
        self.made, self.ids = made, made[ids]
        self.count: AnyNode = None
        self.became: dict[Node, Node] = {}

    def inputs(self, after: Node) -> None:
        """Put token ids and positions in the place of the module's own."""
        old, positions = self.decoder.ids, self.made[Role.POSITIONS.value]
        with self.graph.inserting_after(after):
            self.count = self.graph.call_function(aten.sym_size.int, (self.ids, 0))
        ids: Node = self.ids
        with self.graph.inserting_after(self.count):
            if len(shape(old)) == 2:
                ids = self.graph.call_function(aten.unsqueeze.default, (ids, 1 - self.axes[old]))
            if dtype(old) != torch.int64:
                ids = self.graph.call_function(aten.to.dtype, (ids, dtype(old)))
        self._replace(old, ids)
        for node, shift in self.decoder.positions.items():
            with self.graph.inserting_after(self.count if node.op == "placeholder" else node):
                new = self.graph.call_function(aten.to.dtype, (positions, dtype(node)))
            if shift:
                with self.graph.inserting_after(new):
                    new = self.graph.call_function(aten.add.Tensor, (new, shift))
            self._replace(node, new)
        for node in list(self.graph.nodes):
            if (
                is_call(node, aten.sym_size.int)
                and node is not self.count
                and self.decoder.token_axes.is_token_count(node.meta["val"])
            ):
                node.replace_all_uses_with(self.count)

    def attend(self, found: AttentionMatch, keys: Node, values: Node, *, ring: bool) -> None:
        """Put `inplace::attention` in the place of an attention."""
        node, kept_apart = found.node, self.decoder.token_axes.opaque(found.node)
        assert kept_apart is not None
        with self.graph.inserting_before(node):
            packed = []
            for operand in kept_apart[0]:
                moved = self.decoder.token_axes.transposed.get((node, operand))
                source = (
                    operand
                    if moved is None
                    else self.graph.call_function(aten.transpose.int, (operand, *moved))
                )
                packed.append(
                    self.graph.call_function(
                        aten.transpose.int,
                        (self.graph.call_function(aten.squeeze.dim, (source, 0)), 0, 1),
                    )
                )
            rows = (
                self.made[role.value] for role in (Role.SLOTS, Role.ROW_OFFSETS, Role.WRITE_INDICES)
            )
            options: dict[str, Any] = {
                "scale": found.scale,
                "window": found.window,
                "ring": ring,
                "softcap": found.softcap,
            }
            out = self.graph.call_function(
                inplace.attention.default, (*packed, keys, values, *rows), options
            )
            if "stack_trace" in node.meta:
                out.meta["stack_trace"] = node.meta["stack_trace"]
            by_token = self.graph.call_function(aten.unsqueeze.default, (out, 0))
            by_head = self.graph.call_function(aten.transpose.int, (by_token, 1, 2))
        for user in list(node.users):
            exchanged: list[Any] = list(user.args[1:])
            if is_call(user, aten.transpose.int) and {axis % 4 for axis in exchanged} == {1, 2}:
                self._replace(user, by_token)
        self._replace(node, by_head)

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self.axes[new] = self.axes[old]
        self.became[old] = new

    def widen(self) -> None:
        """Of a graph of one token make one of many: where it says 1 and means the tokens, say how many there are."""
        for (node, before), (one, other) in self.decoder.token_axes.transposed.items():
            operand = self.became.get(before, before)
            if operand in node.all_input_nodes:
                with self.graph.inserting_before(node):
                    node.replace_input_with(
                        operand, self.graph.call_function(aten.transpose.int, (operand, one, other))
                    )
        for node in list(self.graph.nodes):
            axis = self.axes.get(node)
            if axis is None or node.op != "call_function" or "val" not in node.meta:
                continue
            if is_call(node, *VIEWS):
                node.target = aten.view.default
                node.args = (
                    node.args[0],
                    [
                        self.count if place == axis else extent
                        for place, extent in enumerate(shape(node))
                    ],
                )
            elif is_call(node, aten.expand.default):
                sizes = node.args[1]
                assert isinstance(sizes, list | tuple)
                node.args = (
                    node.args[0],
                    [-1 if place == axis else size for place, size in enumerate(sizes)],
                )

    def tidy(self) -> None:
        """Drop slices that take everything and copies: what they copied from is never written."""
        for node in list(self.graph.nodes):
            if "val" not in node.meta:
                continue
            if is_call(node, aten.slice.Tensor) and node in self.axes:
                source, along = (
                    as_node(node.args[0]),
                    int(node.args[1]) if len(node.args) > 1 else 0,
                )
                if along % len(shape(node)) == self.axes[node]:
                    self._replace(node, source)
            elif (
                is_call(node, aten.clone.default)
                and node.kwargs.get("memory_format") is torch.contiguous_format
                and node in self.axes
            ):
                node.target, node.kwargs = aten.contiguous.default, {}
            elif _is_copy(node) and node in self.axes:
                self._replace(node, as_node(node.args[0]))

    def choose(self) -> None:
        """Take each row's last token as early as the scores allow, and choose its next token."""
        head = self.became.get(self.decoder.logits, self.decoder.logits)
        axis = self.axes[head]
        top: Node = head
        while (
            is_call(top, *_BETWEEN_HEAD_AND_SCORES)
            and len(tokens := [node for node in top.all_input_nodes if node in self.axes]) == 1
        ):
            top = tokens[0]
        if is_call(
            top, aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default
        ):
            source = next(node for node in top.all_input_nodes if node in self.axes)
            with self.graph.inserting_before(top):
                top.replace_input_with(source, self._last(source))
            scores = head
        else:
            with self.graph.inserting_after(head):
                scores = self._last(head)
        output = self.graph.output_node()
        with self.graph.inserting_before(output):
            for _ in range(axis):
                scores = self.graph.call_function(aten.select.int, (scores, 0, 0))
            scores = self.graph.call_function(aten.to.dtype, (scores, torch.float32))
            roles = (Role.TEMPERATURE, Role.TOP_K, Role.TOP_P, Role.SEED, Role.NEXT_POSITIONS)
            token = self.graph.call_function(
                inplace.sample.default, (scores, *(self.made[role.value] for role in roles))
            )
        output.args = ((token, scores),)

    def _last(self, source: Node) -> Node:
        index = [None] * self.axes[source] + [self.made[Role.LAST_TOKENS.value]]
        return self.graph.call_function(aten.index.Tensor, (source, index))


def _is_copy(node: Node) -> bool:
    """Whether a node is its operand in other memory."""
    if is_call(node, *CASTS):
        return dtype(node) == dtype(as_node(node.args[0])) and "device" not in node.kwargs
    return is_call(node, aten.clone.default, aten.alias.default) or (
        is_call(node, aten.dropout.default) and node.args[2] is False
    )


class _ViewsAsNeeded(Interpreter):
    """Runs a graph, and lets what is a view of one token, but none of several, be a copy."""

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        if not is_call(n, aten.view.default):
            return super().run_node(n)
        try:
            return super().run_node(n)
        except (RuntimeError, ValueError):
            n.target = aten.reshape.default
            return super().run_node(n)


def relax_views(module: GraphModule, arguments: Sequence[Tensor]) -> None:
    """Let every view that is none for these arguments be a ``reshape``, in place."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _ViewsAsNeeded(module).run(*(mode.from_tensor(argument) for argument in arguments))
    module.recompile()


_BETWEEN_HEAD_AND_SCORES = (
    *CASTS,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.slice.Tensor,
    aten.clone.default,
    aten.alias.default,
    aten.add.Tensor,
)
"""What stands between the last linear layer of a model and its scores."""
