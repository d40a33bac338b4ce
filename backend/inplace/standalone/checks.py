"""Checks of a call's arguments, before the engine writes anything."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inplace.errors import CallError
from inplace.schema.extents import evaluate
from inplace.schema.standalone import Argument, StandaloneManifest, StandaloneState

ALIGNMENT = {"cpu": 1, "cuda": 256}
"""Alignment of states in bytes, by device type. TensorRT binds no other addresses; all of
PyTorch's own allocations have it."""


class ArgumentChecker:
    """Checks the arguments of an engine against its manifest."""

    def __init__(self, manifest: StandaloneManifest) -> None:
        self._device = manifest.engine.device
        self._ranges = manifest.call.ranges
        self._write_notes = {
            state.source: state.write_note for state in manifest.bases if state.owner == "caller"
        }

    def check(self, arguments: Sequence[Argument], given: Sequence[object]) -> dict[str, Any]:
        """Check the leaves of a call, apart from their memory (`check_memory`).

        Args:
            arguments: what the engine takes.
            given: the leaves, in the order of ``arguments``.

        Returns:
            The value of each symbol in the shapes.

        Raises:
            CallError: names the argument, what was expected and what to do.
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
                    note = self._write_notes.get(argument.where, "")
                    raise CallError(f"{error}{note}") from None
        known = {symbol: value for symbol, (value, _) in bound.items()}
        _check_computed(arguments, given, known)
        return known

    def _check_tensor(
        self, argument: Argument, value: object, bound: dict[str, tuple[Any, str]]
    ) -> None:
        assert argument.dtype is not None
        if not isinstance(value, Tensor):
            raise CallError(
                f"argument {argument.where} is {_kind(value)}, "
                f"the engine takes a tensor of {_shape(argument.shape)}"
            )
        state = argument.kind == "state"
        advice = (
            "allocate the state like that: it is updated in its own memory"
            if state
            else "convert it before the call"
        )
        if value.dtype != argument.dtype.as_torch:
            raise CallError(
                f"argument {argument.where} is {value.dtype}, "
                f"the engine was built for {argument.dtype.as_torch}; {advice}"
            )
        if value.device.type != self._device:
            raise CallError(
                f"argument {argument.where} is on {value.device}, "
                f"the engine runs on {self._device}; {advice}"
            )
        if value.layout is not torch.strided:
            raise CallError(
                f"argument {argument.where} has the layout {value.layout}, "
                f"the engine takes strided tensors; {advice}"
            )
        if len(argument.shape) != value.dim():
            raise CallError(
                f"argument {argument.where} is {list(value.shape)}, "
                f"the engine takes {_shape(argument.shape)}; {advice}"
            )
        for axis, (extent, expected) in enumerate(zip(value.shape, argument.shape, strict=True)):
            self._bind(argument, f"extent on axis {axis}", extent, expected, bound)
        if state and not value.is_contiguous():
            raise CallError(
                f"argument {argument.where} is a state with strides {value.stride()}, "
                "which must be contiguous: call .contiguous() once, "
                "and pass that tensor in every call"
            )

    def _bind(
        self,
        argument: Argument,
        what: str,
        actual: Any,
        expected: int | str,
        bound: dict[str, tuple[Any, str]],
    ) -> None:
        """Compare a number with the graph's, or bind the graph's symbol to it."""
        title = f"argument {argument.where} has the {what} {actual}"
        if isinstance(expected, int):
            if actual != expected:
                raise CallError(
                    f"{title}, the engine was built for {expected}; "
                    "build it with dynamic_shapes to take others"
                )
            return
        low, high = self._ranges.get(expected, (None, None))
        if (low is not None and actual < low) or (high is not None and actual > high):
            raise CallError(
                f"{title}, the engine was built for {low} to "
                f"{high if high is not None else 'any'}; widen dynamic_shapes"
            )
        if expected.isidentifier():
            other, source = bound.setdefault(expected, (actual, argument.where))
            if other != actual:
                raise CallError(f"{title}, which must be that of {source}, {other}")


def _check_computed(
    arguments: Sequence[Argument], given: Sequence[object], known: Mapping[str, Any]
) -> None:
    """Check the extents that are expressions, as far as their symbols are known."""
    for argument, value in zip(arguments, given, strict=True):
        extents = value.shape if isinstance(value, Tensor) else (value,)
        for axis, (extent, expected) in enumerate(zip(extents, argument.shape, strict=False)):
            if isinstance(expected, int) or expected.isidentifier():
                continue
            try:
                computed = evaluate(expected, known)
            except ValueError:
                continue
            if computed != extent:
                raise CallError(
                    f"argument {argument.where} has {extent} on axis {axis}, "
                    f"which must be {expected} = {computed}"
                )


def _check_constant(argument: Argument, value: object) -> None:
    if type(value) is not type(argument.value) or value != argument.value:
        actual = f"a tensor of {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise CallError(
            f"argument {argument.where} is {actual}, the engine was built for {argument.value!r}, "
            "a constant of its graph: build another engine"
        )


def check_memory(
    states: Sequence[tuple[StandaloneState, Tensor]], others: Mapping[str, object]
) -> None:
    """Check that no state overlaps another tensor of the call, as the graph assumes.

    Args:
        states: each state and its tensor.
        others: the other arguments, by their title in an error.

    Raises:
        CallError: a state shares memory with another tensor, or its address is not aligned.
    """
    for state, tensor in states:
        _check_alignment(state, tensor)
    titled: list[tuple[str, Tensor, StandaloneState | None]] = [
        (state.label, tensor, state) for state, tensor in states
    ]
    titled += [(title, value, None) for title, value in others.items() if isinstance(value, Tensor)]
    spans = sorted(
        ((*_span(tensor), title, state) for title, tensor, state in titled if tensor.numel()),
        key=lambda span: span[:2],
    )
    # The tensor and the state that reach farthest so far.
    last_end, last_title = 0, ""
    state_end = 0
    last_state: StandaloneState | None = None
    for start, end, title, written_state in spans:
        other = None
        if last_state is not None and start < state_end:
            other = last_state.label
        elif written_state is not None and start < last_end:
            other = last_title
        if other is not None:
            written = written_state or last_state
            assert written is not None
            raise CallError(
                f"{other} and {title} share memory, and one of them is a state, "
                f"which the call writes: pass a copy of one{written.write_note}"
            )
        if end > last_end:
            last_end, last_title = end, title
        if written_state is not None and end > state_end:
            state_end, last_state = end, written_state


def _check_alignment(state: StandaloneState, tensor: Tensor) -> None:
    alignment = ALIGNMENT[tensor.device.type]
    if tensor.data_ptr() % alignment:
        raise CallError(
            f"{state.label} begins at {tensor.data_ptr():#x}, "
            f"the engine takes states at multiples of {alignment} bytes: "
            f"allocate it by itself instead of as a part of another tensor{state.write_note}"
        )


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the first byte after its last."""
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
