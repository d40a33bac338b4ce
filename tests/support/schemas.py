"""Random bounded JSON schemas, and models that answer them."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]


def random_schema(generator: random.Random, depth: int = 2) -> Schema:
    """A schema whose valid texts have a longest one."""
    kinds = ["integer", "string", "boolean", "null", "enum", "const", "number", "date"]
    if depth:
        kinds += ["object", "array", "anyOf", "tuple"] * 2
    make: dict[str, Callable[[random.Random], Schema]] = {
        "integer": _integer,
        "number": _number,
        "string": _string,
        "enum": lambda r: {"enum": r.sample(["a b", 'q"\\', 17, None, "\u00e9\u4e2d", [1, {}]], 2)},
        "const": lambda r: {"const": r.choice(["x", {"y": [True]}, -3])},
        "date": lambda _: {"type": "string", "format": "date"},
    }
    kind = generator.choice(kinds)
    if kind in make:
        return make[kind](generator)
    if kind == "object":
        return _object(generator, depth - 1)
    if kind == "array":
        most = generator.randint(1, 3)
        least = generator.randint(0, most)
        items = random_schema(generator, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": most}
    if kind == "anyOf":
        return {"anyOf": [random_schema(generator, depth - 1) for _ in range(2)]}
    if kind == "tuple":
        parts = [random_schema(generator, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}
    return {"type": kind}


def _integer(generator: random.Random) -> Schema:
    low = generator.randint(-50, 50)
    schema = {"type": "integer", "minimum": low, "maximum": low + generator.randint(6, 2000)}
    return schema | ({"multipleOf": 3} if generator.random() < 0.3 else {})


def _number(generator: random.Random) -> Schema:
    # without a bound a number may have any number of digits
    return {"type": "number", "enum": [generator.randint(-5, 5), 0.5, 1e-3]}


def _string(generator: random.Random) -> Schema:
    if generator.random() < 0.3:
        return {"type": "string", "pattern": generator.choice(["^[a-c]{2,5}$", "^(no|yes)?$"])}
    least = generator.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + generator.randint(0, 6)}


def _object(generator: random.Random, depth: int) -> Schema:
    names = generator.sample(["a", "b c", "\u00fc", "long_name", '"'], generator.randint(1, 3))
    properties = {name: random_schema(generator, depth) for name in names}
    required = generator.sample(names, generator.randint(0, len(names)))
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
