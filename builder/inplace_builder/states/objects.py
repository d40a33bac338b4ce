"""Objects that hold tensors, as arguments of a module: caches of any class.

torch.export takes tensors in lists, dictionaries and classes that are registered with it. Any other
object becomes its attributes (`inplace.schema.standalone.Attributes`), and is made again of them
where the module is called. A namedtuple is such an object too.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any

import torch
from inplace.schema.standalone import Attributes
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inplace_builder.errors import BuildError

_CONSTANTS = (bool, int, float, str, type(None))


class ObjectArguments:
    """The arguments of a call, of which some are objects.

    Attributes:
        args, kwargs: with the attributes of objects in their place; the same where there is none.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Raises:
        BuildError: an object holds a module, which would be made a constant.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._originals = (tuple(args), dict(kwargs))
        self.args, self.kwargs = _opened(self._originals, "", set())

    @property
    def has_objects(self) -> bool:
        """Whether any of them is an object."""
        nodes = [pytree.tree_structure((self.args, self.kwargs))]
        while nodes:
            node = nodes.pop()
            if node.type is Attributes:
                return True
            nodes.extend(node.children())
        return False

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function with objects made of their attributes.

        A tensor that it puts in another's place is copied into that one.

        Args:
            function: takes the objects.
            args: as `args`.
            kwargs: as `kwargs`.

        Raises:
            BuildError: the function gives an object another number, or a tensor where it had none.
        """
        closed = _closed(self._originals, (args, kwargs), {})
        returned = function(*closed[0], **closed[1])
        replaced: list[tuple[Tensor, Tensor]] = []
        _compare(self._originals, (args, kwargs), closed, "", set(), replaced)
        fresh = [new.clone() for _, new in replaced]
        for (old, _), new in zip(replaced, fresh, strict=True):
            old.copy_(new)
        return returned


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def _is_registered(value: Any) -> bool:
    """Whether PyTorch's trees take a value apart, and can be written with it."""
    if _is_namedtuple(value):
        return type(value) in pytree.SUPPORTED_SERIALIZED_TYPES
    return type(value) in pytree.SUPPORTED_NODES


def _fields(value: Any) -> dict[str, Any]:
    """The attributes of an object that is no node of PyTorch's trees."""
    if _is_namedtuple(value):
        return dict(zip(type(value)._fields, value, strict=True))
    if isinstance(value, list | dict | tuple | set):
        return {}  # of a class of the user's: its items would be lost
    return dict(attributes_of_object(value))


def _parts(value: Any) -> tuple[list[Any], Any] | None:
    """The children of a node of PyTorch's trees; None if it is none."""
    if not _is_registered(value):
        return None
    children, context = pytree.SUPPORTED_NODES[_node_type(value)].flatten_fn(value)
    return list(children), context


def _node_type(value: Any) -> Any:
    return type(value) if type(value) in pytree.SUPPORTED_NODES else collections.namedtuple


def _opened(value: Any, path: str, seen: set[int]) -> Any:
    """A value with the attributes of objects in their place."""
    if isinstance(value, Tensor | bool | int | float | str | None):
        return value
    if (parts := _parts(value)) is not None:
        children = [_opened(child, path, seen) for child in parts[0]]
        if all(new is old for new, old in zip(children, parts[0], strict=True)):
            return value
        return pytree.SUPPORTED_NODES[_node_type(value)].unflatten_fn(children, parts[1])
    if id(value) in seen or not _has_tensors(value, set()):
        return value
    seen.add(id(value))
    held: dict[str, Any] = {}
    for name, each in _fields(value).items():
        if isinstance(each, nn.Module):
            raise BuildError(
                f"an argument of the class {type(value).__name__} holds a module, {name}: keep it "
                f"in the module that is built"
            )
        if _is_kept(each, seen):
            held[name] = _opened(each, f"{path}.{name}", seen)
    return Attributes(**held)


def _is_kept(value: Any, seen: set[int]) -> bool:
    """Whether an attribute is a part of the arguments: it holds tensors, or is a number or text."""
    if isinstance(value, Tensor | bool | int | float | str | None):
        return True
    if id(value) in seen:
        return False  # the object that holds it, which is there already
    if (parts := _parts(value)) is not None:
        return all(_is_kept(each, seen) for each in parts[0])
    return _has_tensors(value, set())


def _has_tensors(value: Any, seen: set[int]) -> bool:
    """Whether a value holds a tensor, in objects of any depth."""
    if isinstance(value, Tensor):
        return True
    if id(value) in seen or isinstance(value, nn.Module):
        return False
    seen.add(id(value))
    parts = _parts(value)
    children = [*_fields(value).values()] if parts is None else parts[0]
    return any(_has_tensors(child, seen) for child in children)


def _closed(original: Any, given: Any, made: dict[int, Any]) -> Any:
    """A value like the original, made of what is given in the place of its attributes."""
    if not isinstance(given, Attributes):
        parts, new = _parts(original), _parts(given)
        if parts is None or new is None or len(parts[0]) != len(new[0]):
            return given
        pairs = zip(parts[0], new[0], strict=True)
        children = [_closed(old, each, made) for old, each in pairs]
        if all(child is each for child, each in zip(children, new[0], strict=True)):
            return given
        return pytree.SUPPORTED_NODES[_node_type(given)].unflatten_fn(children, new[1])
    fields = _fields(original)
    if _is_namedtuple(original):
        values = {
            name: _closed(each, getattr(given, name), made) if hasattr(given, name) else each
            for name, each in fields.items()
        }
        return type(original)(**values)
    if id(original) in made:
        return made[id(original)]
    kind: Any = type(original)
    made[id(original)] = copied = kind.__new__(kind)
    for name, each in fields.items():
        if hasattr(given, name):
            each = _closed(each, getattr(given, name), made)
        elif id(each) in made:  # an object that refers back to what holds it
            each = made[id(each)]
        set_attribute(copied, name, each)
    return copied


def _compare(
    original: Any,
    given: Any,
    after: Any,
    path: str,
    seen: set[int],
    replaced: list[tuple[Tensor, Tensor]],
) -> None:
    """Note tensors that a call has put into objects in the place of others."""
    if not isinstance(given, Attributes):
        parts, new, last = _parts(original), _parts(given), _parts(after)
        if parts is not None and new is not None and last is not None:
            names = [f"{path}[{place}]" for place in range(len(new[0]))]
            for each in zip(parts[0], new[0], last[0], names, strict=False):
                _compare(*each, seen, replaced)
        return
    if id(original) in seen:
        return
    seen.add(id(original))
    title = f"{path}.{{}} of the argument's class {type(original).__name__}".lstrip(".")
    fields = _fields(after)
    for name, value in fields.items():
        old = getattr(given, name, None)
        if isinstance(value, Tensor) and isinstance(old, Tensor):
            if value is not old:
                _check_kept(title.format(name), old, value)
                replaced.append((old, value))
        elif isinstance(value, Tensor):
            raise BuildError(
                f"{title.format(name)} is {old!r} before the first step and "
                f"{list(value.shape)} {value.dtype} after it: make the tensor before the build "
                f"(a StaticCache does in early_initialization)"
            )
        elif hasattr(given, name) and isinstance(old, _CONSTANTS):
            if type(value) is not type(old) or value != old:
                raise BuildError(
                    f"{title.format(name)} is a Python value that a step changes, from {old!r} to "
                    f"{value!r}: a graph holds it fast; make it a tensor"
                )
        elif hasattr(given, name):
            child = _fields(original)[name]
            _compare(child, old, value, f"{path}.{name}", seen, replaced)


def _check_kept(title: str, old: Tensor, new: Tensor) -> None:
    if (old.dtype, old.dim()) != (new.dtype, new.dim()) or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(old.shape, new.shape, strict=True)
    ):
        raise BuildError(
            f"{title} of {list(old.shape)} {old.dtype} becomes {list(new.shape)} {new.dtype}: a "
            f"state is updated in its own memory, so begin with a tensor as large as it gets"
        )


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
        return holder
    if isinstance(holder, list | tuple):
        return _Items(holder)
    return _own_attributes(holder)


def _own_attributes(holder: Any) -> MutableMapping[str, Any]:
    """The dictionary of an object itself; a view of one that has slots."""
    slots = _Slots(holder)
    attributes: MutableMapping[str, Any] = getattr(holder, "__dict__", {})
    return slots if [*slots.names()] else attributes


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
