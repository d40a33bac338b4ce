"""A user's module as PyTorch runs it, the reference of an engine with rows of it."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inplace_builder.errors import BuildError, brief
from inplace_builder.states.adapt import refuse_fake, states_only
from inplace_builder.states.attributes import KeptValues
from inplace_builder.states.objects import ObjectArguments


class EagerModule:
    """A module that can be called for one sequence after the other, each from its first request.

    It is the user's module itself and no copy: hooks and functions that it keeps may refer to it.
    Its buffers and attributes are as they were after each sequence.

    Args:
        module: the module.
        arguments: ``(args, kwargs)`` of a call. A state among them begins with its value there.
        places: the place of each input among the leaves of the arguments, by its name.
        pairs: the place of the new value of a state among what the module returns, by the place of
            the state among the leaves of the arguments.
        objects: makes the objects that the module takes of the arguments; None if it takes none.
    """

    def __init__(
        self,
        module: nn.Module,
        arguments: Any,
        places: Mapping[str, int],
        pairs: Mapping[int, int],
        objects: ObjectArguments | None = None,
    ) -> None:
        leaves, self._structure = pytree.tree_flatten(arguments)
        self._leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self._module, self._places, self._pairs = module, places, pairs
        self._fresh, self._objects = KeptValues(module), objects

    def run(self, requests: Sequence[Mapping[str, Tensor]]) -> list[Any]:
        """Call the module for the requests of one sequence.

        Args:
            requests: the inputs of each request, in the module's own shapes.

        Returns:
            The leaves of what the last call returned, without new values of states.

        Raises:
            BuildError: the module fails.
        """
        leaves, returned = deepcopy(self._leaves), list[Any]()
        with self._fresh.kept():
            for index, request in enumerate(requests):
                for name, given in request.items():
                    leaves[self._places[name]] = given.clone()  # a module may write its inputs
                args, kwargs = pytree.tree_unflatten(leaves, self._structure)
                try:
                    with torch.no_grad():
                        returned = pytree.tree_leaves(self._call(args, kwargs))
                except Exception as error:  # whatever a user's module raises
                    raise BuildError(
                        f"the module itself fails at request {index + 1} of a sequence: "
                        f"{brief(error)}"
                    ) from error
                for place, of in self._pairs.items():
                    leaves[place] = returned[of]
            refuse_fake(returned)
            states = states_only(self._pairs, returned)
            kept = [leaf for place, leaf in enumerate(returned) if place not in states]
            return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in kept]

    def _call(self, args: Any, kwargs: Any) -> Any:
        if self._objects is None:
            return self._module(*args, **kwargs)
        return self._objects.call(self._module, args, kwargs)
