"""Verify a standalone engine: load it, and call it beside the module it was built from."""

from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from typing import Any

import torch
from inplace.schema.specs import Dtype
from inplace.schema.standalone import Argument, StandaloneManifest
from inplace.standalone import Engine
from torch import Tensor
from torch.utils import _pytree as pytree

from inplace_builder.compare import TOLERANCE, is_inexact, relative_error, same_bits
from inplace_builder.errors import BuildError, brief, rejected
from inplace_builder.states.adapt import refuse_fake
from inplace_builder.states.attributes import KeptValues

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
"""Types that positions may have: PyTorch does not compute with the other integer types."""


def verify(
    engine: Engine,
    reference: torch.nn.Module,
    arguments: Any,
    *,
    assume_consecutive: Collection[str] = (),
) -> dict[str, str]:
    """Call engine and module side by side, each on its own device and copy of the states.

    There are two calls with the example's arguments and two with its floating-point inputs
    reversed. Further calls change the integers, which may be positions: all one higher, then each a
    random number below the shortest axis of the states; and one makes states of dynamic extents one
    longer. A further call is only made where the module itself takes its arguments.

    Args:
        engine: the engine, loaded from its files.
        reference: the module itself, as hooks and functions that it keeps may refer to it; its
            buffers change as the engine's states do, and are as they were afterwards.
        arguments: ``(args, kwargs)`` of the build; not changed.
        assume_consecutive: integer inputs that are always consecutive positions; not changed.

    Returns:
        The number of calls and the largest relative error, as the manifest records them.

    Raises:
        BuildError: an output or a state differs by more than the tolerance of its type, an input
            changed, or a state moved.
    """
    comparison = _Comparison(engine, reference, pytree.tree_structure(arguments))
    device = engine.manifest.engine.device
    module_arguments = deepcopy(arguments)
    engine_arguments = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(device), deepcopy(arguments)
    )
    changes = _ArgumentChanges(engine.manifest, assume_consecutive)
    with KeptValues(reference).kept():
        for pair in _calls(changes, reference, module_arguments, engine_arguments):
            comparison.call(*pair)
    exact = comparison.max_error == 0
    return {
        "verified_calls": str(comparison.num_calls),
        "verified_error": "0, bit for bit" if exact else f"{comparison.max_error:.1e}",
    }


def _calls(
    changes: "_ArgumentChanges", reference: torch.nn.Module, for_module: Any, for_engine: Any
) -> Iterator[tuple[Any, Any]]:
    """The arguments of each call, for the module and for the engine."""
    yield from [(for_module, for_engine)] * 2
    for_module, for_engine = changes.reverse_floats(for_module), changes.reverse_floats(for_engine)
    yield from [(for_module, for_engine)] * 2
    further = [changes.increment_integers, changes.randomize_integers]
    if changes.has_dynamic_states:
        further.append(changes.grow_states)
    for change in further:
        changed = change(for_module)
        if _accepts(reference, changed):
            yield changed, change(for_engine)


def _accepts(reference: torch.nn.Module, arguments: Any) -> bool:
    """Whether the module can be called with these arguments; tried on copies of them."""
    args, kwargs = deepcopy(arguments)
    try:
        with KeptValues(reference).kept(), torch.no_grad():
            reference(*args, **kwargs)
    except Exception:  # of any type: the module was not made for these arguments
        return False
    return True


class _Comparison:
    """Calls engine and module side by side.

    Attributes:
        num_calls: calls so far.
        max_error: the largest relative error of an output or a state so far.

    Args:
        engine: the engine.
        reference: the module.
        structure: tree of ``(args, kwargs)``.
    """

    def __init__(
        self, engine: Engine, reference: torch.nn.Module, structure: pytree.TreeSpec
    ) -> None:
        self._engine, self._reference, self._structure = engine, reference, structure
        self.num_calls, self.max_error = 0, 0.0

    def call(self, module_arguments: Any, engine_arguments: Any) -> None:
        """Call both with arguments of the same values, and compare everything afterwards.

        Raises:
            BuildError: something differs.
        """
        index = self.num_calls
        self.num_calls += 1
        before = pytree.tree_leaves(deepcopy(engine_arguments))
        expected = self._call_module(module_arguments)
        addresses = {name: tensor.data_ptr() for name, tensor in self._engine.states.items()}
        outputs = self._call_engine(engine_arguments)
        if len(outputs) != len(expected):
            raise rejected(f"the engine returns {len(outputs)} outputs, the module {len(expected)}")
        for place, (output, other) in enumerate(zip(outputs, expected, strict=True)):
            self._check_same(f"output {place} of call {index}", output, other)
        self._check_arguments(index, engine_arguments, module_arguments, before)
        for name, tensor in self._engine.states.items():
            other = _buffer(self._reference, name)
            self._check_same(f"state {name} after call {index}", tensor, other)
        if addresses != {name: tensor.data_ptr() for name, tensor in self._engine.states.items()}:
            raise rejected("the engine moved one of its states")

    def _call_module(self, arguments: Any) -> list[Any]:
        args, kwargs = arguments
        try:
            with torch.no_grad():
                outputs = pytree.tree_leaves(self._reference(*args, **kwargs))
        except Exception as error:
            raise BuildError(
                f"the module cannot be called {self.num_calls} times with its example inputs: "
                f"{brief(error)}"
            ) from error
        refuse_fake(outputs)
        if pytree.tree_structure(arguments) != self._structure:
            raise BuildError(
                "the module adds to its arguments, or takes something away; "
                "an engine only writes the tensors in them"
            )
        return outputs

    def _call_engine(self, arguments: Any) -> list[Any]:
        args, kwargs = arguments
        try:
            return pytree.tree_leaves(self._engine(*args, **kwargs))
        except Exception as error:
            raise rejected(
                f"the engine fails where the module does not ({brief(error)})"
            ) from error

    def _check_arguments(
        self, index: int, engine_arguments: Any, module_arguments: Any, before: list[Any]
    ) -> None:
        """The caller's states are the same, and the inputs did not change."""
        leaves = zip(
            self._engine.manifest.call.arguments,
            pytree.tree_leaves(engine_arguments),
            pytree.tree_leaves(module_arguments),
            before,
            strict=True,
        )
        for argument, value, other, old in leaves:
            if argument.kind == "state":
                self._check_same(f"state {argument.where} after call {index}", value, other)
            elif isinstance(value, Tensor) and not same_bits(value.reshape(-1), old.reshape(-1)):
                raise rejected(f"the engine changed its input {argument.where}")

    def _check_same(self, title: str, result: object, expected: object) -> None:
        if isinstance(result, Tensor) and isinstance(expected, Tensor):
            weights = self._engine.manifest.engine.dtype
            error = _checked_error(title, result.cpu(), expected.cpu(), weights)
            self.max_error = max(self.max_error, error)
        elif type(result) is not type(expected) or result != expected:
            raise rejected(f"{title} is {result!r}, the module's is {expected!r}")


def _checked_error(title: str, result: Tensor, expected: Tensor, weights: Dtype) -> float:
    """The relative error of a tensor.

    Args:
        title: the tensor's name in errors.
        result: the engine's.
        expected: the module's.
        weights: element type of the weights.

    Raises:
        BuildError: shapes or types differ, or the error exceeds the tolerance.
    """
    if (result.shape, result.dtype) != (expected.shape, expected.dtype):
        raise rejected(
            f"{title} is {list(result.shape)} {result.dtype}, "
            f"the module's {list(expected.shape)} {expected.dtype}"
        )
    error = relative_error(result, expected)
    tolerance = TOLERANCE.get(Dtype.of(result.dtype), 0.0)
    if is_inexact(result):
        tolerance = max(tolerance, TOLERANCE.get(weights, 0.0))
    if not error <= tolerance:
        raise rejected(f"{title} differs from the module by {error:.1e}, more than {tolerance:.0e}")
    return error


def _buffer(module: torch.nn.Module, source: str) -> Tensor:
    """A buffer of the module by its qualified name, as it is now: it may have been reassigned."""
    value: Any = module
    for name in source.split("."):
        value = getattr(value, name, None)
    if not isinstance(value, Tensor):
        raise BuildError(
            f"the module writes {source}, which is none of its buffers: "
            f"register it with register_buffer"
        )
    return value


class _ArgumentChanges:
    """Changes of arguments, the same for those of the module and those of the engine.

    Args:
        manifest: of the engine.
        assume_consecutive: inputs whose integers do not change.
    """

    def __init__(self, manifest: StandaloneManifest, assume_consecutive: Collection[str]) -> None:
        self._arguments, self._ranges = manifest.call.arguments, manifest.call.ranges
        self._assume_consecutive = assume_consecutive
        self._shortest_axis = min(
            (
                extent
                for state in manifest.states
                for extent in state.view_shape
                if isinstance(extent, int) and extent > 1
            ),
            default=1,
        )

    @property
    def has_dynamic_states(self) -> bool:
        """Whether a call chooses an extent of a state."""
        return any(
            argument.kind == "state" and isinstance(extent, str)
            for argument in self._arguments
            for extent in argument.shape
        )

    def reverse_floats(self, tree: Any) -> Any:
        """Reverse the elements of every floating-point input."""

        def change(tensor: Tensor, argument: Argument, place: int) -> Tensor:
            is_input = argument.kind == "tensor"
            return _reversed(tensor) if is_input and is_inexact(tensor) else tensor

        return self._changed(tree, change)

    def increment_integers(self, tree: Any) -> Any:
        """Add one to all integers."""

        def change(tensor: Tensor, argument: Argument, place: int) -> Tensor:
            return tensor + 1 if self._may_change(tensor, argument) else tensor

        return self._changed(tree, change)

    def randomize_integers(self, tree: Any) -> Any:
        """Replace each integer by a random number below the shortest axis of the states."""

        def change(tensor: Tensor, argument: Argument, place: int) -> Tensor:
            if not self._may_change(tensor, argument):
                return tensor
            generator = torch.Generator().manual_seed(place)
            numbers = torch.randint(self._shortest_axis, tensor.shape, generator=generator)
            return numbers.to(tensor.dtype).to(tensor.device)

        return self._changed(tree, change)

    def grow_states(self, tree: Any) -> Any:
        """Make the dynamic extents of states one longer, as far as their ranges allow.

        The new elements are zeros.
        """

        def change(tensor: Tensor, argument: Argument, place: int) -> Tensor:
            is_dynamic = any(isinstance(extent, str) for extent in argument.shape)
            return (
                self._grown(tensor, argument) if argument.kind == "state" and is_dynamic else tensor
            )

        return self._changed(tree, change)

    def _grown(self, tensor: Tensor, argument: Argument) -> Tensor:
        extents = []
        for extent, length in zip(argument.shape, tensor.shape, strict=True):
            limit: int | None = length
            if isinstance(extent, str):
                limit = self._ranges.get(extent, (None, None))[1]
            extents.append(length + (limit is None or length < limit))
        grown = torch.zeros(extents, dtype=tensor.dtype, device=tensor.device)
        grown[tuple(slice(extent) for extent in tensor.shape)] = tensor
        return grown

    def _may_change(self, tensor: Tensor, argument: Argument) -> bool:
        """Whether it is an input of integers that may be positions."""
        return (
            argument.kind == "tensor"
            and argument.name not in self._assume_consecutive
            and tensor.dtype in INTEGERS
        )

    def _changed(self, tree: Any, change: Callable[[Tensor, Argument, int], Tensor]) -> Any:
        leaves, spec = pytree.tree_flatten(tree)
        changed = [
            change(leaf, argument, place) if isinstance(leaf, Tensor) else leaf
            for place, (leaf, argument) in enumerate(zip(leaves, self._arguments, strict=True))
        ]
        return pytree.tree_unflatten(changed, spec)


def _reversed(tensor: Tensor) -> Tensor:
    # flip knows fewer types
    backwards = torch.arange(tensor.numel() - 1, -1, -1, device=tensor.device)
    return tensor.reshape(-1)[backwards].reshape(tensor.shape)
