"""From a decoder of one sequence to a decoder of packed rows.

Packed rows are the tokens of several sequences one after another on one axis. The graph may be
rewritten so because it is proved (`inplace_builder.packing.prove`) that attention is
`inplace::attention`, which keeps rows apart, and that no other operator mixes tokens. What depended
on the position of the one sequence takes each token's own position.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from inplace.schema.specs import SAMPLING_OPTION_ROLES, SAMPLING_ROLES, Role
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import CASTS, AnyNode, as_node, dtype, is_call, shape, value
from inplace_builder.graph.tokens import VIEWS
from inplace_builder.packing.prove import ProvenDecoder
from inplace_builder.states.attention import AttentionMatch

aten, inplace = torch.ops.aten, torch.ops.inplace


def pack_rows(
    decoder: ProvenDecoder, names: Sequence[str], states: Sequence[str], rings: Sequence[bool]
) -> GraphModule:
    """Rewrite the graph, in place, to packed rows.

    Args:
        decoder: the proven graph.
        names: the inputs: token ids, then, named like their roles, what the runtime fills.
        states: names of the keys of every layer, then of the values.
        rings: for each layer whether its states are rings.

    Returns:
        A module of the inputs and the states that returns each row's next token ``[rows, 1]``,
        scores ``[rows, vocab_size]`` and the log-probabilities of `sample_with_options`.
    """
    graph = decoder.module.graph
    old = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(next(iter(graph.nodes))):
        new = {name: graph.placeholder(f"packed_{name}") for name in (*names, *states)}
    packing = _Packing(decoder, new, names[0])
    packing.replace_inputs(old[-1])
    for layer, (match, ring) in enumerate(zip(decoder.attentions, rings, strict=True)):
        keys, values = new[states[layer]], new[states[len(rings) + layer]]
        packing.replace_attention(match, keys, values, ring=ring)
    if decoder.num_tokens == 1:
        packing.make_token_axis_dynamic()
    packing.drop_copies()
    packing.sample_last_tokens()
    for match in decoder.attentions:
        # dead code elimination keeps an attention, because it might have dropout
        graph.erase_node(match.node)
    graph.eliminate_dead_code()
    for node in old:
        if node.users:
            raise BuildError(f"internal: the packed graph still uses {node.name}")
        graph.erase_node(node)
    return GraphModule(decoder.module, graph)


class _Packing:
    """A graph being packed.

    New nodes carry no fake values: the graph is exported again.

    Attributes:
        inputs: the new placeholders by name.
        ids: the placeholder of token ids ``[tokens]``.
        num_tokens: the node that counts them.
        replacements: what replaced each node of the old graph.
    """

    def __init__(self, decoder: ProvenDecoder, inputs: Mapping[str, Node], ids: str) -> None:
        self.decoder, self.graph = decoder, decoder.module.graph
        self.axis_of = decoder.token_axes.axis_of
        self.inputs, self.ids = inputs, inputs[ids]
        self.num_tokens: AnyNode = None
        self.replacements: dict[Node, Node] = {}

    def replace_inputs(self, last_placeholder: Node) -> None:
        """Use the new token ids and positions instead of the module's own."""
        old, positions = self.decoder.ids, self.inputs[Role.POSITIONS.value]
        with self.graph.inserting_after(last_placeholder):
            self.num_tokens = self.graph.call_function(aten.sym_size.int, (self.ids, 0))
        ids: Node = self.ids
        with self.graph.inserting_after(self.num_tokens):
            if len(shape(old)) == 2:
                ids = self.graph.call_function(aten.unsqueeze.default, (ids, 1 - self.axis_of[old]))
            if dtype(old) != torch.int64:
                ids = self.graph.call_function(aten.to.dtype, (ids, dtype(old)))
        self._replace(old, ids)
        for node, shift in self.decoder.positions.items():
            place = self.num_tokens if node.op == "placeholder" else node
            with self.graph.inserting_after(place):
                new = self.graph.call_function(aten.to.dtype, (positions, dtype(node)))
            if shift:
                with self.graph.inserting_after(new):
                    new = self.graph.call_function(aten.add.Tensor, (new, shift))
            self._replace(node, new)
        for node in list(self.graph.nodes):
            if (
                is_call(node, aten.sym_size.int)
                and node is not self.num_tokens
                and self.decoder.token_axes.is_token_count(value(node))
            ):
                node.replace_all_uses_with(self.num_tokens)

    def replace_attention(
        self, match: AttentionMatch, keys: Node, values: Node, *, ring: bool
    ) -> None:
        """Put `inplace::attention` in the place of an attention."""
        node, call = match.node, self.graph.call_function
        with self.graph.inserting_before(node):
            packed = []
            for operand in self.decoder.token_axes.attentions[node].operands:
                axes = self.decoder.token_axes.transposed.get((node, operand))
                source = operand if axes is None else call(aten.transpose.int, (operand, *axes))
                by_head = call(aten.squeeze.dim, (source, 0))
                packed.append(call(aten.transpose.int, (by_head, 0, 1)))
            roles = (Role.SLOTS, Role.ROW_OFFSETS, Role.WRITE_INDICES)
            rows = [self.inputs[role.value] for role in roles]
            options: dict[str, Any] = {
                "scale": match.scale,
                "window": match.window,
                "ring": ring,
                "softcap": match.softcap,
            }
            arguments = [*packed, keys, values, *rows]
            if match.sinks is not None:
                arguments.append(call(aten.reshape.default, (match.sinks, [-1])))
            out = call(inplace.attention.default, tuple(arguments), options)
            if "stack_trace" in node.meta:
                out.meta["stack_trace"] = node.meta["stack_trace"]
            tokens_first = call(aten.unsqueeze.default, (out, 0))
            heads_first = call(aten.transpose.int, (tokens_first, 1, 2))
        for user in list(node.users):
            exchanged: list[Any] = list(user.args[1:])
            if is_call(user, aten.transpose.int) and {axis % 4 for axis in exchanged} == {1, 2}:
                self._replace(user, tokens_first)
        self._replace(node, heads_first)

    def _replace(self, old: Node, new: Node) -> None:
        old.replace_all_uses_with(new)
        self.axis_of[new] = self.axis_of[old]
        self.replacements[old] = new

    def make_token_axis_dynamic(self) -> None:
        """Make a graph of many tokens of a graph of one: extents that count tokens vary."""
        for (node, old), (one, other) in self.decoder.token_axes.transposed.items():
            operand = self.replacements.get(old, old)
            if operand in node.all_input_nodes:
                with self.graph.inserting_before(node):
                    node.replace_input_with(
                        operand, self.graph.call_function(aten.transpose.int, (operand, one, other))
                    )
        for node in list(self.graph.nodes):
            axis = self.axis_of.get(node)
            if axis is None or node.op != "call_function" or "val" not in node.meta:
                continue
            if is_call(node, *VIEWS):
                extents = list(shape(node))
                extents[axis] = self.num_tokens
                node.target, node.args = aten.view.default, (node.args[0], extents)
            elif is_call(node, aten.expand.default):
                sizes = node.args[1]
                assert isinstance(sizes, list | tuple)
                sizes = [-1 if place == axis else size for place, size in enumerate(sizes)]
                node.args = (node.args[0], sizes)

    def drop_copies(self) -> None:
        """Drop slices that take everything, and copies: what they copy from is never written."""
        for node in list(self.graph.nodes):
            if "val" not in node.meta or node not in self.axis_of:
                continue
            if is_call(node, aten.slice.Tensor):
                along = int(node.args[1]) if len(node.args) > 1 else 0
                if along % len(shape(node)) == self.axis_of[node]:
                    self._replace(node, as_node(node.args[0]))
            elif (
                is_call(node, aten.clone.default)
                and node.kwargs.get("memory_format") is torch.contiguous_format
            ):
                node.target, node.kwargs = aten.contiguous.default, {}
            elif _is_copy(node):
                self._replace(node, as_node(node.args[0]))

    def sample_last_tokens(self) -> None:
        """Sample each row's next token from the scores of its last token.

        Last tokens are selected before the last linear layer if nothing after it prevents that:
        the scores of the others are never computed then.
        """
        scores = self.replacements.get(self.decoder.logits, self.decoder.logits)
        axis = self.axis_of[scores]
        top: Node = scores
        while is_call(top, *_BETWEEN_HEAD_AND_SCORES):
            tokens = [node for node in top.all_input_nodes if node in self.axis_of]
            if len(tokens) != 1:
                break
            top = tokens[0]
        if is_call(top, *_LINEAR):
            source = next(node for node in top.all_input_nodes if node in self.axis_of)
            with self.graph.inserting_before(top):
                top.replace_input_with(source, self._select_last_tokens(source))
        else:
            with self.graph.inserting_after(scores):
                scores = self._select_last_tokens(scores)
        output = self.graph.output_node()
        with self.graph.inserting_before(output):
            for _ in range(axis):
                scores = self.graph.call_function(aten.select.int, (scores, 0, 0))
            scores = self.graph.call_function(aten.to.dtype, (scores, torch.float32))
            roles = (*SAMPLING_ROLES, *SAMPLING_OPTION_ROLES)
            sampled = self.graph.call_function(
                inplace.sample.options, (scores, *(self.inputs[role.value] for role in roles))
            )
            token, *logprobs = (
                self.graph.call_function(operator.getitem, (sampled, index)) for index in range(4)
            )
        output.args = ((token, scores, *logprobs),)

    def _select_last_tokens(self, source: Node) -> Node:
        index = [None] * self.axis_of[source] + [self.inputs[Role.LAST_TOKENS.value]]
        return self.graph.call_function(aten.index.Tensor, (source, index))


_LINEAR = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


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
"""Operators that may stand between the last linear layer of a model and its scores."""


def _is_copy(node: Node) -> bool:
    """Whether a node is its operand in other memory."""
    if is_call(node, *CASTS):
        return dtype(node) == dtype(as_node(node.args[0])) and "device" not in node.kwargs
    return is_call(node, aten.clone.default, aten.alias.default) or (
        is_call(node, aten.dropout.default) and node.args[2] is False
    )


def relax_views(module: GraphModule, arguments: Sequence[Tensor]) -> None:
    """Replace each ``view`` that is impossible for these arguments by ``reshape``, in place.

    A view of one token may need a copy for several.
    """
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _ViewRelaxer(module).run(*(mode.from_tensor(argument) for argument in arguments))
    module.recompile()


class _ViewRelaxer(Interpreter):
    """Runs a graph and rewrites the views that fail."""

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        if not is_call(n, aten.view.default):
            return super().run_node(n)
        try:
            return super().run_node(n)
        except (RuntimeError, ValueError):
            n.target = aten.reshape.default
            return super().run_node(n)
