"""Grammars as requests give them, and what of JSON Schema they may use."""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from inplace.errors import Code, RequestError
from inplace.grammars.worker import WHITESPACE
from inplace.parameters import BY_NAME, GRAMMAR_PARAMETERS
from inplace.protocol import CHOICE, GRAMMAR, JSON, JSON_OBJECT, REGEX

MAX_DEPTH = 64
"""How deep the schemas of a schema may lie in each other."""


MAX_REFERENCE_DEPTH = 32
"""How many ``$ref`` may follow each other, from one schema to the next."""


MAX_SCHEMAS = 4000
"""Schemas inside a schema."""


MAX_REFERENCED_SCHEMAS = 4 * MAX_SCHEMAS
"""Schemas inside all that a schema refers to."""


SCHEMA_KEYWORDS = {
    "additionalProperties": "schema",
    "items": "schema or schemas",
    "additionalItems": "schema",
    "prefixItems": "schemas",
    "anyOf": "schemas",
    "oneOf": "schemas",
    "allOf": "schemas",
    "properties": "schemas by name",
    "patternProperties": "schemas by name",
    "$defs": "schemas by name",
    "definitions": "schemas by name",
}
"""Keywords whose values hold schemas."""


VALUE_KEYWORDS = frozenset(
    {
        "type",
        "enum",
        "const",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "required",
        "minProperties",
        "maxProperties",
        "minItems",
        "maxItems",
        "$ref",
    }
)
"""The other keywords that say what is valid."""


ANNOTATIONS = frozenset(
    {
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$comment",
    }
)
"""Keywords that say nothing about what is valid."""


_DIRECTIVE = re.compile(r"%(llguidance|import)\b")
"""What is not supported of llguidance's notation."""


_SCHEMA = re.compile(r"%json\s*")
"""Before a JSON schema inside a grammar."""


Kind = Literal["json", "regex", "grammar"]
"""A JSON schema, a regular expression, or a grammar in Lark's notation."""


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """What a generation's text must be.

    Attributes:
        kind: how it is written.
        text: the schema, the expression or the grammar.
    """

    kind: Kind
    text: str

    @classmethod
    def parse(cls, parameters: Mapping[str, object]) -> Self | None:
        """Read it from a request's parameters; None if they have none.

        Raises:
            RequestError: BAD_PARAMETER: there are two, or it is not well-formed, or it uses a
                keyword that is not supported.
        """
        values = {
            name: BY_NAME[name].parse(parameters[name])
            for name in GRAMMAR_PARAMETERS
            if name in parameters
        }
        given = sorted(name for name, value in values.items() if value is not False)
        if not given:
            return None
        if len(given) > 1:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"the parameters {given} exclude each other: send one of them",
            )
        [name] = given
        value = values[name]
        if name == JSON_OBJECT:
            return cls("json", '{"type":"object"}')
        if name == CHOICE:
            assert isinstance(value, tuple)
            alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
            return cls("grammar", f"start: {alternatives}")
        assert isinstance(value, str)
        if name == GRAMMAR and (directive := _DIRECTIVE.search(value)):
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {GRAMMAR!r} has {directive[0]!r}, which is not supported: leave it out",
            )
        if name == GRAMMAR:
            return cls("grammar", _with_checked_schemas(value))
        if name == JSON:
            check_schema(json.loads(value))
            return cls("json", value)
        assert name == REGEX
        return cls("regex", value)


def _with_checked_schemas(grammar: str) -> str:
    """A grammar whose JSON schemas were checked, and have bounded white space."""
    written, position = "", 0
    while (found := _SCHEMA.search(grammar, position)) is not None:
        try:
            schema, end = json.JSONDecoder().raw_decode(grammar, found.end())
        except (ValueError, RecursionError) as error:
            raise RequestError(
                Code.BAD_PARAMETER,
                f"parameter {GRAMMAR!r} has no JSON schema behind '%json' at {found.start()}:"
                f" {error}",
            ) from None
        check_schema(schema)
        if not isinstance(schema, dict):
            raise _refusal("'%json' needs an object")
        bounded = schema | {"x-guidance": {"whitespace_pattern": WHITESPACE}}
        text = json.dumps(bounded)
        written, position = f"{written}{grammar[position : found.end()]}{text}", end
    return written + grammar[position:]


def check_schema(schema: Any) -> None:
    """Check the keywords of a schema, and how its schemas lie in each other.

    Raises:
        RequestError: BAD_PARAMETER, with the keyword and its place.
    """
    _SchemaCheck(schema).run()


def without_annotations(schema: Any) -> Any:
    """A schema without the keywords that say nothing about what is valid.

    Args:
        schema: one that `check_schema` accepts.
    """
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for keyword, value in schema.items():
        kind = SCHEMA_KEYWORDS.get(keyword)
        if keyword in ANNOTATIONS:
            continue
        if kind == "schemas by name":
            made[keyword] = {name: without_annotations(each) for name, each in value.items()}
        elif kind is not None and isinstance(value, list):
            made[keyword] = [without_annotations(each) for each in value]
        else:
            made[keyword] = value if kind is None else without_annotations(value)
    return made


class _SchemaCheck:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._references: dict[str, list[str]] = {}
        self._left = self._most = MAX_SCHEMAS

    def run(self) -> None:
        self._visit(self._root, "#", 0, self._references.setdefault("#", []))
        self._left = self._most = MAX_REFERENCED_SCHEMAS
        waiting = deque((target, 1) for target in self._references["#"])
        while waiting:
            target, depth = waiting.popleft()
            if target in self._references:
                continue
            found = self._references[target] = []
            self._visit(self._resolve(target), target, 0, found)
            if depth > MAX_REFERENCE_DEPTH:
                raise _refusal(
                    f"more than {MAX_REFERENCE_DEPTH} '$ref' follow each other, at {target!r}"
                )
            waiting += [(other, depth + 1) for other in self._references[target]]

    def _visit(self, schema: Any, place: str, depth: int, references: list[str]) -> None:
        """Check a schema and those inside it; collect what it refers to."""
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise _refusal(f"{place} is {type(schema).__name__}; expected an object or a boolean")
        self._left -= 1
        if self._left < 0:
            raise _refusal(f"it has more than {self._most} schemas")
        if depth > MAX_DEPTH:
            raise _refusal(f"schemas lie in each other more than {MAX_DEPTH} deep, at {place}")
        for keyword in schema:
            known = keyword in SCHEMA_KEYWORDS or keyword in VALUE_KEYWORDS
            if not known and keyword not in ANNOTATIONS:
                raise _refusal(
                    f"the keyword {keyword!r} at {place} is not supported; supported are"
                    f" {sorted({*SCHEMA_KEYWORDS, *VALUE_KEYWORDS, *ANNOTATIONS})}"
                )
        if "$ref" in schema:
            references.append(self._checked_reference(schema["$ref"], place))
        for keyword, inner, inner_place in _inner_schemas(schema, place):
            # a definition is reached by a reference only
            found = [] if keyword in ("$defs", "definitions") else references
            self._visit(inner, inner_place, depth + 1, found)

    def _checked_reference(self, target: Any, place: str) -> str:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise _refusal(
                f"'$ref' at {place} is {target!r}; only references into the same schema are"
                f" supported, such as '#/$defs/name'"
            )
        return target

    def _resolve(self, target: str) -> Any:
        value = self._root
        for part in target.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(value, dict) or part not in value:
                raise _refusal(f"'$ref' is {target!r}, which is not in the schema")
            value = value[part]
        return value


def _inner_schemas(schema: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any, str]]:
    """The schemas directly inside a schema: the keyword, the schema and its place."""
    for keyword, kind in SCHEMA_KEYWORDS.items():
        if keyword not in schema:
            continue
        value, inner = schema[keyword], f"{place}/{keyword}"
        if kind == "schemas by name":
            if not isinstance(value, dict):
                raise _refusal(f"{inner} is {type(value).__name__}; expected an object of schemas")
            yield from ((keyword, each, f"{inner}/{name}") for name, each in value.items())
        elif kind == "schemas" or (kind == "schema or schemas" and isinstance(value, list)):
            if not isinstance(value, list):
                raise _refusal(f"{inner} is {type(value).__name__}; expected an array of schemas")
            yield from ((keyword, each, f"{inner}/{index}") for index, each in enumerate(value))
        else:
            yield keyword, value, inner


def _refusal(reason: str) -> RequestError:
    return RequestError(Code.BAD_PARAMETER, f"the JSON schema is not usable: {reason}")
