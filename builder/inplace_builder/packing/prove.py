"""What makes a graph of one sequence a decoder: proved, before it is made one of packed rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import CASTS, Emitter, as_node, dtype, is_call, shape, source_line
from inplace_builder.graph.tokens import MixesTokensError, TokenAxes, propagate_token_axes
from inplace_builder.states.attention import (
    AttentionMatch,
    StartPosition,
    UnfusedAttention,
    find_position_tensors,
    match_cache_attentions,
)
from inplace_builder.states.indices import evaluate, example_positions, shifted_source
from inplace_builder.states.rewrite import expanded_value
from inplace_builder.states.state import StateTensor
from inplace_builder.states.writes import MatchContext, find_write_chains

aten = torch.ops.aten


@dataclass(frozen=True)
class ProvenDecoder:
    """A functional graph of which it is proved that it decodes token by token.

    Attributes:
        module: the graph.
        attentions: one a layer, in order.
        num_tokens: how many tokens a step has: 1, or a dynamic extent.
        ids: the placeholder of token ids.
        logits: the scores of each token.
        positions: tensors ``[tokens]`` of positions, each with what it adds to a token's own.
        token_axes: where each tensor has its tokens.
    """

    module: GraphModule
    attentions: tuple[AttentionMatch, ...]
    num_tokens: Any
    ids: Node
    logits: Node
    positions: Mapping[Node, int]
    token_axes: TokenAxes

    @property
    def vocabulary(self) -> int:
        """Token ids that its embeddings have rows for."""
        tables = [
            user.args[0]
            for user in _users_past_views(self.ids)
            if is_call(user, aten.embedding.default)
        ]
        if not tables:
            raise BuildError(
                f"input {self.ids.name} is no tensor of token ids: nothing is embedded with it"
            )
        return min(int(shape(as_node(table))[0]) for table in tables)


def _users_past_views(node: Node) -> list[Node]:
    """The users of a tensor, through views and casts."""
    found = []
    for user in node.users:
        found += (
            _users_past_views(user)
            if is_call(
                user, aten.view.default, aten.reshape.default, aten.unsqueeze.default, *CASTS
            )
            else [user]
        )
    return found


def prove_decoder(
    module: GraphModule,
    states: Sequence[StateTensor],
    outputs: int,
    assume_consecutive: frozenset[str],
) -> ProvenDecoder:
    """Find what makes a graph of one sequence a decoder.

    Args:
        module: takes the inputs and then the states, returns ``outputs`` outputs and then the states' new values.
        states: in the order of the placeholders.
        outputs: outputs of the module.
        assume_consecutive: inputs that are consecutive positions.

    Raises:
        BuildError: something about it is not, or not provably, what packed rows need; names it, with the module's line.
    """
    returned = module.graph.output_node().args[0]
    assert isinstance(returned, tuple)
    if outputs != 1:
        raise BuildError(
            f"a decoder returns its scores alone, this module returns {outputs} outputs"
        )
    chains = find_write_chains(states, outputs, MatchContext(module, 1, assume_consecutive))
    attended = match_cache_attentions(module, states, chains, assume_consecutive)
    for found in attended:
        if isinstance(found, UnfusedAttention):
            raise BuildError(
                f"attention{source_line(found.node)} is not provably causal attention over its own cache: {found.reason}"
            )
    attentions = tuple(found for found in attended if isinstance(found, AttentionMatch))
    if not attentions:
        raise BuildError(
            "the module has no attention over a cache that it appends to; capture_exported takes any module"
        )
    start, tokens = _common_start(attentions)
    _check_states(
        module,
        dict(zip((state.name for state in states), returned[outputs:], strict=True)),
        states,
        attentions,
        start,
        tokens,
    )
    operands = _attention_operands(module, attentions)
    inside = {node: sources for node, (sources, _) in operands.items()}
    logits, last = _scores_of_every_token(as_node(returned[0]), tokens)
    assert start.source is not None
    positions, others = find_position_tensors(
        module, [logits], start.source, tokens, assume_consecutive, inside
    )
    if start.source in others:
        raise BuildError(
            f"the module uses {start.source.name} other than as the positions of its tokens"
        )
    if len(others) != 1:
        names = sorted(node.name for node in others)
        raise BuildError(
            f"a decoder computes its scores from token ids and their positions; this module takes {names or 'neither'}"
        )
    (ids,) = others
    try:
        axes = propagate_token_axes(
            module.graph,
            [logits],
            tokens,
            dict.fromkeys(positions, 0) | {ids: _token_axis_of_ids(ids, tokens)},
            operands,
        )
    except MixesTokensError as error:
        raise BuildError(
            f"tokens of several sequences cannot lie behind one another: {error}{source_line(error.node)}"
        ) from error
    if (
        logits not in axes.axis_of
        or len(shape(logits)) - axes.axis_of[logits] != 2
        or (last is not None and last != axes.axis_of[logits])
    ):
        raise BuildError(
            f"the module's output {tuple(shape(logits))} is not one row of scores a token"
        )
    shifts = {node: shift - start.offset for node, shift in positions.items()}
    return ProvenDecoder(module, attentions, tokens, ids, logits, shifts, axes)


def _common_start(attentions: Sequence[AttentionMatch]) -> tuple[StartPosition, Any]:
    """Where all attentions start, and how many tokens they take."""
    starts, tokens = (
        {found.start for found in attentions},
        {str(shape(found.query)[2]): shape(found.query)[2] for found in attentions},
    )
    if len(starts) > 1 or len(tokens) > 1:
        raise BuildError(
            "the module's layers append at different positions, or different numbers of tokens"
        )
    (start,), (count,) = starts, tokens.values()
    if start.source is None:
        raise BuildError(
            "the module appends at a fixed position; a decoder is told the position of each step"
        )
    if isinstance(count, int) and count != 1:
        raise BuildError(
            f"the module was exported for steps of {count} tokens; export it for one token, or for a dynamic number of them"
        )
    return start, count


def _check_states(
    module: GraphModule,
    values: Mapping[str, Any],
    states: Sequence[StateTensor],
    attentions: Sequence[AttentionMatch],
    start: StartPosition,
    tokens: Any,
) -> None:
    """Every state is a cache, or counts the positions of the sequence, or is never read."""
    caches = {write.base for found in attentions for write in (found.keys, found.values)}
    placeholders = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    for state in states:
        node = placeholders[state.name]
        if node in caches or all(user.op == "output" for user in node.users):
            continue
        if node is start.source and _is_position_counter(
            module, values[state.name], state, start, tokens
        ):
            continue
        user = next(user for user in node.users if user.op != "output")
        raise BuildError(
            f"state {state.source} is no cache of an attention, but read{source_line(user)}: packed rows have no place for it"
        )


def _is_position_counter(
    module: GraphModule, new: Any, state: StateTensor, start: StartPosition, tokens: Any
) -> bool:
    """Whether a state is the position of the next step, from 0 on."""
    source = start.source
    assert source is not None
    if (
        not isinstance(new, Node)
        or shifted_source(new) is not source
        or not bool((state.initial + start.offset == 0).all())
    ):
        return False
    count = tokens if isinstance(tokens, int) else 3
    return bool(
        (
            evaluate(module, new, {source: example_positions(source, 5)}, {str(tokens): count})
            == 5 + count
        ).all()
    )


def _attention_operands(
    module: GraphModule, attentions: Sequence[AttentionMatch]
) -> dict[Node, tuple[Sequence[Node], int]]:
    """What each attention takes from this step, ``[1, heads, tokens, dim]`` each."""
    found: dict[Node, tuple[Sequence[Node], int]] = {}
    for one in attentions:
        with Emitter(module.graph, one.node).before(one.node) as emit:
            found[one.node] = (
                (one.query, expanded_value(emit, one.keys), expanded_value(emit, one.values)),
                2,
            )
    return found


def _scores_of_every_token(scores: Node, tokens: Any) -> tuple[Node, int | None]:
    """The scores of every token where a module returns those of the last one only, and the axis along which it takes them."""
    if is_call(scores, aten.select.int) and scores.args[2] == -1:
        return as_node(scores.args[0]), int(scores.args[1]) % len(shape(as_node(scores.args[0])))  # type: ignore[arg-type]
    if (
        is_call(scores, aten.slice.Tensor)
        and len(scores.args) > 2
        and scores.args[2] == -1
        and not isinstance(tokens, int)
    ):
        return as_node(scores.args[0]), int(scores.args[1]) % len(shape(scores))  # type: ignore[arg-type]
    return scores, None


def _token_axis_of_ids(ids: Node, tokens: Any) -> int:
    extents = shape(ids)
    counted = [axis for axis, extent in enumerate(extents) if str(extent) == str(tokens)]
    if (
        dtype(ids) not in (torch.int64, torch.int32)
        or len(extents) not in (1, 2)
        or not counted
        or any(extent != 1 for axis, extent in enumerate(extents) if axis != counted[-1])
    ):
        raise BuildError(
            f"input {ids.name} {tuple(extents)} of {dtype(ids)} is no tensor of token ids [1, tokens]"
        )
    return counted[-1]
