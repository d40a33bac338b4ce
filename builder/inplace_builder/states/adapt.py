"""States as people have them, as tensors that a module writes in place.

Every route of the builder takes for a state what a module writes. Other modules are given their
states and return the new ones (``y, *new = f(x, *states)``), or keep them in Python attributes.
`adapted_states` lets either write for a while: the same module, because hooks and functions that it
keeps may refer to it, with a ``forward`` that copies the new values into the states.
"""

import copy
import functools
import inspect
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from inplace_builder.compare import same_bits
from inplace_builder.errors import BuildError, brief
from inplace_builder.states.attributes import (
    KeptValues,
    attribute_mapping,
    attributes_of,
    holder_of,
)
from inplace_builder.states.objects import ObjectArguments, write_states

Output = int | str
"""The place of an output among the leaves of what a module returns; or the field or key of it."""

States = str | Collection[str] | Mapping[str, Output]
"""``auto``; the names of exactly what the module writes; or the output that becomes each input."""


@contextmanager
def adapted_states(
    module: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    states: States = "auto",
) -> Iterator["AdaptedStates"]:
    """Let a module write states that it returns or has as attributes, until the context ends.

    Then the module is as it was, its buffers and attributes too. What was assumed is printed to
    stderr.

    Args:
        module: the module; an exported program stays as it is.
        example_inputs: its positional arguments.
        kwargs: its keyword arguments.
        states: for each input that is a state the output that is its new value. With ``auto``, if
            the module writes nothing, inputs and outputs are matched by their keys or fields, else
            by shape and type, the last ones first.

    Raises:
        BuildError: ``states`` names no input or no output, or the two differ in shape; an attribute
            that changes is not a tensor of fixed shape; ``states`` is given for an exported
            program.
    """
    if isinstance(module, ExportedProgram):
        if isinstance(states, Mapping):
            raise BuildError("states={input: output} needs the module itself, not its export")
        yield AdaptedStates(states, {}, tuple(example_inputs), dict(kwargs or {}))
        return
    if any(nn.parameter.is_lazy(each) for each in [*module.parameters(), *module.buffers()]):
        raise BuildError(
            "the module has lazy parameters, whose extents are not known yet: call it once "
            "before it is captured"
        )
    given = _object_arguments(module, tuple(example_inputs), kwargs or {})
    with KeptValues(module).kept():
        if given is None:
            yield _adapted(module, tuple(example_inputs), kwargs or {}, states)
        else:
            _make_objects(module, given)
            yield replace(_adapted(module, given.args, given.kwargs, states), objects=given)


@dataclass(frozen=True)
class AdaptedStates:
    """The states of a module that writes them.

    Attributes:
        states: what remains of the names of the states.
        pairs: of states that are passed in and returned, the place of the new value among the
            leaves of what the user's module returns, by the place among those of its arguments.
        args, kwargs: the arguments, with the attributes of objects in their place.
        objects: the arguments with their objects, if there are any.
    """

    states: str | Collection[str]
    pairs: Mapping[int, int]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    objects: ObjectArguments | None = None

    def shapes(self, dynamic_shapes: Any) -> Any:
        """Dynamic shapes of the user's arguments as those of `args` and `kwargs`."""
        return dynamic_shapes if self.objects is None else self.objects.shapes(dynamic_shapes)


def _object_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ObjectArguments | None:
    """The arguments of a module, if some are objects."""
    if _is_plain((args, dict(kwargs))):
        return None
    given = ObjectArguments(args, kwargs, [*inspect.signature(module.forward).parameters])
    return given if given.has_objects else None


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor or a number, or Python's own containers of such."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, Tensor) or type(value) in (bool, int, float, str, type(None))


def _make_objects(module: nn.Module, given: ObjectArguments) -> None:
    """Let a module take the attributes of objects in their place."""
    forward = module.forward

    @functools.wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        return given.call(forward, args, kwargs)

    module.__dict__["forward"] = adapted


def _adapted(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], states: States
) -> AdaptedStates:
    """Find the states of a module by calling it, and let it write them."""
    try:
        call = _ModuleCall.of(module, args, kwargs)
    except BuildError:
        raise
    except Exception as error:  # of any type: else the export shows what is wrong with the call
        if isinstance(states, Mapping):
            raise BuildError(
                f"states: the module cannot be called with its example inputs: {brief(error)}"
            ) from error
        return AdaptedStates(states, {}, args, kwargs)
    if call.attributes:
        _register_attributes(module, call.attributes)
        for path in call.attributes:
            _print(f"attribute {path} is a state: it changes from step to step")
    if isinstance(states, Mapping):
        pairs = _declared(call, states)
    elif states == "auto" and not call.writes and not call.attributes:
        pairs = _matched(call)
        paths = pytree.tree_flatten_with_path(call.returned)[0]
        for place, of in pairs.items():
            name, tensor = call.inputs[place]
            output = pytree.keystr(paths[of][0])
            _print(
                f"input {name} {list(tensor.shape)} is a state, and output {output} is its new "
                f"value: they have the same {_reason(call, place, paths[of][0])}; pass "
                f"states={{input: output}} if they are not"
            )
    else:
        pairs = {}
    if pairs:
        _write_returned(module, pairs)
    remaining = "auto" if isinstance(states, Mapping) else states
    return AdaptedStates(remaining, pairs, args, kwargs)


def _reason(call: "_ModuleCall", place: int, path: Sequence[Any]) -> str:
    return "name" if _key(path) == call.keys[place] else "shape"


def _print(message: str) -> None:
    print(message, file=sys.stderr)


class _ModuleCall:
    """One call of a module, and what it changed; afterwards the module is as it was.

    Attributes:
        inputs: name and tensor of each leaf of the arguments that is a tensor, by its place.
        keys: the key or field of each of them in its container; the name of one that is in none.
        returned: what the module returned.
        outputs: its leaves.
        writes: whether it wrote an input, a parameter or a buffer.
        attributes: Python attributes with tensors that changed, by their path in the module, as
            they were before the call.
    """

    inputs: dict[int, tuple[str, Tensor]]
    keys: dict[int, str]
    returned: Any
    outputs: list[Any]
    writes: bool
    attributes: dict[str, Any]

    @classmethod
    def of(
        cls, module: nn.Module, example_inputs: Sequence[Any], kwargs: Mapping[str, Any] | None
    ) -> "_ModuleCall":
        """Call a module once."""
        self = cls()
        given = (tuple(example_inputs), dict(kwargs or {}))
        args, named = copy.deepcopy(given)
        leaves = _named_leaves(module, args, named)
        own = [tensor for _, tensor in leaves if isinstance(tensor, Tensor)]
        own += [*module.parameters(), *module.buffers()]
        buffers = dict(module.named_buffers())
        versions = [tensor._version for tensor in own]
        memory = {
            name: (tensor.detach(), tensor)
            for name, tensor in [*module.named_parameters(), *buffers.items()]
        }
        before = {path: _snapshot(value) for path, value in attributes_of(module).items()}
        known = {_memory(tensor) for tensor in own}
        kept = {
            path: [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor)]
            for path, (_, leaves, _) in before.items()
            if not any(isinstance(x, Tensor) and _memory(x) in known for x in leaves)
        }  # one that shares a buffer's memory is a part of that
        with (
            KeptValues(module, parameters=True).kept(),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            self.returned = module(*args, **named)
            self.outputs = pytree.tree_leaves(self.returned)
            self.writes = [tensor._version for tensor in own] != versions or any(
                tensor is not buffers.get(name) for name, tensor in module.named_buffers()
            )
            after = {
                path: pytree.tree_leaves(value) for path, value in attributes_of(module).items()
            }
            late = [name for name, _ in module.named_buffers() if name not in buffers]
            after |= {name: [module.get_buffer(name)] for name in late}
            moved = [name for name, pair in memory.items() if _is_moved(*pair)]
        first = _named_leaves(module, *given)
        self.inputs = {
            place: leaf for place, leaf in enumerate(first) if isinstance(leaf[1], Tensor)
        }
        paths = [path for path, _ in pytree.tree_flatten_with_path(given)[0]]
        self.keys = {
            place: _key(paths[place][2:]) or self.inputs[place][0] for place in self.inputs
        }
        written = {
            path for path, pairs in kept.items() if any(x._version != old for x, old in pairs)
        }
        if moved:
            raise BuildError(
                f"{moved[0]} of the module gets other memory in a step, by {moved[0]}.data = … or "
                f"set_(): write its values, {moved[0]}.copy_(…)"
            )
        _refuse_late(module, after)
        _refuse_replaced(leaves, _named_leaves(module, args, named))
        changed = {path: _changed(path, *value, after) for path, value in before.items()}
        shared = [(_memory(leaf), path) for path in sorted(written) for leaf, _ in kept[path]] + [
            (_memory(tensor), "a buffer or parameter")
            for tensor, version in zip(own, versions, strict=True)
            if tensor._version != version
        ]
        for path in before:
            if changed[path]:
                _refuse_parted(path, before[path][1], after[path], shared)
        self.attributes = {
            path: _initial(*before[path], after[path])
            for path in before
            if changed[path] or path in written
        }
        return self


def _initial(old: Any, leaves: Sequence[Any], values: Sequence[Any], new: Sequence[Any]) -> Any:
    """An attribute as a state begins: what was only written in place is the same tensor.

    So attributes that are one tensor, or parts of one, still are.
    """
    kept = [
        leaf.detach() if isinstance(leaf, Tensor) and leaf is other else value
        for leaf, value, other in zip(leaves, values, new, strict=True)
    ]
    return pytree.tree_unflatten(kept, pytree.tree_structure(old))


def _refuse_replaced(before: Sequence[tuple[str, Any]], after: Sequence[tuple[str, Any]]) -> None:
    """BuildError if a list or dictionary among the arguments has another tensor after a call."""
    for (name, old), (other, new) in zip(before, after, strict=False):
        if name == other and isinstance(old, Tensor) and old is not new:
            raise BuildError(
                f"a step puts another tensor in the place of {name}, in a list or dictionary of "
                f"its caller: write the values, {name}.copy_(…)"
            )


def _refuse_parted(
    path: str, leaves: Sequence[Any], new: Sequence[Any], written: Sequence[tuple[int, str]]
) -> None:
    """BuildError if a step replaces a tensor that another name has too, and writes that one.

    They are one tensor in the first step and two in the next.

    Args:
        path: of the attribute that is replaced.
        leaves, new: its tensors before and after the step.
        written: the memory that the step writes, and what has it.
    """
    replaced = {_memory(leaf) for leaf, other in zip(leaves, new, strict=True) if leaf is not other}
    for memory, name in written:
        if memory in replaced and memory and name != path:
            raise BuildError(
                f"attribute {path} and {name} share memory before the first step, which writes it "
                f"and gives {path} another tensor: write the values, {path}.copy_(…), or give each "
                f"memory of its own"
            )


def _memory(tensor: Tensor) -> int:
    """The memory that a tensor is in; 0 for one without."""
    is_plain = tensor.layout is torch.strided and tensor.device.type != "meta"
    return tensor.untyped_storage().data_ptr() if is_plain else 0


def _is_moved(old: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor has got other memory than an alias of it; a parameter with other values."""
    if tensor.layout is not torch.strided or old.data_ptr() == tensor.data_ptr():
        return False
    if not isinstance(tensor, nn.Parameter):
        return True
    return old.shape != tensor.shape or not same_bits(old.reshape(-1), tensor.reshape(-1))


def _named_leaves(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Any]]:
    """The leaves of a call's arguments, named as torch.export names its placeholders."""
    names = list(inspect.signature(module.forward).parameters)
    leaves: list[tuple[str, Any]] = []
    for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]:
        keys = [
            getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))) for key in path
        ]
        top, rest = keys[1], keys[2:]
        if isinstance(top, int):
            top = names[top] if top < len(names) else f"argument_{top}"
        leaves.append(("_".join(map(str, (top, *rest))), leaf))
    return leaves


def constant_arguments(
    module: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The numbers and texts among the arguments of a call, by name: a graph holds them fast."""
    if isinstance(module, ExportedProgram):
        return {}
    leaves = _named_leaves(module, tuple(example_inputs), dict(kwargs or {}))
    return {name: leaf for name, leaf in leaves if isinstance(leaf, int | float | str)}


# Python attributes.


def _refuse_late(module: nn.Module, after: Mapping[str, list[Any]]) -> None:
    """BuildError if an attribute holds a tensor only after the first step.

    Args:
        module: the module as it is before the first step.
        after: the leaves of its attributes after it.
    """
    for path, leaves in after.items():
        prefix, _, name = path.rpartition(".")
        holder = holder_of(module, prefix)
        old = attribute_mapping(holder).get(name, _MISSING) if holder is not None else _MISSING
        if isinstance(holder, nn.Module) and name in holder._buffers:
            old = holder._buffers[name]
        if old is None or (old is not _MISSING and not pytree.tree_leaves(old)):
            raise BuildError(
                f"attribute {path} is {old!r} before the first step and {_described(leaves)} after "
                f"it: begin with a tensor of that shape, register_buffer({name!r}, …)"
            )


_MISSING = object()


def _snapshot(value: Any) -> tuple[Any, list[Any], list[Any]]:
    """A value, its leaves, and their values now."""
    leaves = pytree.tree_leaves(value)
    values = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
    return pytree.tree_unflatten(values, pytree.tree_structure(value)), leaves, values


def _changed(
    path: str,
    old: Any,
    leaves: Sequence[Any],
    values: Sequence[Any],
    after: Mapping[str, list[Any]],
) -> bool:
    """Whether an attribute changed.

    Raises:
        BuildError: to something that is not a tensor of the same shape.
    """
    new = after.get(path, [None])
    same = len(new) == len(leaves) and all(
        a is b if isinstance(a, Tensor) else type(a) is type(b) and a == b
        for a, b in zip(leaves, new, strict=False)
    )
    if same:
        return False
    if isinstance(old, int | float):
        raise BuildError(
            f"attribute {path} is a Python number that a step changes, from {old} to "
            f"{new[0]}: a graph holds it fast; make it a tensor (register_buffer)"
        )
    described = [_described(values), _described(new)]
    if described[0] != described[1] or not all(isinstance(x, Tensor) for x in new):
        raise BuildError(
            f"attribute {path} is {described[0]} before a step and {described[1]} after it: a "
            f"state keeps its shape, so begin with tensors as large as they get"
        )
    return True


def _described(leaves: Sequence[Any]) -> list[str]:
    return [
        f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in leaves
    ]


def _register_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Make buffers of the tensors in these attributes, which ``forward`` fills in and reads off."""
    containers: dict[str, tuple[str, list[str], Any, Any]] = {}
    for path, value in attributes.items():
        prefix, _, name = path.rpartition(".")
        part = holder_of(module, prefix)
        if isinstance(value, Tensor) and isinstance(part, nn.Module):
            del part.__dict__[name]
            part.register_buffer(name, value, persistent=False)
            continue
        leaves, spec = pytree.tree_flatten(value)
        owner, base = _owner(module, path)
        names = [base] if isinstance(value, Tensor) else [f"{base}_{x}" for x in range(len(leaves))]
        for each, leaf in zip(names, leaves, strict=True):
            module.get_submodule(owner).register_buffer(each, leaf, persistent=False)
        # the module's own, as others may refer to it: torch.export leaves a copy in its place
        containers[path] = (owner, names, spec, attribute_mapping(part)[name])
    if not containers:
        return
    originals = {id(original): original for *_, original in containers.values()}
    sharing = [
        (vars(part), name, value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, dict | list | deque) and id(value) in originals
    ]
    forward = module.forward

    @functools.wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        kept: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []
        states: list[tuple[str, list[Tensor]]] = []
        links = [link for path in containers for link in _links(module, path)[:-1]]
        for path, (owner, names, spec, original) in containers.items():
            prefix, _, name = path.rpartition(".")
            attributes = attribute_mapping(holder_of(module, prefix))
            tensors = [module.get_submodule(owner).get_buffer(each) for each in names]
            content = pytree.tree_map(lambda leaf: leaf, original)
            kept.append((attributes, name, original, content))
            states.append((path, tensors))
            attributes[name] = _filled(original, pytree.tree_unflatten(tensors, spec))
        for part, name, value in sharing:  # each had a copy of its own after an export
            part[name] = value
        try:
            returned = forward(*args, **kwargs)
            pairs: list[tuple[Tensor, Any]] = []
            for path, tensors in states:
                prefix, _, name = path.rpartition(".")
                new = pytree.tree_leaves(attribute_mapping(holder_of(module, prefix))[name])
                pairs += zip(tensors, new, strict=True)
            returned = write_states(pairs, returned)
        finally:
            for container, key, value in links:  # a step may have put another object there
                if container[key] is not value:
                    container[key] = value
            for attributes, name, original, content in kept:
                attributes[name] = _filled(original, content)
        return returned

    module.__dict__["forward"] = adapted


def _links(module: nn.Module, path: str) -> list[tuple[Any, Any, Any]]:
    """Where the objects on the way to an attribute are kept: a container, its key and the value."""
    links: list[tuple[Any, Any, Any]] = []
    holder: Any = module
    for name in path.split("."):
        if isinstance(holder, nn.Module) and name in holder._modules:
            holder = holder._modules[name]
            continue
        in_order = isinstance(holder, list | tuple)
        key: Any = int(name) if in_order else name
        container = holder if in_order else attribute_mapping(holder)
        value = container[key]
        if not isinstance(container, tuple):
            links.append((container, key, value))
        holder = value
    return links


def _filled(value: Any, content: Any) -> Any:
    """A value with other content; lists and dictionaries are filled, as others refer to them."""
    if isinstance(value, dict) and isinstance(content, dict):
        new = {key: _filled(value.get(key), each) for key, each in content.items()}
        value.clear()
        value.update(new)
        return value
    if isinstance(value, list | deque) and type(content) is type(value):
        old = dict(enumerate(value))
        items = [_filled(old.get(place), each) for place, each in enumerate(content)]
        value.clear()
        value.extend(items)
        return value
    return content


def _owner(module: nn.Module, path: str) -> tuple[str, str]:
    """The part of a module that an attribute of an object is kept in, and its name there."""
    names = path.split(".")
    parts = dict(module.named_modules())
    count = next(n for n in reversed(range(len(names))) if ".".join(names[:n]) in parts)
    return ".".join(names[:count]), "_".join(names[count:])


# States that are passed in and returned.


def _declared(call: _ModuleCall, states: Mapping[str, Output]) -> dict[int, int]:
    """The leaf of the outputs that becomes each leaf of the inputs, as the caller declares it."""
    places: dict[int, int] = {}
    for name, output in states.items():
        inputs = [
            place
            for place, (leaf, _) in call.inputs.items()
            if leaf == name or leaf.startswith(f"{name}_")
        ]
        exact = [place for place in inputs if call.inputs[place][0] == name]
        inputs = exact or inputs
        outputs = _outputs_of(call, output)
        if not inputs:
            raise BuildError(
                f"states: {name} is not an input; the inputs are "
                f"{[leaf for leaf, _ in call.inputs.values()]}"
            )
        if len(inputs) != len(outputs):
            raise BuildError(
                f"states: input {name} has {len(inputs)} tensors, output {output!r} "
                f"{len(outputs)}; the module returns {_described(call.outputs)}"
            )
        for place, of in zip(inputs, outputs, strict=True):
            old, new = call.inputs[place][1], call.outputs[of]
            if _described([old]) != _described([new]):
                raise BuildError(
                    f"state {call.inputs[place][0]} of {_described([old])[0]} becomes output {of} "
                    f"of {_described([new])[0]}: a state keeps its shape and its type; make it as "
                    f"large as it gets, and mask what is not written"
                )
            places[place] = of
    return places


def _outputs_of(call: _ModuleCall, output: Output) -> list[int]:
    """The leaves of an output that is named by its place, its key or its field."""
    if isinstance(output, int):
        returned = call.returned if isinstance(call.returned, tuple | list) else call.outputs
        if not -len(returned) <= output < len(returned):
            raise BuildError(
                f"states: there is no output {output}; the module returns "
                f"{_described(call.outputs)}"
            )
        begin = len(pytree.tree_leaves(list(returned[: output % len(returned)])))
        return list(range(begin, begin + len(pytree.tree_leaves(returned[output]))))
    paths = pytree.tree_flatten_with_path(call.returned)[0]
    places = [
        place
        for place, (path, _) in enumerate(paths)
        if path and output in (getattr(path[0], "key", None), getattr(path[0], "name", None))
    ]
    if not places:
        raise BuildError(f"states: the module returns nothing named {output!r}")
    return places


def _matched(call: _ModuleCall) -> dict[int, int]:
    """The outputs that are new values of inputs: by their keys or fields, else by their shape."""
    pairs = _matched_by_key(call)
    paths = pytree.tree_flatten_with_path(call.returned)[0]
    candidates = [place for place in [*call.inputs][1:] if place not in pairs]
    # the first input and the first output are never taken for a state; the last ones first
    for of in range(len(call.outputs) - 1, 0, -1):
        new = call.outputs[of]
        if of in pairs.values() or (pairs and _key(paths[of][0])):
            continue
        described = _described([new])
        match = [x for x in candidates if _described([call.inputs[x][1]]) == described]
        if not isinstance(new, Tensor) or not match:
            break
        pairs[match[-1]] = of
        candidates = candidates[: candidates.index(match[-1])]
    return dict(sorted(pairs.items()))


def _matched_by_key(call: _ModuleCall) -> dict[int, int]:
    """Outputs with the key or field of one input, of the same shape and type."""
    pairs: dict[int, int] = {}
    for of, (path, new) in enumerate(pytree.tree_flatten_with_path(call.returned)[0]):
        key = _key(path)
        match = [place for place in [*call.inputs][1:] if key and call.keys[place] == key]
        if len(match) == 1 and _described([new]) == _described([call.inputs[match[0]][1]]):
            pairs[match[0]] = of
    keys = [call.keys[place] for place in pairs]
    unique = len(set(pairs.values())) == len(pairs) and len({*keys}) == len(keys)
    remain = len(pairs) < min(len(call.inputs), len(call.outputs))
    return pairs if unique and remain else {}


def _key(path: Sequence[Any]) -> str:
    """The last key or field of a path; empty where it is a place."""
    key = getattr(path[-1], "key", getattr(path[-1], "name", None)) if path else None
    return key if isinstance(key, str) else ""


def _write_returned(module: nn.Module, pairs: Mapping[int, int]) -> None:
    """Let a module return what is not a state, and write the states."""
    forward = module.forward

    @functools.wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        returned = forward(*args, **kwargs)
        leaves = pytree.tree_leaves(returned)
        remaining = _without(returned, states_only(pairs, leaves))
        return write_states([(given[place], leaves[of]) for place, of in pairs.items()], remaining)

    module.__dict__["forward"] = adapted


def states_only(pairs: Mapping[int, int], returned: Sequence[Any]) -> set[int]:
    """The places of what is returned for states only: a cell returns nothing but its states.

    Args:
        pairs: of `AdaptedStates`.
        returned: the leaves of what the module returned.
    """
    tensors = {place for place, leaf in enumerate(returned) if isinstance(leaf, Tensor)}
    return set(pairs.values()) if tensors - set(pairs.values()) else set()


def _without(returned: Any, states: Collection[int]) -> Any:
    """What a module returns, without the states: a dictionary, a tuple or the one tensor left."""
    leaves = pytree.tree_leaves(returned)
    kept = [leaf for place, leaf in enumerate(leaves) if place not in states]
    if isinstance(returned, dict) and len(returned) == len(leaves):
        return {
            key: leaf for place, (key, leaf) in enumerate(returned.items()) if place not in states
        }
    return kept[0] if len(kept) == 1 else tuple(kept)


def refuse_fake(returned: Iterable[Any]) -> None:
    """BuildError if a module returns what its export has left where no module keeps tensors."""
    if any(isinstance(each, FakeTensor) for each in returned):
        raise BuildError(
            "the module keeps a tensor outside itself, in a closure or a global variable: keep it "
            "in a buffer (register_buffer)"
        )
