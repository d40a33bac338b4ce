"""What a call of an engine is checked for on the host, before anything is written."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from inplace.direct.manifest import Argument, DirectManifest
from inplace.errors import CallError, LoadError

Extents = tuple[Any, ...]
"""Of a tensor, or of a number its value alone: integers, and expressions in the graph's symbols."""


class Checks:
    """Checks of one engine's arguments.

    Args:
        exported: the graph, whose symbols and ranges are the truth about dynamic extents.
        manifest: compared with it.
        title: the graph's file.

    Raises:
        LoadError: the arguments of the graph are not the manifest's.
    """

    def __init__(self, exported: ExportedProgram, manifest: DirectManifest, title: str) -> None:
        self._device = manifest.engine.device
        self._ranges = {str(symbol): _limits(limits) for symbol, limits in exported.range_constraints.items()}
        self._extents: dict[str, Extents] = {}
        self._shapes = {state.name: state.shape for state in manifest.states}
        values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
        for argument in manifest.graph_inputs:
            value = values[argument.name]
            extents = _extents(value)
            recorded = tuple(extent if isinstance(extent, int) else None for extent in argument.shape)
            dtype = argument.dtype.as_torch if argument.dtype is not None else None
            if isinstance(value, Tensor) != (argument.kind == "tensor") or (
                isinstance(value, Tensor)
                and (value.dtype != dtype or recorded != tuple(extent if isinstance(extent, int) else None for extent in extents))
            ):
                raise LoadError(f"{title} takes {argument.name} as {value}, the manifest says {argument}; build the engine again")
            self._extents[argument.name] = extents
        for state in manifest.states:
            value = values[state.name]
            slot = state.shape[1:] if state.leading else state.shape
            if (tuple(value.shape[1:]), value.dtype) != (slot, state.dtype.as_torch):
                raise LoadError(f"{title} has state {state.name} as {value}, the manifest says {state}; build the engine again")

    def check(self, arguments: Sequence[Argument], given: Sequence[object], held: Mapping[str, Tensor]) -> None:
        """Check the leaves of a call, in the order of ``arguments``.

        Raises:
            CallError: with the argument, what was expected and what to do.
        """
        bound: dict[str, tuple[int, str]] = {}
        for argument, value in zip(arguments, given, strict=True):
            if argument.kind == "constant":
                _check_constant(argument, value)
            elif argument.kind == "number":
                if not isinstance(value, int) or isinstance(value, bool):
                    raise CallError(f"argument {argument.where} is {_kind(value)}, the engine takes an int")
                self._bind(argument, "value", value, self._extents[argument.name][0], bound)
            else:
                self._check_tensor(argument, value, bound)
        for argument, value in zip(arguments, given, strict=True):  # extents computed from others, when all of those are known
            found = value.shape if isinstance(value, Tensor) else (value,)
            for axis, (extent, expected) in enumerate(zip(found, self._extents.get(argument.name, ()), strict=False)):
                if isinstance(expected, int) or expected.is_Symbol:
                    continue
                computed = expected.subs({symbol: bound[str(symbol)][0] for symbol in expected.free_symbols if str(symbol) in bound})
                if computed.is_number and int(computed) != extent:
                    raise CallError(f"argument {argument.where} has {extent} on axis {axis}, which must be {expected} = {computed}")
        _check_memory(arguments, given, held)

    def _check_tensor(self, argument: Argument, value: object, bound: dict[str, tuple[int, str]]) -> None:
        assert argument.dtype is not None
        if not isinstance(value, Tensor):
            raise CallError(f"argument {argument.where} is {_kind(value)}, the engine takes a tensor of {_shape(argument.shape)}")
        state = argument.kind == "state"
        todo = "allocate the state so: it is updated in its own memory" if state else "convert it before the call"
        if value.dtype != argument.dtype.as_torch:
            raise CallError(f"argument {argument.where} is {value.dtype}, the engine was built for {argument.dtype.as_torch}; {todo}")
        if value.device.type != self._device:
            raise CallError(f"argument {argument.where} lies on {value.device}, the engine runs on {self._device}; {todo}")
        if value.layout is not torch.strided:
            raise CallError(f"argument {argument.where} has the layout {value.layout}, the engine takes plain tensors; {todo}")
        expected = self._shapes[argument.name] if state else self._extents[argument.name]
        if len(expected) != value.dim():
            raise CallError(f"argument {argument.where} is {list(value.shape)}, the engine takes {_shape(argument.shape)}; {todo}")
        for axis, (extent, wanted) in enumerate(zip(value.shape, expected, strict=True)):
            self._bind(argument, f"extent on axis {axis}", extent, wanted, bound)
        if state and not value.is_contiguous():
            raise CallError(
                f"argument {argument.where} is a state with strides {value.stride()}, which must be contiguous: "
                f"call .contiguous() once, and pass that tensor in every call"
            )

    def _bind(self, argument: Argument, what: str, found: int, expected: Any, bound: dict[str, tuple[int, str]]) -> None:
        """Compare a number with what the graph expects, or learn from it what a symbol stands for in this call."""
        where = f"argument {argument.where} has the {what} {found}"
        if isinstance(expected, int):
            if found != expected:
                raise CallError(f"{where}, the engine was built for {expected}; build it with dynamic_shapes to take others")
            return
        low, high = self._ranges.get(str(expected), (None, None))
        if (low is not None and found < low) or (high is not None and found > high):
            raise CallError(f"{where}, the engine was built for {low} to {high if high is not None else 'any'}; widen dynamic_shapes")
        if expected.is_Symbol:
            other, owner = bound.setdefault(str(expected), (found, argument.where))
            if other != found:
                raise CallError(f"{where}, which must be that of {owner}, {other}")


def _extents(value: object) -> Extents:
    numbers = value.shape if isinstance(value, Tensor) else (value,)
    return tuple(number.node.expr if isinstance(number, torch.SymInt) else number for number in numbers)


def _limits(limits: Any) -> tuple[int | None, int | None]:
    low, high = (int(limit) if -(2**62) < limit < 2**62 else None for limit in (limits.lower, limits.upper))
    return low, high


def _check_constant(argument: Argument, value: object) -> None:
    if type(value) is not type(argument.value) or value != argument.value:
        found = f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise CallError(
            f"argument {argument.where} is {found}, the engine was built for {argument.value!r}, a constant of its graph: build another"
        )


def _check_memory(arguments: Sequence[Argument], given: Sequence[object], held: Mapping[str, Tensor]) -> None:
    """No state may overlap another tensor of the call: the graph takes each for memory of its own."""
    named = [(f"argument {a.where}", v, a.kind == "state") for a, v in zip(arguments, given, strict=True) if isinstance(v, Tensor)]
    named += [(f"the engine's state {source}", tensor, True) for source, tensor in held.items()]
    spans = sorted(((*_span(tensor), title, state) for title, tensor, state in named if tensor.numel()), key=lambda span: span[:2])
    last_end, last_title, state_end, state_title = 0, "", 0, ""
    for start, end, title, state in spans:
        other = state_title if start < state_end else last_title if state and start < last_end else None
        if other is not None:
            raise CallError(f"{other} and {title} share memory, and one of them is a state, which the call writes: pass a copy of one")
        if end > last_end:
            last_end, last_title = end, title
        if state and end > state_end:
            state_end, state_title = end, title


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _kind(value: object) -> str:
    return f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
