"""What a call of an engine is checked for on the host, before anything is written."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inplace.errors import CallError
from inplace.schema.extents import evaluate
from inplace.schema.standalone import Argument, StandaloneManifest, StandaloneState

ALIGNMENT = {"cpu": 1, "cuda": 256}
"""Bytes that the address of a state must be a multiple of: TensorRT takes no other bindings; PyTorch's own allocations are."""


class Checks:
    """Checks of one engine's arguments; the manifest says what they must be."""

    def __init__(self, manifest: StandaloneManifest) -> None:
        self._device = manifest.engine.device
        self._ranges = manifest.call.ranges
        self._lines = {
            state.source: state.write_note for state in manifest.bases if state.owner == "caller"
        }

    def check(self, arguments: Sequence[Argument], given: Sequence[object]) -> dict[str, Any]:
        """Check the leaves of a call, in the order of ``arguments``, all but their memory.

        Returns:
            What each symbol in their shapes stands for in this call.

        Raises:
            CallError: with the argument, what was expected and what to do.
        """
        bound: dict[str, tuple[Any, str]] = {}
        for argument, value in zip(arguments, given, strict=True):
            if argument.kind == "constant":
                _check_constant(argument, value)
            elif argument.kind == "number":
                if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
                    raise CallError(
                        f"argument {argument.where} is {_kind(value)}, the engine takes an int"
                    )
                self._bind(argument, "value", value, argument.shape[0], bound)
            else:
                try:
                    self._check_tensor(argument, value, bound)
                except CallError as error:
                    raise CallError(f"{error}{self._lines.get(argument.where, '')}") from None
        known = {symbol: value for symbol, (value, _) in bound.items()}
        for argument, value in zip(
            arguments, given, strict=True
        ):  # extents computed from others, when all of those are known
            found = value.shape if isinstance(value, Tensor) else (value,)
            for axis, (extent, expected) in enumerate(zip(found, argument.shape, strict=False)):
                if isinstance(expected, int) or expected.isidentifier():
                    continue
                try:
                    computed = evaluate(expected, known)
                except ValueError:
                    continue
                if computed != extent:
                    raise CallError(
                        f"argument {argument.where} has {extent} on axis {axis}, which must be {expected} = {computed}"
                    )
        return known

    def _check_tensor(
        self, argument: Argument, value: object, bound: dict[str, tuple[Any, str]]
    ) -> None:
        assert argument.dtype is not None
        if not isinstance(value, Tensor):
            raise CallError(
                f"argument {argument.where} is {_kind(value)}, the engine takes a tensor of {_shape(argument.shape)}"
            )
        state = argument.kind == "state"
        todo = (
            "allocate the state so: it is updated in its own memory"
            if state
            else "convert it before the call"
        )
        if value.dtype != argument.dtype.as_torch:
            raise CallError(
                f"argument {argument.where} is {value.dtype}, the engine was built for {argument.dtype.as_torch}; {todo}"
            )
        if value.device.type != self._device:
            raise CallError(
                f"argument {argument.where} lies on {value.device}, the engine runs on {self._device}; {todo}"
            )
        if value.layout is not torch.strided:
            raise CallError(
                f"argument {argument.where} has the layout {value.layout}, the engine takes plain tensors; {todo}"
            )
        if len(argument.shape) != value.dim():
            raise CallError(
                f"argument {argument.where} is {list(value.shape)}, the engine takes {_shape(argument.shape)}; {todo}"
            )
        for axis, (extent, wanted) in enumerate(zip(value.shape, argument.shape, strict=True)):
            self._bind(argument, f"extent on axis {axis}", extent, wanted, bound)
        if state and not value.is_contiguous():
            raise CallError(
                f"argument {argument.where} is a state with strides {value.stride()}, which must be contiguous: "
                f"call .contiguous() once, and pass that tensor in every call"
            )

    def _bind(
        self,
        argument: Argument,
        what: str,
        found: Any,
        expected: int | str,
        bound: dict[str, tuple[Any, str]],
    ) -> None:
        """Compare a number with what the graph expects, or learn from it what a symbol stands for in this call."""
        where = f"argument {argument.where} has the {what} {found}"
        if isinstance(expected, int):
            if found != expected:
                raise CallError(
                    f"{where}, the engine was built for {expected}; build it with dynamic_shapes to take others"
                )
            return
        low, high = self._ranges.get(expected, (None, None))
        if (low is not None and found < low) or (high is not None and found > high):
            raise CallError(
                f"{where}, the engine was built for {low} to {high if high is not None else 'any'}; widen dynamic_shapes"
            )
        if expected.isidentifier():
            other, owner = bound.setdefault(expected, (found, argument.where))
            if other != found:
                raise CallError(f"{where}, which must be that of {owner}, {other}")


def _check_constant(argument: Argument, value: object) -> None:
    if type(value) is not type(argument.value) or value != argument.value:
        found = f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise CallError(
            f"argument {argument.where} is {found}, the engine was built for {argument.value!r}, a constant of its graph: build another"
        )


def check_memory(
    states: Sequence[tuple[StandaloneState, Tensor]], others: Mapping[str, object]
) -> None:
    """No state may overlap another tensor of the call: the graph takes each for memory of its own.

    Args:
        states: with the memory of each.
        others: what else is passed, by the words for it in an error.

    Raises:
        CallError: two tensors share memory, or a state begins at an address that the engine cannot be bound to.
    """
    for state, tensor in states:
        alignment = ALIGNMENT[tensor.device.type]
        if tensor.data_ptr() % alignment:
            raise CallError(
                f"{state.label} begins at {tensor.data_ptr():#x}, the engine takes states at multiples of {alignment} bytes: "
                f"allocate it by itself instead of as a part of another tensor{state.write_note}"
            )
    named: list[tuple[str, Tensor, StandaloneState | None]] = [
        (state.label, tensor, state) for state, tensor in states
    ]
    named += [(title, value, None) for title, value in others.items() if isinstance(value, Tensor)]
    spans = sorted(
        ((*_span(tensor), title, state) for title, tensor, state in named if tensor.numel()),
        key=lambda span: span[:2],
    )
    last_end, last_title = 0, ""
    state_end = 0
    before: StandaloneState | None = None  # the state that reaches farthest so far, to state_end
    for start, end, title, owner in spans:
        other = (
            before.label
            if before is not None and start < state_end
            else last_title
            if owner is not None and start < last_end
            else None
        )
        if other is not None:
            written = owner or before
            assert written is not None
            raise CallError(
                f"{other} and {title} share memory, and one of them is a state, which the call writes: pass a copy of one{written.write_note}"
            )
        if end > last_end:
            last_end, last_title = end, title
        if owner is not None and end > state_end:
            state_end, before = end, owner


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum(
        (extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _kind(value: object) -> str:
    return (
        f"a tensor of {list(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
