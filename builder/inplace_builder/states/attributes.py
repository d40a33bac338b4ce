"""What a user's module holds: attributes of its own, of its parts and of their objects."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from inplace_builder.compare import same_bits
from inplace_builder.errors import BuildError

_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes of every module that are PyTorch's."""

MAX_DEPTH = 3
"""Objects, lists and dictionaries between a module and an attribute with a tensor."""


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module, its parts and their objects that hold tensors or numbers.

    Returns:
        Their values by their path: ``encoder.hidden``, ``encoder.cache.keys``, ``caches.0.keys``.
    """
    attributes: dict[str, Any] = {}
    seen: set[int] = set()

    def collect(path: str, value: Any, depth: int) -> None:
        leaves = pytree.tree_leaves(value)
        if isinstance(value, int | float) or any(isinstance(x, Tensor) for x in leaves):
            attributes[path] = value
        elif depth < MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            for name, held in _held(value):
                collect(f"{path}.{name}", held, depth + 1)

    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _OWN_ATTRIBUTES and not isinstance(value, nn.Module):
                collect(f"{prefix}.{name}" if prefix else name, value, 0)
    return attributes


def holder_of(module: nn.Module, path: str) -> Any:
    """The object at a path, which an attribute belongs to; None if there is none."""
    holder: Any = module
    for name in path.split(".") if path else ():
        if isinstance(holder, nn.Module) and name in holder._modules:
            holder = holder._modules[name]
        else:
            held = vars(holder) if isinstance(holder, nn.Module) else dict(_held(holder))
            holder = held.get(name)
    return holder


def _held(value: Any) -> list[tuple[str, Any]]:
    """What an object, a list or a dictionary holds, by name."""
    if isinstance(value, list | tuple):
        return [(str(place), each) for place, each in enumerate(value)]
    if isinstance(value, dict):
        return [(key, each) for key, each in value.items() if isinstance(key, str)]
    return [*_attributes(value).items()]


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object that may be a module's own; none of PyTorch's objects."""
    known = isinstance(value, nn.Module | ModuleType | type | torch.dtype) or callable(value)
    if known or type(value).__module__.partition(".")[0] == "torch":
        return {}
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    return attributes


class KeptValues:
    """The values of a module's buffers and attributes, of its parts and of their objects.

    Tensors, lists and objects stay what they are, so whatever refers to them has their values too.

    Args:
        module: the module.
        parameters: its parameters too.
    """

    def __init__(self, module: nn.Module, *, parameters: bool = False) -> None:
        self._parameters = parameters
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._seen: set[int] = set()
        self._keep(module, 0)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Give the module these values, and again when the context ends."""
        self._restore()
        try:
            yield
        finally:
            self._restore()

    def _keep(self, value: Any, depth: int) -> None:
        """Keep the value of a tensor or a container, and of what it holds."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if self._parameters or not isinstance(value, nn.Parameter):
                self._keep_tensor(value)
        elif isinstance(value, dict | list | deque | set | tuple):
            if not isinstance(value, tuple):
                self._containers.append((value, _content(value)))
            for each in _content(value):
                self._keep(each, depth)
        elif isinstance(value, nn.Module):
            self._keep(vars(value), 0)
        elif depth < MAX_DEPTH and (attributes := _attributes(value)):
            self._keep(attributes, depth + 1)

    def _keep_tensor(self, tensor: Tensor) -> None:
        is_plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        if is_plain and tensor.layout is torch.strided and tensor.device.type != "meta":
            self._tensors.append((tensor, tensor.detach().clone()))

    def _restore(self) -> None:
        for container, content in self._containers:
            if [*map(id, _content(container))] != [*map(id, content)]:
                container.clear()
                half = len(content) // 2
                if isinstance(container, dict):
                    container.update(zip(content[:half], content[half:], strict=True))
                elif isinstance(container, set):
                    container.update(content)
                else:
                    container.extend(content)
        for tensor, value in self._tensors:  # one may be written by way of ``data`` too
            if not same_bits(tensor.detach().reshape(-1), value.reshape(-1)):
                with torch.no_grad():
                    tensor.copy_(value)


def _content(container: Any) -> list[Any]:
    """What a container holds; of a dictionary the keys, then the values."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def refuse_fake(returned: Iterable[Any]) -> None:
    """BuildError if a module returns what its export has left where no module keeps tensors."""
    if any(isinstance(each, FakeTensor) for each in returned):
        raise BuildError(
            "the module keeps a tensor outside itself, in a closure or a global variable: keep it "
            "in a buffer (register_buffer)"
        )
