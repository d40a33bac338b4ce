"""The proof that a graph of one sequence is a decoder, so that its rows can be packed.

Attention must be `inplace::attention` over its own cache, every state a cache or the position of
the sequence, every other operator one that treats each token by itself, and the only inputs token
ids and positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import (
    CASTS,
    Emitter,
    as_node,
    dtype,
    is_call,
    placeholders_by_name,
    returned_values,
    shape,
    source_line,
)
from inplace_builder.graph.tokens import (
    MixesTokensError,
    TokenAxes,
    TokenOperands,
    propagate_token_axes,
)
from inplace_builder.states.attention import (
    AttentionMatch,
    StartPosition,
    UnfusedAttention,
    find_position_tensors,
    match_cache_attentions,
)
from inplace_builder.states.indices import evaluate, example_positions, shifted_source
from inplace_builder.states.lift import StateTensor
from inplace_builder.states.rewrite import expanded_value
from inplace_builder.states.writes import MatchContext, find_write_chains

aten = torch.ops.aten


@dataclass(frozen=True)
class ProvenDecoder:
    """A functional graph that is proved to decode token by token.

    Attributes:
        module: the graph.
        attentions: one a layer, in order.
        num_tokens: tokens of a step: 1, or a dynamic extent.
        ids: the placeholder of token ids.
        logits: the scores of each token.
        positions: tensors ``[tokens]`` of positions, each with what it adds to a token's own.
        token_axes: the token axis of each tensor.
    """

    module: GraphModule
    attentions: tuple[AttentionMatch, ...]
    num_tokens: Any
    ids: Node
    logits: Node
    positions: Mapping[Node, int]
    token_axes: TokenAxes

    @property
    def vocab_size(self) -> int:
        """Token ids that its embeddings have rows for.

        Raises:
            BuildError: nothing is embedded with the token ids.
        """
        tables = [
            user.args[0]
            for user in _users_past_views(self.ids)
            if is_call(user, aten.embedding.default)
        ]
        if not tables:
            raise BuildError(
                f"input {self.ids.name} is not a tensor of token ids: it indexes no embedding"
            )
        return min(int(shape(as_node(table))[0]) for table in tables)


_VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, *CASTS)


def _users_past_views(node: Node) -> list[Node]:
    """The users of a tensor; those of a view or a cast of it instead of that."""
    users = []
    for user in node.users:
        users += _users_past_views(user) if is_call(user, *_VIEWS) else [user]
    return users


def prove_decoder(
    module: GraphModule,
    states: Sequence[StateTensor],
    num_outputs: int,
    assume_consecutive: frozenset[str],
) -> ProvenDecoder:
    """Prove that a graph of one sequence is a decoder.

    Args:
        module: takes the inputs and then the states, returns ``num_outputs`` outputs and then the
            states' new values.
        states: in the order of the placeholders.
        num_outputs: outputs of the module.
        assume_consecutive: inputs that the caller states to be consecutive positions.

    Raises:
        BuildError: something is not, or not provably, what packed rows need; names it, with the
            module's line.
    """
    if num_outputs != 1:
        raise BuildError(
            f"a decoder returns its scores alone, this module returns {num_outputs} outputs"
        )
    returned = returned_values(module.graph)
    context = MatchContext(module, 1, assume_consecutive)
    attentions = _prove_attentions(context, states)
    start, num_tokens = _common_start(attentions)
    new_values = dict(zip((state.name for state in states), returned[num_outputs:], strict=True))
    _check_states(module, states, new_values, attentions, start, num_tokens)
    operands = _token_operands(module, attentions)
    logits, last_token_axis = _scores_of_every_token(as_node(returned[0]), num_tokens)
    positions, ids = _find_inputs(context, logits, start, num_tokens, operands)
    seeds = dict.fromkeys(positions, 0) | {ids: _token_axis_of_ids(ids, num_tokens)}
    try:
        axes = propagate_token_axes(module.graph, [logits], num_tokens, seeds, operands)
    except MixesTokensError as error:
        raise BuildError(
            f"tokens of several sequences cannot be packed: {error}{source_line(error.node)}"
        ) from error
    if (
        logits not in axes.axis_of
        or len(shape(logits)) - axes.axis_of[logits] != 2
        or (last_token_axis is not None and last_token_axis != axes.axis_of[logits])
    ):
        raise BuildError(
            f"the module's output {tuple(shape(logits))} is not one row of scores a token"
        )
    shifts = {node: shift - start.offset for node, shift in positions.items()}
    return ProvenDecoder(module, attentions, num_tokens, ids, logits, shifts, axes)


def _prove_attentions(
    context: MatchContext, states: Sequence[StateTensor]
) -> tuple[AttentionMatch, ...]:
    """All attentions over caches, each proved to be `inplace::attention`."""
    chains = find_write_chains(states, 1, context)
    matches: list[AttentionMatch] = []
    for match in match_cache_attentions(context, states, chains):
        if isinstance(match, UnfusedAttention):
            raise BuildError(
                f"attention{source_line(match.node)} is not provably causal attention over its own "
                f"cache: {match.reason}"
            )
        matches.append(match)
    if not matches:
        raise BuildError(
            "the module has no attention over a cache that it appends to; capture_exported takes "
            "any module"
        )
    return tuple(matches)


def _common_start(attentions: Sequence[AttentionMatch]) -> tuple[StartPosition, Any]:
    """Where all attentions start, and how many tokens they take."""
    starts = {match.start for match in attentions}
    counts = {str(shape(match.query)[2]): shape(match.query)[2] for match in attentions}
    if len(starts) > 1 or len(counts) > 1:
        raise BuildError(
            "the module's layers append at different positions, or different numbers of tokens"
        )
    (start,), (num_tokens,) = starts, counts.values()
    if start.source is None:
        raise BuildError(
            "the module appends at a fixed position; a decoder takes the position of each step as "
            "an input, or counts it in a state"
        )
    if isinstance(num_tokens, int) and num_tokens != 1:
        raise BuildError(
            f"the module was exported for steps of {num_tokens} tokens; export it for one token, "
            f"or for a dynamic number of them"
        )
    return start, num_tokens


def _check_states(
    module: GraphModule,
    states: Sequence[StateTensor],
    new_values: Mapping[str, Any],
    attentions: Sequence[AttentionMatch],
    start: StartPosition,
    num_tokens: Any,
) -> None:
    """BuildError unless every state is a cache, counts positions, or is never read."""
    caches = {write.base for match in attentions for write in (match.keys, match.values)}
    placeholders = placeholders_by_name(module.graph)
    for state in states:
        node = placeholders[state.name]
        if node in caches or all(user.op == "output" for user in node.users):
            continue
        if node is start.source and _is_position_counter(
            module, new_values[state.name], state, start, num_tokens
        ):
            continue
        reader = next(user for user in node.users if user.op != "output")
        raise BuildError(
            f"state {state.source} is not a cache of an attention, but read{source_line(reader)}: "
            f"packed rows have no place for it"
        )


def _is_position_counter(
    module: GraphModule, new: Any, state: StateTensor, start: StartPosition, num_tokens: Any
) -> bool:
    """Whether a state is the position of the next step, beginning with 0."""
    source = start.source
    assert source is not None
    if not isinstance(new, Node) or shifted_source(new) is not source:
        return False
    if not bool((state.initial + start.offset == 0).all()):
        return False
    count = num_tokens if isinstance(num_tokens, int) else 3
    after = evaluate(module, new, {source: example_positions(source, 5)}, {str(num_tokens): count})
    return bool((after == 5 + count).all())


def _token_operands(
    module: GraphModule, attentions: Sequence[AttentionMatch]
) -> dict[Node, TokenOperands]:
    """What each attention takes from this step, ``[1, heads, tokens, dim]`` each."""
    operands: dict[Node, TokenOperands] = {}
    for match in attentions:
        with Emitter(module.graph, match.node).before(match.node) as emit:
            new = expanded_value(emit, match.keys), expanded_value(emit, match.values)
        operands[match.node] = TokenOperands((match.query, *new), axis=2)
    return operands


def _scores_of_every_token(scores: Node, num_tokens: Any) -> tuple[Node, int | None]:
    """The scores of all tokens.

    If a module returns those of the last token only, this is what it selects them from; the second
    result is the axis along which it selects, else None.
    """
    if is_call(scores, aten.select.int):
        takes_last = scores.args[2] == -1
    else:
        takes_last = (
            is_call(scores, aten.slice.Tensor)
            and len(scores.args) > 2
            and scores.args[2] == -1
            and not isinstance(num_tokens, int)
        )
    if takes_last:
        source, axis = as_node(scores.args[0]), scores.args[1]
        assert isinstance(axis, int)
        return source, axis % len(shape(source))
    return scores, None


def _find_inputs(
    context: MatchContext,
    logits: Node,
    start: StartPosition,
    num_tokens: Any,
    operands: Mapping[Node, TokenOperands],
) -> tuple[dict[Node, int], Node]:
    """The tensors of positions that scores depend on, and the placeholder of token ids."""
    assert start.source is not None
    followed = {node: given.operands for node, given in operands.items()}
    positions, others = find_position_tensors(context, [logits], start.source, num_tokens, followed)
    if start.source in others:
        raise BuildError(
            f"the module uses {start.source.name} other than as the positions of its tokens"
        )
    if len(others) != 1:
        names = sorted(node.name for node in others)
        raise BuildError(
            f"a decoder computes its scores from token ids and their positions; this module takes "
            f"{names or 'neither'}"
        )
    return positions, others.pop()


def _token_axis_of_ids(ids: Node, num_tokens: Any) -> int:
    """The token axis of the token ids ``[tokens]`` or ``[1, tokens]``.

    Raises:
        BuildError: the input is no such tensor.
    """
    extents = shape(ids)
    candidates = [axis for axis, extent in enumerate(extents) if str(extent) == str(num_tokens)]
    if (
        dtype(ids) not in (torch.int64, torch.int32)
        or len(extents) not in (1, 2)
        or not candidates
        or any(extent != 1 for axis, extent in enumerate(extents) if axis != candidates[-1])
    ):
        raise BuildError(
            f"input {ids.name} {tuple(extents)} of {dtype(ids)} is not a tensor of token ids "
            f"[1, tokens]"
        )
    return candidates[-1]
