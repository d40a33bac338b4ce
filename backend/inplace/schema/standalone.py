"""The manifest of a standalone engine (``standalone.json``).

A served engine takes requests whose tensors have roles. A standalone engine takes the arguments of
its module, so it has a manifest of its own. A directory holds one of the two.

The trees of arguments and results are read without importing what a text names: PyTorch's own
reader imports the module that the text of a ``defaultdict`` or of an enum names, and takes any
object of it.
"""

import builtins
import collections
import json
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from torch import Tensor
from torch.utils import _pytree as pytree

from inplace.schema.artifacts import EngineFile
from inplace.schema.files import FileName, FileRecord, Record, RecordFile, find_file
from inplace.schema.specs import Alias, Dtype, Extent, Lowering

FILE_NAME = "standalone.json"


SLOTS = "slots"
"""The graph input between the module's arguments and the states."""


ALIGNMENT = {"cpu": 1, "cuda": 256}
"""Alignment of states in bytes, by device type. TensorRT binds no other addresses; all of
PyTorch's own allocations have it."""


Owner = Literal["caller", "module"]
"""Who owns the memory of a state: the caller, whose tensor the module mutates and which is bound;
or the module, whose buffer becomes the engine's."""


Selection = tuple[tuple[int, int], ...]
"""The arguments (axis, index) of successive calls of `Tensor.select`, which make a view."""


def select_view(tensor: Tensor, selection: Selection) -> Tensor:
    """The selected view of a tensor."""
    for axis, index in selection:
        tensor = tensor.select(axis, index)
    return tensor


def format_selection(selection: Selection) -> str:
    """A selection as Python code, for example ``[2][0]``."""
    return "".join(f"[{':, ' * axis}{index}]" for axis, index in selection)


def result_name(index: int) -> str:
    """The name of a result in a TensorRT plan."""
    return f"result_{index}"


class Argument(Record):
    """One leaf of the module's arguments.

    Attributes:
        where: the argument as the caller writes it, for example ``cache['keys']``.
        name: the graph's placeholder; empty for a constant, which the graph does not take.
        kind: ``state``: the caller's memory, updated in place. ``tensor``. ``number``: a Python
            integer. ``constant``: must have the value that it had at the build.
        dtype: of a tensor.
        shape: of a tensor, or the one value of a number; a text is a dynamic extent
            (`inplace.schema.specs`).
        value: of a constant.
    """

    where: str
    name: str = ""
    kind: Literal["state", "tensor", "number", "constant"]
    dtype: Dtype | None = None
    shape: tuple[Extent, ...] = ()
    value: bool | int | float | str | None = None


class Result(Record):
    """One leaf of what the module returns.

    Attributes:
        kind: ``tensor``. ``number``: a Python number that the graph computes. ``constant``: the
            same in every call.
        dtype: of a tensor.
        shape: of a tensor, or the one value of a number; a text is an expression in the symbols of
            the arguments' shapes (`inplace.schema.specs`). An expression with another symbol
            depends on the values of tensors.
        value: of a constant.
    """

    kind: Literal["tensor", "number", "constant"]
    dtype: Dtype | None = None
    shape: tuple[Extent, ...] = ()
    value: bool | int | float | str | None = None


class CallSignature(Record):
    """How an engine is called.

    Attributes:
        arguments: the leaves of ``(args, kwargs)``.
        ranges: smallest and largest value of each symbol in the arguments' shapes; None is no
            limit.
        results: the leaves of the returned value.
        in_spec: the pytree of ``(args, kwargs)``, serialized by PyTorch.
        out_spec: the pytree of the returned value, serialized.
        parameters: the names of the module's parameters that were passed at the build.
        positional: how many of them were passed by position.
    """

    arguments: tuple[Argument, ...]
    ranges: dict[str, tuple[int | None, int | None]]
    results: tuple[Result, ...]
    in_spec: str
    out_spec: str
    parameters: tuple[str, ...]
    positional: int


class StandaloneState(Record):
    """A state: a tensor that a call updates in place, or a view of one.

    Attributes:
        name: the graph's placeholder.
        owner: ``caller``: an argument. ``module``: a buffer, which the engine owns.
        source: the argument as the caller writes it, or the buffer's qualified name.
        dtype: element type.
        shape: shape of the tensor; a text is a dynamic extent, as in `Argument`.
        selection: the view of the tensor that is the state, if several states share one tensor.
        written_at: the line of the module that writes the state first, for errors:
            ``at "file", line 3, in forward (code)``.
        has_slot_axis: whether the first axis is the slot axis; otherwise the graph takes
            ``unsqueeze(0)`` of the state.
    """

    name: str
    owner: Owner
    source: str
    dtype: Dtype
    shape: tuple[Extent, ...]
    selection: Selection = ()
    written_at: str = ""
    has_slot_axis: bool

    @property
    def view_shape(self) -> tuple[int | str, ...]:
        """The shape of the state itself."""
        extents = list(self.shape)
        for axis, _ in self.selection:
            del extents[axis]
        return tuple(extents)

    @property
    def label(self) -> str:
        """What errors call the state."""
        name = f"{self.source}{format_selection(self.selection)}"
        return f"argument {name}" if self.owner == "caller" else f"the engine's state {name}"

    @property
    def write_note(self) -> str:
        """The end of an error about the caller's tensor: the line that writes it."""
        return f"; the module writes it {self.written_at}" if self.written_at else ""

    def matches(self, tensor: Tensor) -> bool:
        """Whether a tensor has the element type and, apart from dynamic extents, the shape."""
        return (
            tensor.dtype == self.dtype.as_torch
            and tensor.dim() == len(self.shape)
            and all(
                isinstance(expected, str) or extent == expected
                for extent, expected in zip(tensor.shape, self.shape, strict=True)
            )
        )

    def view(self, tensor: Tensor) -> Tensor:
        """The state's view of its tensor."""
        return select_view(tensor, self.selection)


class StandaloneManifest(RecordFile):
    """The contents of ``standalone.json``.

    Attributes:
        states: in the order of the graph's placeholders.
        aliases: ``output@input@kind``, one for each state.
        lowering: how each state's update was lowered, and why.
        call: how the engine is called.
        rows: rows of a step; row r is slot r.
        engine: the compiled graph.
        owned: the file with the values of the states that the engine owns (safetensors); None if
            it owns none.
        files: every file of the folder but this one.
        built_with: versions, and the results of verification.
    """

    file_name: ClassVar[str] = FILE_NAME
    rebuild: ClassVar[str] = (
        'build the engine again with `inplace_builder.build(module, …, path="{folder}")`'
    )
    manifest_version: Literal[2] = 2
    states: tuple[StandaloneState, ...]
    aliases: tuple[str, ...]
    lowering: tuple[Lowering, ...]
    call: CallSignature
    rows: int
    engine: EngineFile
    owned: FileName | None
    files: tuple[FileRecord, ...]
    built_with: dict[str, str]

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        listed = [record.name for record in self.files]
        named = [name for name in (self.engine.file, self.owned) if name is not None]
        if len(set(listed)) != len(listed) or not set(named) <= set(listed):
            raise ValueError(f"the files {listed} must differ and hold {named}")
        return self

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        names = [state.name for state in self.states]
        if sorted(alias.input for alias in self.parsed_aliases) != sorted(names):
            raise ValueError(
                f"each of the states {names} must have one alias, got {list(self.aliases)}"
            )
        passed = [argument.where for argument in self.call.arguments if argument.kind == "state"]
        if sorted(passed) != sorted(
            {state.source for state in self.states if state.owner == "caller"}
        ):
            raise ValueError(f"the arguments {passed} must be the states that the caller owns")
        if (self.owned is None) == any(state.owner == "module" for state in self.states):
            raise ValueError(
                "a manifest must have a file of owned states if and only if the module owns states"
            )
        return self

    @model_validator(mode="after")
    def _check_selections(self) -> Self:
        for state in self.states:
            extents = list(state.shape)
            for axis, index in state.selection:
                if (
                    not 0 <= axis < len(extents)
                    or not isinstance(extent := extents.pop(axis), int)
                    or not 0 <= index < extent
                ):
                    raise ValueError(
                        f"state {state.name}: the selection {state.selection} is outside "
                        f"its tensor of shape {state.shape}"
                    )
        return self

    @cached_property
    def bases(self) -> tuple[StandaloneState, ...]:
        """The first state of each tensor: states may be views of one tensor."""
        first: dict[tuple[str, str], StandaloneState] = {}
        for state in self.states:
            first.setdefault((state.owner, state.source), state)
        return tuple(first.values())

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The states as views of their tensors, which are in the order of `bases`."""
        by_source = {
            (state.owner, state.source): tensor
            for state, tensor in zip(self.bases, tensors, strict=True)
        }
        return [state.view(by_source[state.owner, state.source]) for state in self.states]

    def file(self, name: str) -> FileRecord:
        """The record of a file; LoadError if there is none."""
        return find_file(self.files, name)

    @property
    def parsed_aliases(self) -> tuple[Alias, ...]:
        """`aliases`, parsed."""
        return tuple(Alias.parse(text) for text in self.aliases)

    @property
    def graph_inputs(self) -> tuple[Argument, ...]:
        """The arguments that the graph takes before ``slots`` and the states, in its order."""
        return tuple(
            argument for argument in self.call.arguments if argument.kind in ("tensor", "number")
        )


PYTREE_PROTOCOL = 1
"""PyTorch's version of the encoding."""

MAX_DEPTH = 100
"""Containers inside one another."""

MAX_LENGTH = 10_000_000
"""Characters of a text."""

_FACTORIES = frozenset({"bool", "dict", "float", "int", "list", "set", "str", "tuple"})
"""The default factories that a ``defaultdict`` may have."""

_DEFAULTDICT = pytree.SUPPORTED_SERIALIZED_TYPES[collections.defaultdict].serialized_type_name


def load_tree(text: str) -> pytree.TreeSpec:
    """Read a tree that `torch.utils._pytree.treespec_dumps` wrote.

    Raises:
        ValueError: it is not such a tree, or has a type that is not registered in this process.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters")
    try:
        protocol, record = json.loads(text)
        if protocol != PYTREE_PROTOCOL:
            raise ValueError(f"protocol {protocol} is not known")
        _check(record, 0)
        return pytree.treespec_loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except Exception as error:  # of many types, from the constructors of registered classes
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _check(record: Any, depth: int) -> None:
    """Check that reading a node imports nothing."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if not isinstance(record, dict) or record.keys() != {"type", "context", "children_spec"}:
        raise ValueError("a node has other fields than type, context and children_spec")
    context = record["context"]
    if record["type"] == _DEFAULTDICT:
        _check_factory(context)
    _check_enums(context, depth)
    if isinstance(context, str):
        _check_enums(json.loads(context), depth)
    for child in record["children_spec"]:
        _check(child, depth + 1)


def _check_factory(context: Any) -> None:
    module, name = context["default_factory_module"], context["default_factory_name"]
    if module != builtins.__name__ or name not in _FACTORIES:
        raise ValueError(
            f"a defaultdict makes {module}.{name}; an engine may have those of {sorted(_FACTORIES)}"
        )


def _check_enums(value: Any, depth: int) -> None:
    """Check that every enum member is one of a module that this process has imported."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        for item in value:
            _check_enums(item, depth + 1)
    if not isinstance(value, dict):
        return
    for item in value.values():
        _check_enums(item, depth + 1)
    if "__enum__" in value:
        module, _, path = value["fqn"].partition(":")
        owner: Any = sys.modules.get(module)
        for name in path.split("."):
            owner = vars(owner).get(name) if owner is not None else None
        if not (isinstance(owner, type) and issubclass(owner, Enum)):
            raise ValueError(f"{value['fqn']} is not an enum of a module that is imported here")


class Attributes(SimpleNamespace):
    """The attributes of an object that hold tensors and numbers; a node of PyTorch's trees.

    An engine of a module that takes a cache object takes that object too. Its files name no class
    of the user's: any object with these attributes fits.
    """


def _flatten(node: Attributes) -> tuple[list[Any], list[str]]:
    return [*vars(node).values()], [*vars(node)]


def _flatten_with_keys(node: Attributes) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.GetAttrKey(name), value) for name, value in vars(node).items()], [*vars(node)]


def _unflatten(values: Iterable[Any], names: list[str]) -> Attributes:
    return Attributes(**dict(zip(names, values, strict=True)))


pytree.register_pytree_node(
    Attributes,
    _flatten,
    _unflatten,
    serialized_type_name="inplace.Attributes",
    flatten_with_keys_fn=_flatten_with_keys,
)


def holds_objects(spec: pytree.TreeSpec) -> bool:
    """Whether a tree takes the attributes of objects."""
    return spec.type is Attributes or any(map(holds_objects, spec.children()))


def with_attributes(spec: pytree.TreeSpec, given: Any) -> Any:
    """A value in the shape of a tree: objects become their attributes where the tree has them.

    Args:
        spec: the tree.
        given: the value; what does not fit is left as it is.

    Raises:
        ValueError: an object lacks an attribute.
    """
    if spec.type is Attributes:
        missing = [name for name in spec.context if not hasattr(given, name)]
        if missing:
            raise ValueError(f"a {type(given).__name__} has no {', '.join(missing)}")
        parts = zip(spec.context, spec.children(), strict=True)
        return Attributes(
            **{name: with_attributes(child, getattr(given, name)) for name, child in parts}
        )
    children = spec.children()
    if type(given) is dict and spec.type is dict:
        parts = zip(spec.context, children, strict=True)
        fits = {name: with_attributes(child, given[name]) for name, child in parts if name in given}
        return {**given, **fits}
    if type(given) is spec.type and spec.type in pytree.SUPPORTED_NODES:
        node = pytree.SUPPORTED_NODES[spec.type]
        values, context = node.flatten_fn(given)
        if context == spec.context and len(values) == len(children):
            return node.unflatten_fn([*map(with_attributes, children, values)], context)
    return given


def same_constant(value: object, expected: object) -> bool:
    """Whether a number or text is the one that an engine was built for.

    One of a class of its own, such as a member of an enum or a number of NumPy's, is the number or
    text that it is.

    Args:
        value: of a call.
        expected: of Python's own types.
    """
    kinds = (type(value), type(expected))
    if bool in kinds and kinds[0] is not kinds[1]:
        return False
    if not isinstance(value, type(expected)):
        return False
    return value == expected or (value != value and expected != expected)  # noqa: PLR0124  NaN
