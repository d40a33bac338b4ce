"""Which mechanism updates which state.

Each mechanism has an eligibility check, registered with `mechanism`. `choose_mechanisms` tries them
in order of preference. States that one operator takes together, for example the keys and values of
a layer, get the same mechanism.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from inplace.schema.specs import AliasKind, Lowering, StateSpec
from inplace.trt import TensorRT
from torch.fx import Node

from inplace_builder.errors import BuildError, LoweringError
from inplace_builder.lower.recurrences import NAMES as RECURRENCES

PREFERENCE: tuple[AliasKind, ...] = ("plugin", "kv_cache_update", "copy")
"""Mechanisms in order of preference."""


@dataclass(frozen=True)
class Eligibility:
    """Whether a mechanism can update states, and the reason."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class StateUse:
    """A call of an operator on a state.

    Attributes:
        node: the call.
        state: the state.
        arguments: the call's arguments by name, defaults included.
        fixed: all extents that the state is bound with are known, so that neighbouring axes of it
            may be merged.
    """

    node: Node
    state: StateSpec
    arguments: Mapping[str, Any]
    fixed: bool = False

    @property
    def operator(self) -> str:
        """The operator's name without its library: ``read``, ``update``, ``attention``."""
        name: str = self.node.target._schema.name  # type: ignore[union-attr]
        return name.partition("::")[2]

    @property
    def writes(self) -> bool:
        """Whether it updates the state."""
        return self.operator in ("update", *RECURRENCES) or bool(
            self.operator.endswith("attention") and self.arguments.get("append", True)
        )

    @property
    def has_dynamic_capacity(self) -> bool:
        """Whether the graph leaves the state's capacity open, to be chosen when it is loaded."""
        (placeholder,) = (
            source for source in self.node.all_input_nodes if source.name == self.state.name
        )
        return any(not isinstance(extent, int) for extent in placeholder.meta["val"].shape[1:])


EligibilityCheck = Callable[[Sequence[StateUse], TensorRT], Eligibility]
"""Takes every use of the states that belong together."""


_checks: dict[AliasKind, EligibilityCheck] = {}


def mechanism(kind: AliasKind) -> Callable[[EligibilityCheck], EligibilityCheck]:
    """Register the decorated function as the eligibility check of a mechanism.

    Raises:
        ValueError: the mechanism already has one.
    """

    def register(check: EligibilityCheck) -> EligibilityCheck:
        if kind in _checks:
            raise ValueError(
                f"mechanism {kind!r} already has the check {_checks[kind].__qualname__}"
            )
        _checks[kind] = check
        return check

    return register


def candidates(alias: AliasKind | None, *, strict: bool) -> tuple[AliasKind, ...]:
    """The mechanisms that a build allows, in order of preference.

    Args:
        alias: the only mechanism allowed; None allows all.
        strict: do not allow ``copy``.

    Raises:
        BuildError: ``copy`` is demanded and refused.
    """
    if strict and alias == "copy":
        raise BuildError(
            "strict refuses the mechanism copy, which alias asks for; drop one of them"
        )
    if alias is not None:
        return (alias,)
    return tuple(kind for kind in PREFERENCE if not (strict and kind == "copy"))


def choose_mechanisms(
    graph: torch.fx.Graph,
    states: Sequence[StateSpec],
    tensorrt: TensorRT,
    *,
    order: Sequence[AliasKind] = PREFERENCE,
    fixed: bool = False,
) -> tuple[Lowering, ...]:
    """Give every state the first mechanism that can update it.

    Args:
        graph: the graph to lower.
        states: its states.
        tensorrt: the TensorRT to lower it with.
        order: the mechanisms to try; see `candidates`.
        fixed: as of `StateUse`.

    Returns:
        One record for each state, with the reasons of the mechanisms that were tried before.

    Raises:
        LoweringError: no mechanism can update a state; has the reasons of all.
        BuildError: ``order`` has an unknown mechanism, or the graph does not use a state.
    """
    if unknown := sorted(set(order) - set(_checks)):
        raise BuildError(f"there is no mechanism {unknown[0]!r}; choose from {sorted(_checks)}")
    records: dict[str, Lowering] = {}
    for group in _groups(graph, states, fixed=fixed):
        records |= _choose_for_group(group, tensorrt, order)
    return tuple(records[state.name] for state in states)


def _choose_for_group(
    group: Sequence[StateUse], tensorrt: TensorRT, order: Sequence[AliasKind]
) -> dict[str, Lowering]:
    """The records of states that get the same mechanism, by their names."""
    names = sorted({use.state.name for use in group})
    refused: list[str] = []
    for kind in order:
        eligibility = _checks[kind](group, tensorrt)
        if eligibility.ok:
            return {
                name: Lowering(
                    state=name, kind=kind, reason=eligibility.reason, refused=tuple(refused)
                )
                for name in names
            }
        refused.append(f"{kind}: {eligibility.reason}")
    raise LoweringError(
        f"no mechanism can update {' and '.join(names)} with {tensorrt}: {'; '.join(refused)}"
    )


def _groups(
    graph: torch.fx.Graph, states: Sequence[StateSpec], *, fixed: bool
) -> list[list[StateUse]]:
    """The uses of all states, grouped so that states that one operator takes are together."""
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
            groups[name].append(StateUse(node, specs[name], arguments, fixed))
        distinct = {id(groups[name]): groups[name] for name in taken}
        merged = [use for group in distinct.values() for use in group]
        for name in {use.state.name for use in merged}:
            groups[name] = merged
    if unused := sorted(name for name, uses in groups.items() if not uses):
        raise BuildError(f"the graph never uses the states {unused}; leave them out")
    return list({id(group): group for group in groups.values()}.values())
