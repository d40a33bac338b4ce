"""Objects that hold tensors, as arguments of a module: caches of any class.

torch.export takes tensors in lists, dictionaries and classes that are registered with it. Any other
object becomes its attributes (`inplace.schema.standalone.Attributes`), and is made again of them
where the module is called. A namedtuple is such an object too.
"""

import collections
import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from inplace.schema.standalone import Attributes, holds_objects, same_constant
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from inplace_builder.errors import BuildError
from inplace_builder.states.attributes import attributes_of_object, set_attribute

_CONSTANTS = (bool, int, float, str, type(None))


class ObjectArguments:
    """The arguments of a call, of which some are objects.

    Attributes:
        args, kwargs: with the attributes of objects in their place; the same where there is none.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        names: of the positional arguments, for errors.

    Raises:
        BuildError: an object holds a module, or a tensor where no attribute, list or dictionary
            leads to it, which would be made constants; or it is passed twice.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str] = ()
    ) -> None:
        self._originals = (tuple(args), dict(kwargs))
        places = range(len(names), len(args))
        self._names = [*names[: len(args)], *(f"argument_{place}" for place in places)]
        opening = _Opening()
        self.args = tuple(map(opening.opened, args, self._names))
        self.kwargs = {name: opening.opened(each, name) for name, each in kwargs.items()}
        if self.has_objects:
            _check_reached(self._originals, (self.args, self.kwargs))

    @property
    def has_objects(self) -> bool:
        """Whether any of them is an object."""
        return holds_objects(pytree.tree_structure((self.args, self.kwargs)))

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function with objects made of their attributes.

        A tensor that it puts in another's place is copied into that one.

        Args:
            function: takes the objects.
            args: as `args`.
            kwargs: as `kwargs`.

        Raises:
            BuildError: the function changes an object otherwise: it gives it another number, a
                tensor where it had none or none where it had one, or changes a list's length.
        """
        closed = _closed(self._originals, (args, kwargs), {})
        returned = function(*closed[0], **closed[1])
        changes = _ChangedArguments()
        for place, name in enumerate(self._names):
            changes.compare(self._originals[0][place], args[place], closed[0][place], name)
        for name, given in kwargs.items():
            changes.compare(self._originals[1].get(name), given, closed[1][name], name)
        return write_states(changes.replaced, returned)

    def shapes(self, dynamic_shapes: Any) -> Any:
        """Dynamic shapes as torch.export takes them, a list for the attributes of an object.

        Args:
            dynamic_shapes: those of an object are None, or a dictionary by its attributes.

        Raises:
            BuildError: they name an attribute that the object does not have.
        """
        if dynamic_shapes is None or not self.has_objects:
            return dynamic_shapes
        given = dict(zip(self._names, self.args, strict=True)) | dict(self.kwargs)
        if isinstance(dynamic_shapes, Mapping):
            return {
                name: _shapes(given[name], each, name) if name in given else each
                for name, each in dynamic_shapes.items()
            }
        parts = zip(dynamic_shapes, given.items(), strict=False)
        shapes = [_shapes(value, each, name) for each, (name, value) in parts]
        return type(dynamic_shapes)([*shapes, *dynamic_shapes[len(shapes) :]])


def write_states(pairs: Any, returned: Any) -> Any:
    """Copy new values into states; none is computed from a state that was written already.

    Args:
        pairs: each state, and its new value.
        returned: what the module returned.

    Returns:
        The same, with copies of those of its tensors that were in the memory of a state: a module
        that puts another tensor in a state's place may return the old one.
    """
    changed = [(old, new) for old, new in pairs if old is not new]
    memory = {_storage(old) for old, _ in changed}

    def own(leaf: Any) -> Any:
        is_old = isinstance(leaf, Tensor) and _storage(leaf) in memory
        return leaf.clone() if is_old else leaf

    returned = pytree.tree_map(own, returned) if changed else returned
    many = len(changed) > 1
    fresh = [new.clone() if many or _storage(new) in memory else new for _, new in changed]
    for (old, _), new in zip(changed, fresh, strict=True):
        old.copy_(new)
    return returned


def _storage(tensor: Tensor) -> int:
    """What tensors with common memory have in common, also such without values."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    number: int = tensor.untyped_storage()._cdata
    return number


def _shapes(value: Any, given: Any, path: str) -> Any:
    """The dynamic shapes of one argument."""
    if given is not None and not holds_objects(pytree.tree_structure(value)):
        return given
    if isinstance(value, Attributes):
        names = [*vars(value)]
        if given is not None and not isinstance(given, Mapping):
            raise BuildError(
                f"dynamic_shapes of {path}, which is an object, is {given!r}: give None, or a "
                f"dictionary by its attributes {names}"
            )
        if unknown := sorted(set(given or ()) - set(names)):
            raise BuildError(
                f"dynamic_shapes of {path} names {unknown}; its attributes are {names}"
            )
        each = [(given or {}).get(name) for name in names]
        titles = [f"{path}.{name}" for name in names]
        return [*map(_shapes, vars(value).values(), each, titles)]
    if (parts := _parts(value)) is None:
        return given
    children, context = parts
    if given is None:
        given = [None] * len(children)
    elif isinstance(given, Mapping) and isinstance(value, Mapping):
        given = [given.get(key) for key in value]
    titles = [f"{path}[{place}]" for place in range(len(children))]
    shapes = [*map(_shapes, children, given, titles)]
    is_container = isinstance(value, Mapping | list | tuple | collections.deque)
    return _made_of(value, shapes, context) if is_container else shapes


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


def _made_of(value: Any, children: list[Any], context: Any) -> Any:
    return pytree.SUPPORTED_NODES[_node_type(value)].unflatten_fn(children, context)


def _node_type(value: Any) -> Any:
    return type(value) if type(value) in pytree.SUPPORTED_NODES else collections.namedtuple


def _plain(value: Any) -> Any:
    """A number or text of Python's own type: enums and NumPy have classes of their own."""
    if isinstance(value, bool | None) or type(value) in _CONSTANTS:
        return value
    if isinstance(value, str):
        return "".join(value)
    return int(value) if isinstance(value, int) else float(value)


class _Opening:
    """Takes the objects among the arguments apart."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def opened(self, value: Any, path: str, *, inside: bool = False) -> Any:
        """A value with the attributes of objects in their place.

        Args:
            value: the value.
            path: where it is, for errors.
            inside: it belongs to an object. What cannot be a part of arguments then stays in that
                object, and has an `Attributes` of nothing here.
        """
        if isinstance(value, Tensor | bool | int | float | str | None):
            return _plain(value) if inside and not isinstance(value, Tensor) else value
        if inside and isinstance(value, nn.Module):
            raise BuildError(f"{path} is a module in an argument: keep it in the one that is built")
        if (parts := _parts(value)) is not None:
            children = [
                self.opened(child, f"{path}[{place}]", inside=inside)
                for place, child in enumerate(parts[0])
            ]
            if all(new is old for new, old in zip(children, parts[0], strict=True)):
                return value
            return _made_of(value, children, parts[1])
        if not _has_tensors(value, set()):
            return Attributes() if inside else value
        if id(value) in self._seen:
            raise BuildError(
                f"{path} is an object of the class {type(value).__name__} that the arguments hold "
                f"already: pass it once, as a call may pass two"
            )
        self._seen.add(id(value))
        held: dict[str, Any] = {}
        for name, each in _fields(value).items():
            if isinstance(each, nn.Module):
                raise BuildError(
                    f"an argument of the class {type(value).__name__} holds a module, {name}: keep "
                    f"it in the module that is built"
                )
            if self._is_part(each):
                held[name] = self.opened(each, f"{path}.{name}", inside=True)
        return Attributes(**held)

    def _is_part(self, value: Any) -> bool:
        """Whether an attribute is a part of the arguments: it has tensors, or is a number."""
        if id(value) in self._seen:
            return False  # the object that holds it, which is there already
        leaves = [value] if _parts(value) is None else pytree.tree_leaves(value)
        return all(isinstance(each, _CONSTANTS) for each in leaves) or _has_tensors(value, set())


def _has_tensors(value: Any, seen: set[int]) -> bool:
    """Whether a value holds a tensor or a module, in objects of any depth."""
    if isinstance(value, Tensor | nn.Module):
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    parts = _parts(value)
    children = [*_fields(value).values()] if parts is None else parts[0]
    return any(_has_tensors(child, seen) for child in children)


def _check_reached(originals: Any, opened: Any) -> None:
    """BuildError if objects hold tensors that are not among the leaves of what was made of them."""
    copies: dict[int, Any] = {}
    try:
        copy.deepcopy(originals, copies)
    except Exception:  # of any type: what cannot be copied is left to the export
        return
    leaves = {id(leaf) for leaf in pytree.tree_leaves(opened)}
    for each in copies.get(id(copies), ()):  # deepcopy keeps all that it has copied there
        if isinstance(each, Tensor) and id(each) not in leaves:
            raise BuildError(
                f"an object among the arguments holds a tensor, {_described(each)}, to which no "
                f"attributes, lists and dictionaries lead (of classes of Python's own, and objects "
                f"that are not callable): it would be a constant; keep it in an attribute"
            )


def _copied(value: Any, made: dict[int, Any]) -> Any:
    """A copy of what is not a part of the arguments, so that a call does not change it."""
    try:
        return copy.deepcopy(value, made)
    except Exception:  # of any type: it has a lock, a file or the like
        return value


def _closed(original: Any, given: Any, made: dict[int, Any]) -> Any:
    """A value like the original, made of what is given in the place of its attributes.

    Lists and dictionaries are new ones, so that what a call puts in them is seen.
    """
    if not isinstance(given, Attributes):
        parts, new = _parts(original), _parts(given)
        if parts is not None and new is not None and len(parts[0]) == len(new[0]):
            pairs = zip(parts[0], new[0], strict=True)
            return _made_of(given, [_closed(old, each, made) for old, each in pairs], new[1])
        is_constant = isinstance(original, bool | int | float | str)
        return original if is_constant and same_constant(original, given) else given
    if id(original) in made:
        return made[id(original)]
    if not vars(given):
        return _copied(original, made)
    kind: Any = type(original)
    fields = _fields(original)
    is_tuple = _is_namedtuple(original)
    copied = None if is_tuple else kind.__new__(kind)
    if not is_tuple:
        made[id(original)] = copied
    for name in vars(given):
        fields[name] = _closed(fields[name], getattr(given, name), made)
    for name in fields.keys() - vars(given).keys():
        fields[name] = _copied(fields[name], made)  # also of an object that is made already
    if is_tuple:
        return kind(**fields)
    for name, each in fields.items():
        set_attribute(copied, name, each)
    return copied


class _ChangedArguments:
    """What a call has changed of its arguments.

    Attributes:
        replaced: tensors, and those that the call has put in their place.
    """

    def __init__(self) -> None:
        self.replaced: list[tuple[Tensor, Tensor]] = []
        self._seen: set[int] = set()

    def compare(self, original: Any, given: Any, after: Any, path: str, owner: str = "") -> None:
        """Note what has replaced tensors.

        Args:
            original: the value at capture.
            given: what is in its place in the arguments.
            after: what the call has left there.
            path: where it is.
            owner: the object that has it, in words.

        Raises:
            BuildError: something else has changed.
        """
        title = f"{path}{owner}"
        if isinstance(given, Tensor):
            if not isinstance(after, Tensor):
                raise BuildError(
                    f"{title} is {_described(given)} before a step and {_described(after)} after "
                    f"it: a state stays a tensor; fill it with values that mean the same"
                )
            if after is not given:
                _check_kept(title, given, after)
                self.replaced.append((given, after))
        elif isinstance(given, Attributes):
            self._compare_object(original, given, after, path, title)
        elif (new := _parts(given)) is not None:
            parts, last = _parts(original), _parts(after)
            if last is None or type(after) is not type(given) or not _same_keys(new, last):
                raise BuildError(
                    f"{title} has other entries after a step than before: the module adds to its "
                    f"arguments, or takes something away; an engine only writes the tensors in them"
                )
            olds = parts[0] if parts is not None and len(parts[0]) == len(new[0]) else new[0]
            for place, each in enumerate(zip(olds, new[0], last[0], strict=True)):
                self.compare(*each, f"{path}[{place}]", owner)
        elif isinstance(after, Tensor):
            raise BuildError(
                f"{title} is {original!r} before the first step and {_described(after)} after it: "
                f"make the tensor before the build (a StaticCache does in early_initialization)"
            )
        elif after is not given and not _is_same(original, after):
            raise _changed_value(title, original, after)

    def _compare_object(
        self, original: Any, given: Attributes, after: Any, path: str, title: str
    ) -> None:
        if id(original) in self._seen:
            return
        self._seen.add(id(original))
        if not vars(given):
            _check_unchanged(original, after, title)
            return
        owner = f" of the argument's class {type(original).__name__}"
        before, fields = _fields(original), _fields(after)
        for name, value in fields.items():
            each = f"{path}.{name}"
            if hasattr(given, name):
                self.compare(before[name], getattr(given, name), value, each, owner)
            elif name not in before:
                raise BuildError(
                    f"{each}{owner} is not there before the first step and {_described(value)} "
                    f"after it: make it before the build"
                )
            elif id(before[name]) not in self._seen:
                _check_unchanged(before[name], value, f"{each}{owner}")
        if missing := [name for name in before if name not in fields]:
            raise BuildError(
                f"{path}.{missing[0]}{owner} is not there any more after a step: an engine writes "
                f"tensors, it takes nothing away"
            )


def _same_keys(one: tuple[list[Any], Any], other: tuple[list[Any], Any]) -> bool:
    return len(one[0]) == len(other[0]) and bool(one[1] == other[1])


def _is_same(old: Any, new: Any) -> bool:
    """Whether a number or text is the same one; NaN is itself."""
    return type(old) is type(new) and (old == new or (old != old and new != new))  # noqa: PLR0124


def _check_unchanged(old: Any, new: Any, title: str) -> None:
    """BuildError if a call has changed what an engine does not take."""
    if (found := _difference(old, new, "", set())) is not None:
        path, one, other = found
        raise _changed_value(f"{path.lstrip('.')} of {title}" if path else title, one, other)


def _changed_value(title: str, old: Any, new: Any) -> BuildError:
    return BuildError(
        f"{title} is a Python value that a step changes, from {_described(old)} to "
        f"{_described(new)}: a graph holds it fast; make it a tensor"
    )


def _difference(old: Any, new: Any, path: str, seen: set[int]) -> tuple[str, Any, Any] | None:
    """Where two values without tensors differ, and what they are there."""
    if old is new or id(old) in seen:
        return None
    seen.add(id(old))
    if isinstance(old, _CONSTANTS):
        return None if _is_same(old, new) else (path, old, new)
    parts = _pairs(old, new, path) if type(old) is type(new) else None
    if parts is None:
        return path, old, new
    found = (_difference(one, other, each, seen) for each, one, other in parts)
    return next((each for each in found if each is not None), None)


def _pairs(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]] | None:
    """What two values of one type hold, with its path; None if they hold other things."""
    if isinstance(old, set | frozenset):
        return [] if len(old) == len(new) else None
    if isinstance(old, list | tuple | collections.deque):
        pairs = enumerate(zip(old, new, strict=False))
        parts = [(f"{path}[{place}]", *each) for place, each in pairs]
        return parts if len(old) == len(new) else None
    is_mapping = isinstance(old, Mapping)
    one, other = (old, new) if is_mapping else (_fields(old), _fields(new))
    if one.keys() != other.keys():
        return None
    title = "{}[{!r}]" if is_mapping else "{}.{}"
    return [(title.format(path, key), one[key], other[key]) for key in one]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype}"
    if isinstance(value, _CONSTANTS):
        return repr(value)
    size = f" of {len(value)}" if isinstance(value, Sized) else ""
    return f"a {type(value).__name__}{size}"


def _check_kept(title: str, old: Tensor, new: Tensor) -> None:
    if (old.dtype, old.dim()) != (new.dtype, new.dim()) or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(old.shape, new.shape, strict=True)
    ):
        raise BuildError(
            f"{title} of {_described(old)} becomes {_described(new)}: a state is updated in its "
            f"own memory, so begin with a tensor as large as it gets"
        )
