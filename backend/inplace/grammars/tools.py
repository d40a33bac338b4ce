"""Tool calls as models write them: the grammar that enforces them, and how they are read.

Formats:

- ``hermes`` (Hermes, Qwen): ``{"name": …, "arguments": {…}}`` between `BEGIN` and `END`, each on a
  line of its own, once for each call.
- ``llama3_json`` (Llama 3): ``{"name": …, "parameters": {…}}``, one call.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from inplace.errors import Code, RequestError
from inplace.grammars.source import check_schema
from inplace.protocol import GRAMMAR, JSON

ToolFormat = Literal["hermes", "llama3_json"]


BEGIN, END = "<tool_call>", "</tool_call>"
"""Around each call of the format ``hermes``."""


_ARGUMENTS: dict[ToolFormat, str] = {"hermes": "arguments", "llama3_json": "parameters"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: its name.
        parameters: the JSON schema of its arguments, an object.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model has made.

    Attributes:
        name: of the tool.
        arguments: the text of a JSON object.
    """

    name: str
    arguments: str


def tool_parameters(
    tools: Sequence[Tool], choice: str, tool_format: ToolFormat, *, parallel: bool = False
) -> dict[str, str]:
    """The request parameters with which a generation makes the calls that a client asks for.

    Args:
        tools: the tools.
        choice: ``none`` and ``auto`` enforce nothing, so a call must be looked for in the text with
            ``auto`` (`parse_tool_calls`); ``required`` is a call of any tool; else the name of the
            tool to call.
        tool_format: how the model writes calls.
        parallel: allow several calls, where the format has them.

    Raises:
        RequestError: BAD_PARAMETER, there is no such tool, or the parameters of one are no usable
            schema.
    """
    for tool in tools:
        check_schema(tool.parameters)
    if choice in ("none", "auto"):
        return {}
    chosen = [tool for tool in tools if choice in ("required", tool.name)]
    if not chosen:
        names = sorted(tool.name for tool in tools)
        raise RequestError(
            Code.BAD_PARAMETER,
            f"'tool_choice' asks for {choice!r}; expected 'none', 'auto', 'required' or one of the"
            f" tools {names}",
        )
    schema = json.dumps(_call_schema(chosen, _ARGUMENTS[tool_format]), ensure_ascii=False)
    if tool_format == "llama3_json":
        return {JSON: schema}
    start = 'call ("\\n" call)*' if parallel else "call"
    return {
        GRAMMAR: f'start: {start}\ncall: "{BEGIN}\\n" content "\\n{END}"\ncontent: %json {schema}\n'
    }


def _call_schema(tools: Sequence[Tool], arguments: str) -> dict[str, Any]:
    """The schema of a call of one of the tools."""
    calls, definitions = [], {}
    for index, tool in enumerate(tools):
        place = f"#/$defs/tool{index}"
        definitions[f"tool{index}"] = _moved(dict(tool.parameters), place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, arguments: {"$ref": place}},
                "required": ["name", arguments],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references are to itself, as it is at another place."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    values = {"const", "enum", "default", "examples"}
    moved = {name: each if name in values else _moved(each, place) for name, each in schema.items()}
    if isinstance(reference := schema.get("$ref"), str):
        moved["$ref"] = place + reference.removeprefix("#")
    return moved


def parse_tool_calls(text: str, tool_format: ToolFormat) -> tuple[str, list[ToolCall]]:
    """The calls in a generated text, and the text without them.

    What is not a whole call stays text.
    """
    if tool_format == "llama3_json":
        call = _parse_call(text, _ARGUMENTS[tool_format])
        return ("", [call]) if call is not None else (text, [])
    before, calls = "", list[ToolCall]()
    while BEGIN in text:
        head, _, rest = text.partition(BEGIN)
        inside, ends, after = rest.partition(END)
        call = _parse_call(inside, _ARGUMENTS[tool_format]) if ends else None
        if call is None:
            before, text = before + head + BEGIN, rest
            continue
        calls.append(call)
        before, text = before + head, after
    content = before + text
    return (content.strip() if calls else content), calls


def _parse_call(text: str, arguments: str) -> ToolCall | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    given = call.get(arguments, {})
    if not isinstance(given, dict):
        return None
    return ToolCall(call["name"], json.dumps(given, ensure_ascii=False))
