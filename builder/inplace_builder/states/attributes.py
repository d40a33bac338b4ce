"""Attributes of modules and of Python objects: what they hold, by name, and keeping it as it is."""

from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inplace_builder.compare import same_bits
from inplace_builder.errors import BuildError

# What a module holds: attributes of its own, of its parts and of their objects.


_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes of every module that are PyTorch's."""

_PLAIN = (Tensor, bool, int, float, str, type(None))
"""What a container may hold to be one attribute; else each item of it is one."""

MAX_DEPTH = 5
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
        has_tensors = any(isinstance(x, Tensor) for x in leaves)
        holds_others = any(not isinstance(x, _PLAIN) for x in leaves)
        if isinstance(value, int | float) or (has_tensors and not holds_others):
            is_shared = isinstance(value, dict | list | deque) and id(value) in seen
            if not is_shared:  # one that several parts have is a state once
                attributes[path] = value
                seen.add(id(value))
        elif depth < MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            for name, part in _contents(value):
                collect(f"{path}.{name}", part, depth + 1)

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
            parts = vars(holder) if isinstance(holder, nn.Module) else dict(_contents(holder))
            holder = parts.get(name)
    return holder


def _contents(value: Any) -> list[tuple[str, Any]]:
    """What an object, a list or a dictionary holds, by name."""
    if isinstance(value, list | tuple):
        return [(str(place), each) for place, each in enumerate(value)]
    if isinstance(value, dict):
        return [*attribute_mapping(value).items()]
    return [*attributes_of_object(value).items()]


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
        elif isinstance(value, MutableMapping | list | deque | set | tuple):
            if not isinstance(value, tuple):
                self._containers.append((value, _content(value)))
            for each in _content(value):
                self._keep(each, depth)
        elif isinstance(value, nn.Module):
            self._keep(vars(value), 0)
        elif depth < MAX_DEPTH and (attributes := attributes_of_object(value)):
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
                if isinstance(container, MutableMapping):
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
    if isinstance(container, MutableMapping):
        return [*container, *container.values()]
    return [*container]


# What a Python object holds: attributes of its own and in slots.


def attributes_of_object(value: Any) -> MutableMapping[str, Any]:
    """The attributes of an object that may be a module's own; none of PyTorch's objects."""
    known = isinstance(value, nn.Module | ModuleType | type | torch.dtype) or callable(value)
    if known or type(value).__module__.partition(".")[0] == "torch":
        return {}
    return _own_attributes(value)


def set_attribute(holder: Any, name: str, value: Any) -> None:
    """Set an attribute of an object, of a frozen dataclass too."""
    object.__setattr__(holder, name, value)


def attribute_mapping(holder: Any) -> MutableMapping[str, Any]:
    """What an object, a list or a dictionary holds, to be read and set by name."""
    if isinstance(holder, dict):
        return _Keys(holder)
    if isinstance(holder, list | tuple):
        return _Items(holder)
    return _own_attributes(holder)


def _own_attributes(holder: Any) -> MutableMapping[str, Any]:
    """The dictionary of an object itself; a view of one that has slots."""
    slots = _Slots(holder)
    attributes: MutableMapping[str, Any] = getattr(holder, "__dict__", {})
    return slots if [*slots.names()] else attributes


class _Keys(MutableMapping[str, Any]):
    """The values of a dictionary by its keys that are texts or, as texts, integers."""

    def __init__(self, items: dict[Any, Any]) -> None:
        self._items = items

    def _keys(self) -> dict[str, Any]:
        integers = {str(key): key for key in self._items if type(key) is int}
        return integers | {key: key for key in self._items if isinstance(key, str)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __getitem__(self, name: str) -> Any:
        return self._items[self._keys()[name]]

    def __setitem__(self, name: str, value: Any) -> None:
        self._items[self._keys().get(name, name)] = value

    def __delitem__(self, name: str) -> None:
        del self._items[self._keys()[name]]


class _Items(MutableMapping[str, Any]):
    """The items of a list by their places."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[str]:
        return map(str, range(len(self._items)))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, name: str) -> Any:
        return self._items[int(name)]

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(self._items, tuple):
            raise BuildError(
                f"a tuple holds a tensor that changes, {list(value.shape)}, beside other objects: "
                f"keep them in a list"
            )
        self._items[int(name)] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("the places of a list do not change")


class _Slots(MutableMapping[str, Any]):
    """The attributes of an object that keeps some in ``__slots__``."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder

    def names(self) -> Iterator[str]:
        """The slots, also empty ones."""
        for each in type(self._holder).__mro__:
            if each.__module__ == "builtins":
                continue
            names = vars(each).get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if name not in ("__dict__", "__weakref__"):
                    yield name

    def __iter__(self) -> Iterator[str]:
        yield from getattr(self._holder, "__dict__", {})
        yield from (name for name in self.names() if hasattr(self._holder, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        if name not in [*self]:
            raise KeyError(name)
        return getattr(self._holder, name)

    def __setitem__(self, name: str, value: Any) -> None:
        set_attribute(self._holder, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._holder, name)
