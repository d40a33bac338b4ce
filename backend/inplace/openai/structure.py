"""What a reply must be: a response format, or a call of a tool, as parameters of the backend."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inplace.openai.errors import ApiError, invalid_value
from inplace.openai.generations import check_value
from inplace.openai.schemas import ChatRequest, ResponseFormat, Tool, ToolChoice

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of the arguments of a function without parameters."""


@dataclass(frozen=True)
class Structure:
    """What a reply must be.

    Attributes:
        options: request parameters of the backend.
        calls: the reply is a call of a tool.
        function: the only function it may call; None where the reply has its name.
    """

    options: dict[str, Any]
    calls: bool = False
    function: str | None = None

    def tool_call(self, text: str) -> dict[str, Any] | None:
        """The call that a whole reply is; None where it was cut short."""
        name, arguments = self.function, text
        try:
            value = json.loads(text)
        except ValueError:
            return None
        if name is None:
            name = value["name"]
            arguments = json.dumps(value["arguments"], ensure_ascii=False)
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def structure_of(request: ChatRequest) -> Structure:
    """What the reply to a chat must be.

    Raises:
        ApiError: the fields do not fit together, or a grammar is refused.
    """
    choice, tools = request.tool_choice, request.tools or []
    if choice == "auto" or (choice is None and tools):
        raise ApiError(
            400,
            "this server does not find out by itself whether a reply calls a tool: send "
            "tool_choice='required', a function, or 'none'",
            param="tool_choice",
            code="unsupported_value",
        )
    if choice in (None, "none"):
        return Structure(_format_options(request.response_format))
    if not tools:
        raise _wrong("tool_choice needs tools")
    if request.response_format is not None and request.response_format.type != "text":
        raise _wrong("a reply that calls a tool has no response_format: leave out one of them")
    function = choice.function.name if isinstance(choice, ToolChoice) else None
    schema = _named(tools, function) if function is not None else _any_of(tools)
    check_value("json", json.dumps(schema), "tools")
    return Structure({"json": schema}, calls=True, function=function)


def _format_options(format: ResponseFormat | None) -> dict[str, Any]:
    if format is None or format.type == "text":
        return {}
    if format.type == "json_object":
        return {"json_object": True}
    if format.json_schema is not None:
        value: Any = format.json_schema.schema_
        check_value("json", json.dumps(value), "response_format")
        return {"json": value}
    value = getattr(format, format.type)
    written = json.dumps(value) if format.type == "choice" else value
    check_value(format.type, written, "response_format")
    return {format.type: value}


def _named(tools: Sequence[Tool], function: str) -> dict[str, Any]:
    """The schema of the arguments of a function."""
    for tool in tools:
        if tool.function.name == function:
            return tool.function.parameters or NO_PARAMETERS
    raise _wrong(f"tool_choice names {function!r}, which is not among the tools")


def _any_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of a call of one of these functions, with its name."""
    calls = []
    for tool in tools:
        parameters = tool.function.parameters or NO_PARAMETERS
        if '"$ref"' in json.dumps(parameters):
            raise _wrong(
                f"the parameters of {tool.function.name!r} have a $ref, which is read from the "
                "beginning of a schema: name the function in tool_choice"
            )
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _wrong(text: str) -> ApiError:
    return invalid_value(text, "tool_choice")
