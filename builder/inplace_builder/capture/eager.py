"""A user's module as PyTorch runs it, the reference of an engine with rows of it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from inplace_builder.errors import BuildError, brief


class EagerModule:
    """A module that can be called for one sequence after the other, each from its first request.

    Args:
        module: the module, which writes its states in place.
        arguments: ``(args, kwargs)`` of a call. A state among them begins with its value there.
        places: the place of each input among the leaves of the arguments, by its name.

    Raises:
        BuildError: the module cannot be copied.
    """

    def __init__(self, module: torch.nn.Module, arguments: Any, places: Mapping[str, int]) -> None:
        self._leaves, self._structure = pytree.tree_flatten(arguments)
        self._places = places
        self._fresh = _copied((module, self._leaves))

    def run(self, requests: Sequence[Mapping[str, Tensor]]) -> list[Any]:
        """Call the module for the requests of one sequence.

        Args:
            requests: the inputs of each request, in the module's own shapes.

        Returns:
            The leaves of what the last call returned.

        Raises:
            BuildError: the module fails.
        """
        module, leaves = _copied(self._fresh)
        returned: Any = None
        for index, request in enumerate(requests):
            for name, given in request.items():
                leaves[self._places[name]] = given
            args, kwargs = pytree.tree_unflatten(leaves, self._structure)
            try:
                with torch.no_grad():
                    returned = module(*args, **kwargs)
            except Exception as error:  # whatever a user's module raises
                raise BuildError(
                    f"the module itself fails at request {index + 1} of a sequence: {brief(error)}"
                ) from error
        results = pytree.tree_leaves(returned)
        if any(isinstance(result, FakeTensor) for result in results):
            raise BuildError(
                "the module keeps a tensor outside itself, in a closure or a global variable: keep "
                "it in a buffer (register_buffer)"
            )
        return results


def _copied(of: Any) -> Any:
    """A copy of a module and tensors, over the same parameters.

    Tensors that autograd computed, such as the weights that `torch.nn.utils.weight_norm` keeps, are
    copied without their history.
    """
    memo: dict[int, Any] = {}
    for module in [each for each in pytree.tree_leaves(of) if isinstance(each, torch.nn.Module)]:
        memo |= {id(parameter): parameter for parameter in module.parameters()}
        for part in module.modules():
            for value in vars(part).values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(of, memo)
    except Exception as error:  # whatever a user's module raises
        raise BuildError(
            f"the module cannot be copied, which verification needs to call it for several "
            f"sequences: {brief(error)}"
        ) from error
