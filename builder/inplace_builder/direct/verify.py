"""Verification: a directly called engine, loaded from its files, beside the module it was built from."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from inplace.direct import Engine
from inplace.dtypes import Dtype
from torch import Tensor
from torch.utils import _pytree as pytree

from inplace_builder.errors import BuildError, brief
from inplace_builder.verify import TOLERANCE, same_bits

CALLS = 4
"""Calls that an engine is verified with; from the third on the floating-point inputs are the example's in another order."""


def verify_direct(engine: Engine, reference: torch.nn.Module, arguments: Any) -> dict[str, str]:
    """Call engine and module side by side, each where it runs, on its own copy of the states.

    Args:
        engine: as it was loaded from its files.
        reference: a copy of the module, whose buffers change as the engine's states do.
        arguments: ``(args, kwargs)`` of the build; not changed.

    Returns:
        What to record of it.

    Raises:
        BuildError: an output or a state differs by more than the tolerance of its type, an input changed, or a state moved.
    """
    theirs = deepcopy(arguments)
    mine = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(engine.manifest.engine.device), deepcopy(arguments))
    kinds = [argument.kind for argument in engine.manifest.call.arguments]
    buffers = dict(reference.named_buffers(remove_duplicate=False))
    worst, exact = 0.0, True

    def same(title: str, found: object, expected: object) -> None:
        nonlocal worst, exact
        if isinstance(found, Tensor) and isinstance(expected, Tensor):
            error = _difference(title, found.cpu(), expected.cpu(), engine.manifest.engine.dtype)
            worst, exact = max(worst, error), exact and error == 0
        elif type(found) is not type(expected) or found != expected:
            raise BuildError(f"{title} is {found!r}, the module's is {expected!r}; the engine is not written")

    for index in range(CALLS):
        if index == 2:
            theirs, mine = (_reordered(tree, kinds) for tree in (theirs, mine))
        before = pytree.tree_leaves(deepcopy(mine))
        try:
            with torch.no_grad():
                expected = pytree.tree_leaves(reference(*theirs[0], **theirs[1]))
        except Exception as error:
            raise BuildError(f"the module cannot be called {index + 1} times with its example inputs: {brief(error)}") from error
        addresses = {source: tensor.data_ptr() for source, tensor in engine.states.items()}
        try:
            found = pytree.tree_leaves(engine(*mine[0], **mine[1]))
        except Exception as error:  # the module took the same arguments
            raise BuildError(f"the engine fails where the module does not ({brief(error)}); it is not written") from error
        if len(found) != len(expected):
            raise BuildError(f"the engine returns {len(found)} outputs, the module {len(expected)}; it is not written")
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(f"output {place} of call {index}", one, other)
        for kind, argument, one, other, old in zip(
            kinds, engine.manifest.call.arguments, pytree.tree_leaves(mine), pytree.tree_leaves(theirs), before, strict=True
        ):
            if kind == "state":
                same(f"state {argument.where} after call {index}", one, other)
            elif isinstance(one, Tensor) and not same_bits(one.reshape(-1), old.reshape(-1)):
                raise BuildError(f"the engine changed its input {argument.where}; it is not written")
        for source, tensor in engine.states.items():
            same(f"state {source} after call {index}", tensor, buffers[source])
        if addresses != {source: tensor.data_ptr() for source, tensor in engine.states.items()}:
            raise BuildError("the engine moved one of its states; it is not written")
    return {"verified_calls": str(CALLS), "verified_error": "0, bit for bit" if exact else f"{worst:.1e}"}


def _reordered(tree: Any, kinds: Sequence[str]) -> Any:
    """Other values that surely are as valid: the floating-point inputs back to front. Integers may be positions, so they stay."""
    leaves, spec = pytree.tree_flatten(tree)
    flip: Callable[[Tensor], Tensor] = lambda tensor: tensor.flip(tuple(range(tensor.dim())))  # noqa: E731
    return pytree.tree_unflatten(
        [
            flip(x) if kind == "tensor" and isinstance(x, Tensor) and x.is_floating_point() else x
            for x, kind in zip(leaves, kinds, strict=True)
        ],
        spec,
    )


def _difference(title: str, found: Tensor, expected: Tensor, weights: Dtype) -> float:
    """0 if equal bit for bit, else the relative error; BuildError if that is too large."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise BuildError(
            f"{title} is {list(found.shape)} {found.dtype}, the module's {list(expected.shape)} {expected.dtype}; it is not written"
        )
    if same_bits(found.reshape(-1), expected.reshape(-1)):
        return 0.0
    equal = (found == expected) | ((found != found) & (expected != expected))  # noqa: PLR0124  NaN in the same places
    wide = torch.float64 if found.dtype == torch.float64 else torch.float32
    one, other = (tensor.to(wide).masked_fill(equal & ~tensor.isfinite(), 0) for tensor in (found, expected))
    error = float((one - other).norm() / other.norm().clamp(min=1e-12))
    tolerance = max(TOLERANCE.get(Dtype.of(found.dtype), 0.0), TOLERANCE.get(weights, 0.0) if found.is_floating_point() else 0.0)
    if not error <= tolerance:
        raise BuildError(f"{title} differs from the module by {error:.1e}, more than {tolerance:.0e}; the engine is not written")
    return error
