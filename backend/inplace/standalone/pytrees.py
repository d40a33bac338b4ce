"""The trees of an engine's arguments and results, read without importing what a text names.

PyTorch's own reader imports the module that the text of a ``defaultdict`` or of an enum names, and
takes any object of it.
"""

import builtins
import collections
import json
import sys
from enum import Enum
from typing import Any

from torch.utils import _pytree as pytree

PROTOCOL = 1
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
        if protocol != PROTOCOL:
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
