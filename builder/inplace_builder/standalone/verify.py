"""Verification: a directly called engine, loaded from its files, beside the module it was built from."""

from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from inplace.schema.dtypes import Dtype
from inplace.schema.standalone import Argument, StandaloneManifest
from inplace.standalone import Engine
from torch import Tensor
from torch.utils import _pytree as pytree

from inplace_builder.compare import TOLERANCE, is_inexact, same_bits
from inplace_builder.errors import BuildError, brief


def verify_standalone(
    engine: Engine,
    reference: torch.nn.Module,
    arguments: Any,
    assume_consecutive: Collection[str] = (),
) -> dict[str, str]:
    """Call engine and module side by side, each where it runs, on its own copy of the states.

    Twice with the example's arguments, twice with its floating-point inputs in another order, then with other integers, which may be
    positions: all one higher, and each any number below the shortest state; and with states whose extents vary one longer. These only
    where the module itself takes them.

    Args:
        engine: as it was loaded from its files.
        reference: a copy of the module, whose buffers change as the engine's states do.
        arguments: ``(args, kwargs)`` of the build; not changed.
        assume_consecutive: inputs whose numbers stay as they are, consecutive ones.

    Returns:
        What to record of it.

    Raises:
        BuildError: an output or a state differs by more than the tolerance of its type, an input changed, or a state moved.
    """
    theirs = deepcopy(arguments)
    mine = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to(engine.manifest.engine.device), deepcopy(arguments)
    )
    kinds = [argument.kind for argument in engine.manifest.call.arguments]
    structure = pytree.tree_structure(arguments)
    worst, exact, calls = 0.0, True, 0

    def same(title: str, found: object, expected: object) -> None:
        nonlocal worst, exact
        if isinstance(found, Tensor) and isinstance(expected, Tensor):
            error = _difference(title, found.cpu(), expected.cpu(), engine.manifest.engine.dtype)
            worst, exact = max(worst, error), exact and error == 0
        elif type(found) is not type(expected) or found != expected:
            raise BuildError(
                f"{title} is {found!r}, the module's is {expected!r}; the engine is not written"
            )

    for index, (asked, given) in enumerate(
        _calls(_Changes(engine.manifest, assume_consecutive), reference, theirs, mine)
    ):
        calls += 1
        before = pytree.tree_leaves(deepcopy(given))
        try:
            with torch.no_grad():
                expected = pytree.tree_leaves(reference(*asked[0], **asked[1]))
        except Exception as error:
            raise BuildError(
                f"the module cannot be called {index + 1} times with its example inputs: {brief(error)}"
            ) from error
        if pytree.tree_structure(asked) != structure:
            raise BuildError(
                "the module adds to its arguments, or takes something away; an engine only writes the tensors in them"
            )
        addresses = {source: tensor.data_ptr() for source, tensor in engine.states.items()}
        try:
            found = pytree.tree_leaves(engine(*given[0], **given[1]))
        except Exception as error:  # the module took the same arguments
            raise BuildError(
                f"the engine fails where the module does not ({brief(error)}); it is not written"
            ) from error
        if len(found) != len(expected):
            raise BuildError(
                f"the engine returns {len(found)} outputs, the module {len(expected)}; it is not written"
            )
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(f"output {place} of call {index}", one, other)
        for kind, argument, one, other, old in zip(
            kinds,
            engine.manifest.call.arguments,
            pytree.tree_leaves(given),
            pytree.tree_leaves(asked),
            before,
            strict=True,
        ):
            if kind == "state":
                same(f"state {argument.where} after call {index}", one, other)
            elif isinstance(one, Tensor) and not same_bits(one.reshape(-1), old.reshape(-1)):
                raise BuildError(
                    f"the engine changed its input {argument.where}; it is not written"
                )
        for source, tensor in engine.states.items():
            same(f"state {source} after call {index}", tensor, _held(reference, source))
        if addresses != {source: tensor.data_ptr() for source, tensor in engine.states.items()}:
            raise BuildError("the engine moved one of its states; it is not written")
    return {
        "verified_calls": str(calls),
        "verified_error": "0, bit for bit" if exact else f"{worst:.1e}",
    }


def _held(module: torch.nn.Module, source: str) -> Tensor:
    """A tensor that the module holds, as it is now: a buffer may have been assigned anew."""
    found: Any = module
    for name in source.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, Tensor):
        raise BuildError(
            f"the module writes {source}, which is none of its buffers: register it with register_buffer"
        )
    return found


def _calls(
    changes: "_Changes", reference: torch.nn.Module, theirs: Any, mine: Any
) -> Iterator[tuple[Any, Any]]:
    """The arguments of each call, for the module and for the engine."""
    yield from [(theirs, mine)] * 2
    theirs, mine = changes.reordered(theirs), changes.reordered(mine)
    yield from [(theirs, mine)] * 2
    for change in (
        changes.raised,
        changes.elsewhere,
        *([changes.longer] if changes.varies else []),
    ):
        changed = change(theirs)
        if _takes(reference, changed):
            yield changed, change(mine)


def _takes(reference: torch.nn.Module, arguments: Any) -> bool:
    """Whether the module can be called with these arguments; tried on copies."""
    args, kwargs = deepcopy(arguments)
    try:
        with torch.no_grad():
            deepcopy(reference)(*args, **kwargs)
    except Exception:  # whatever it says of them: they are not what it was made for
        return False
    return True


class _Changes:
    """Other values of the arguments' tensors, states apart: the same for the module's and for the engine's.

    Args:
        manifest: of the engine.
        assume_consecutive: inputs whose integers stay.
    """

    def __init__(self, manifest: StandaloneManifest, assume_consecutive: Collection[str]) -> None:
        self._free = [
            argument.kind == "tensor" and argument.name not in assume_consecutive
            for argument in manifest.call.arguments
        ]
        self._arguments, self._ranges = manifest.call.arguments, manifest.call.ranges
        self._tensors = [argument.kind == "tensor" for argument in manifest.call.arguments]
        self._shortest = min(
            (
                extent
                for state in manifest.states
                for extent in state.view_shape
                if isinstance(extent, int) and extent > 1
            ),
            default=1,
        )

    @property
    def varies(self) -> bool:
        """Whether a call chooses an extent of a state."""
        return any(
            argument.kind == "state" and isinstance(extent, str)
            for argument in self._arguments
            for extent in argument.shape
        )

    def reordered(self, tree: Any) -> Any:
        """The floating-point ones back to front."""
        return self._changed(tree, self._tensors, is_inexact, lambda tensor, _: _backwards(tensor))

    def raised(self, tree: Any) -> Any:
        """All integers one higher."""
        return self._changed(tree, self._free, _is_integer, lambda tensor, _: tensor + 1)

    def elsewhere(self, tree: Any) -> Any:
        """Each integer any number below the shortest axis of the states."""

        def drawn(tensor: Tensor, place: int) -> Tensor:
            numbers = torch.randint(
                self._shortest, tensor.shape, generator=torch.Generator().manual_seed(place)
            )
            return numbers.to(tensor.dtype).to(tensor.device)

        return self._changed(tree, self._free, _is_integer, drawn)

    def longer(self, tree: Any) -> Any:
        """States whose extents vary, one longer there, as far as they may be; what is new holds zeros."""
        leaves, spec = pytree.tree_flatten(tree)
        return pytree.tree_unflatten(
            [self._longer(leaf, one) for leaf, one in zip(leaves, self._arguments, strict=True)],
            spec,
        )

    def _longer(self, leaf: Any, argument: Argument) -> Any:
        if argument.kind != "state" or all(isinstance(extent, int) for extent in argument.shape):
            return leaf
        limits = (
            self._ranges.get(extent, (None, None))[1] if isinstance(extent, str) else held
            for extent, held in zip(argument.shape, leaf.shape, strict=True)
        )
        extents = [
            held + (limit is None or held < limit)
            for held, limit in zip(leaf.shape, limits, strict=True)
        ]
        found = torch.zeros(extents, dtype=leaf.dtype, device=leaf.device)
        found[tuple(slice(extent) for extent in leaf.shape)] = leaf
        return found

    def _changed(
        self,
        tree: Any,
        which: Sequence[bool],
        kind: Callable[[Tensor], bool],
        change: Callable[[Tensor, int], Tensor],
    ) -> Any:
        leaves, spec = pytree.tree_flatten(tree)
        return pytree.tree_unflatten(
            [
                change(leaf, place) if free and isinstance(leaf, Tensor) and kind(leaf) else leaf
                for place, (leaf, free) in enumerate(zip(leaves, which, strict=True))
            ],
            spec,
        )


def _backwards(tensor: Tensor) -> Tensor:
    backwards = torch.arange(
        tensor.numel() - 1, -1, -1, device=tensor.device
    )  # flip knows fewer types
    return tensor.reshape(-1)[backwards].reshape(tensor.shape)


def _is_integer(tensor: Tensor) -> bool:
    """Whether it may be positions: PyTorch does not compute with the other types of integers."""
    return tensor.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def _difference(title: str, found: Tensor, expected: Tensor, weights: Dtype) -> float:
    """0 if equal bit for bit, else the relative error; BuildError if that is too large."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise BuildError(
            f"{title} is {list(found.shape)} {found.dtype}, the module's {list(expected.shape)} {expected.dtype}; it is not written"
        )
    if same_bits(found.reshape(-1), expected.reshape(-1)):
        return 0.0
    equal = (found == expected) | ((found != found) & (expected != expected))  # noqa: PLR0124  NaN in the same places
    wide = torch.promote_types(found.dtype, torch.float32) if found.itemsize > 1 else torch.float32
    one, other = (tensor.to(wide) for tensor in (found, expected))
    one, other = (tensor.masked_fill(equal & ~tensor.isfinite(), 0) for tensor in (one, other))
    error = float((one - other).norm() / other.norm().clamp(min=1e-12))
    tolerance = max(
        TOLERANCE.get(Dtype.of(found.dtype), 0.0),
        TOLERANCE.get(weights, 0.0) if is_inexact(found) else 0.0,
    )
    if not error <= tolerance:
        raise BuildError(
            f"{title} differs from the module by {error:.1e}, more than {tolerance:.0e}; the engine is not written"
        )
    return error
