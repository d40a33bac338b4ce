"""Which mechanism updates which state: candidates in order, each answers yes or no, because.

States that one operator takes together (the keys and values of a layer) are updated by one mechanism.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from inplace.schema.served import AliasKind, Lowering
from inplace.schema.specs import StateSpec
from inplace.trt import TensorRT
from torch.fx import Node

from inplace_builder.errors import BuildError
from inplace_builder.graph.nodes import source_line

inplace = torch.ops.inplace


ORDER: tuple[AliasKind, ...] = ("plugin", "kv_cache_update", "copy")
"""The order in which mechanisms are asked."""


FIRST_CACHE_LAYER = (10, 15)
"""The TensorRT that first has IKVCacheUpdateLayer."""


@dataclass(frozen=True)
class Eligibility:
    """A mechanism's answer."""

    ok: bool
    because: str


@dataclass(frozen=True)
class StateUse:
    """An operator on a state.

    Attributes:
        node: the call.
        state: the state.
        arguments: the call's arguments by name, defaults included.
    """

    node: Node
    state: StateSpec
    arguments: Mapping[str, Any]

    @property
    def operator(self) -> str:
        """Its name without the library: ``read``, ``update``, ``attention``."""
        name: str = self.node.target._schema.name  # type: ignore[union-attr]
        return name.partition("::")[2]

    @property
    def writes(self) -> bool:
        """Whether it updates the state."""
        return self.operator == "update" or bool(
            self.operator.endswith("attention") and self.arguments.get("append", True)
        )


EligibilityCheck = Callable[[Sequence[StateUse], TensorRT], Eligibility]


_judges: dict[AliasKind, EligibilityCheck] = {}


def mechanism(kind: AliasKind) -> Callable[[EligibilityCheck], EligibilityCheck]:
    """Register the decorated function as what answers for a mechanism; it is given every use of states that belong together.

    Raises:
        ValueError: the mechanism already has one.
    """

    def register(judge: EligibilityCheck) -> EligibilityCheck:
        if kind in _judges:
            raise ValueError(
                f"mechanism {kind!r} already has the judge {_judges[kind].__qualname__}"
            )
        _judges[kind] = judge
        return judge

    return register


def choose(
    graph: torch.fx.Graph,
    states: Sequence[StateSpec],
    tensorrt: TensorRT,
    *,
    order: Sequence[AliasKind] = ORDER,
) -> tuple[Lowering, ...]:
    """Give every state a mechanism: the first of ``order`` that answers yes.

    Args:
        graph: the graph that is to be lowered.
        states: its states.
        tensorrt: what it is to be lowered with.
        order: the candidates; one name to insist on a mechanism.

    Returns:
        One record a state, with the answers of the mechanisms asked.

    Raises:
        BuildError: every candidate refuses a state; has all their reasons.
    """
    if unknown := sorted(set(order) - set(_judges)):
        raise BuildError(f"there is no mechanism {unknown[0]!r}; choose from {sorted(_judges)}")
    found: dict[str, Lowering] = {}
    for group in _together(graph, states):
        refusals: list[str] = []
        names = sorted({use.state.name for use in group})
        for kind in order:
            verdict = _judges[kind](group, tensorrt)
            if verdict.ok:
                found |= {
                    name: Lowering(
                        state=name, kind=kind, reason=verdict.because, refused=tuple(refusals)
                    )
                    for name in names
                }
                break
            refusals.append(f"{kind}: {verdict.because}")
        else:
            raise BuildError(
                f"no mechanism can update {' and '.join(names)} with {tensorrt}: {'; '.join(refusals)}"
            )
    return tuple(found[state.name] for state in states)


def _together(graph: torch.fx.Graph, states: Sequence[StateSpec]) -> list[list[StateUse]]:
    """The uses of every state, in groups of states that some operator takes together."""
    specs = {state.name: state for state in states}
    groups: dict[str, list[StateUse]] = {state.name: [] for state in states}
    for node in graph.nodes:
        taken = [source.name for source in node.all_input_nodes if source.name in specs]
        if node.op != "call_function" or not taken:
            continue
        schema = node.target._schema.arguments
        arguments = {argument.name: argument.default_value for argument in schema}
        arguments |= dict(zip(arguments, node.args, strict=False)) | node.kwargs
        for name in taken:
            groups[name].append(StateUse(node, specs[name], arguments))
        merged = [
            use
            for group in {id(groups[name]): groups[name] for name in taken}.values()
            for use in group
        ]
        for name in {use.state.name for use in merged}:
            groups[name] = merged
    if unused := sorted(name for name, uses in groups.items() if not uses):
        raise BuildError(f"the graph never uses the states {unused}; leave them out")
    return list({id(group): group for group in groups.values()}.values())


@mechanism("copy")
def supports_copy(uses: Sequence[StateUse], tensorrt: TensorRT) -> Eligibility:
    """Any state of a type that TensorRT selects between."""
    for use in uses:
        dtype = use.state.dtype.as_torch
        if dtype in (torch.int8, torch.uint8) or not tensorrt.has_dtype(dtype):
            return Eligibility(
                False,
                f"TensorRT does not select between elements of {use.state.name}, which is {use.state.dtype}",
            )
        if (because := _chosen_at_load(use)) is not None:
            return Eligibility(False, f"{because}; the scatter needs an extent that is known")
        if use.operator not in ("read", "update", "attention"):
            return Eligibility(
                False, f"it has no converter for {use.node.target}{source_line(use.node)}"
            )
    return Eligibility(
        True, "the state is copied into a second buffer in each step, and the runtime swaps the two"
    )


@mechanism("kv_cache_update")
def supports_kv_cache_update(uses: Sequence[StateUse], tensorrt: TensorRT) -> Eligibility:
    """A cache as `IKVCacheUpdateLayer` has it: ``[slots, heads, capacity, dim]`` in a float type, appended to once a step."""
    if not tensorrt.is_rtx and tensorrt.version[:2] < FIRST_CACHE_LAYER:
        return Eligibility(
            False,
            f"IKVCacheUpdateLayer is in TensorRT 10.15 and later and in TensorRT for RTX, this is {tensorrt}",
        )
    order = {node: place for place, node in enumerate(uses[0].node.graph.nodes)}
    for use in uses:
        places = [
            order[other.node]
            for other in uses
            if other.writes and other.state.name == use.state.name
        ]
        because = _no_cache(use) or _no_cache_operator(
            use, after=all(place < order[use.node] for place in places)
        )
        if because is not None:
            return Eligibility(False, f"{because}{source_line(use.node)}")
    for name in {use.state.name for use in uses}:
        writers = sum(use.writes for use in uses if use.state.name == name)
        if writers > 1:
            return Eligibility(
                False,
                f"{name} is updated {writers} times a step; the layer's cache must be an input of the network",
            )
    return Eligibility(True, "TensorRT's cache layer updates the bound memory itself")


def _no_cache(use: StateUse) -> str | None:
    """Why the state is no cache of the layer."""
    state = use.state
    if len(state.shape) != 3:
        return f"{state.name} has rank {len(state.shape) + 1} with its slots; the layer takes [slots, heads, capacity, dim]"
    if state.axis != 1:
        grows = "does not grow" if state.axis is None else f"grows along axis {state.axis + 1}"
        return f"{state.name} {grows}; the layer appends along axis 2"
    if state.dtype.as_torch not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{state.name} is {state.dtype}; the layer takes float32, float16 and bfloat16"
    if (because := _chosen_at_load(use)) is not None:
        return f"{because}; the layer has a static one"
    return None


def _chosen_at_load(use: StateUse) -> str | None:
    """That the graph leaves the state's capacity open, if it does."""
    held = next(
        source.meta["val"] for source in use.node.all_input_nodes if source.name == use.state.name
    )
    fixed = all(isinstance(extent, int) for extent in held.shape[1:])
    return None if fixed else f"the capacity of {use.state.name} is chosen at load"


def _no_cache_operator(use: StateUse, *, after: bool) -> str | None:
    """Why the layer cannot do what the operator does; ``after``: every update of the state comes before it."""
    if use.arguments.get("ring"):
        return f"{use.state.name} is a ring; the layer only appends and drops what is beyond the capacity"
    if use.operator == "read":
        return (
            None
            if after
            else f"{use.state.name} is read ahead of its update; TensorRT could update it first"
        )
    if use.operator == "update" and use.arguments["write_indices"] is None:
        return f"{use.state.name} is rewritten; the layer only appends"
    if use.operator == "update" and use.arguments["axis"] != 2:
        return f"{use.state.name} is appended to along axis {use.arguments['axis']}; the layer appends along axis 2"
    if use.operator not in ("update", "attention"):
        return f"it has no converter for {use.node.target}"
    return None
