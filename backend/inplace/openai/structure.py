"""What a reply must be: a response format, or calls of tools, as parameters of the backend."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inplace.errors import RequestError
from inplace.grammars.source import check_schema, without_annotations
from inplace.openai.call_reader import CallReader
from inplace.openai.calls import FORMATS, JSON, CallFormat, CallGrammar, Function
from inplace.openai.errors import ApiError, invalid_value
from inplace.openai.generations import check_value
from inplace.openai.models import ServedModel
from inplace.openai.schemas import ChatRequest, ResponseFormat, Tool, ToolChoice
from inplace.protocol import GRAMMAR

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of the arguments of a function without parameters."""


@dataclass(frozen=True)
class Structure:
    """What a reply must be.

    Attributes:
        options: request parameters of the backend.
        format: of the calls that it may have; None where it has none.
        functions: the names of the functions that it may call.
    """

    options: dict[str, Any]
    format: CallFormat | None = None
    functions: tuple[str, ...] = ()

    def reader(self) -> CallReader | None:
        """Reads the calls of one reply; None if it has none."""
        return None if self.format is None else CallReader(self.format, self.functions)


def structure_of(request: ChatRequest, model: ServedModel) -> Structure:
    """What the reply to a chat must be.

    Raises:
        ApiError: the fields do not fit together, a schema is refused, or it is not known how the
            model calls tools.
    """
    choice, tools = request.tool_choice, request.tools or []
    if request.parallel_tool_calls is not None and not tools:
        raise invalid_value("parallel_tool_calls needs tools", "parallel_tool_calls")
    if choice == "none" or (choice is None and not tools):
        return Structure(_format_options(request.response_format))
    if not tools:
        raise _wrong("tool_choice needs tools")
    named = choice.function.name if isinstance(choice, ToolChoice) else None
    functions = _functions(tools, named)
    may_call = choice in (None, "auto")
    call_format = model.call_format
    if call_format is None:
        if may_call:
            raise _unknown_format(model)
        call_format = JSON
    parallel = named is None and request.parallel_tool_calls is not False
    grammar = CallGrammar(call_format, functions, model.tokenizer, parallel=parallel)
    text = _auto(grammar, call_format, request) if may_call else _required(grammar, request)
    check_value(GRAMMAR, text, "tools")
    return Structure({GRAMMAR: text}, call_format, tuple(each.name for each in functions))


def _required(grammar: CallGrammar, request: ChatRequest) -> str:
    if request.response_format is not None and request.response_format.type != "text":
        raise _wrong("a reply that calls a tool has no response_format: leave out one of them")
    return grammar.required()


def _auto(grammar: CallGrammar, format: CallFormat, request: ChatRequest) -> str:
    """A reply that calls tools or not, as the model likes."""
    response = request.response_format
    if response is None or response.type == "text":
        return grammar.or_text()
    if response.type not in ("json_object", "json_schema") or not format.needs_opening:
        raise _wrong(
            f"a reply that may call a tool in the format {format.name!r} cannot have a "
            f"response_format of the type {response.type!r}: leave out one of them, or send "
            "tool_choice='none'"
        )
    schema = {"type": "object"} if response.json_schema is None else response.json_schema.schema_
    _check_schema(schema, "the schema", "response_format")
    return grammar.or_json(without_annotations(schema))


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


def _functions(tools: Sequence[Tool], named: str | None) -> list[Function]:
    """The functions that may be called: all, or the one that is named."""
    functions = [Function(tool.function.name, _schema(tool)) for tool in tools]
    names = [each.name for each in functions]
    if len(set(names)) < len(names):
        raise invalid_value("two tools have the same name", "tools")
    if named is None:
        return functions
    if named not in names:
        raise _wrong(f"tool_choice names {named!r}, which is not among the tools")
    return [functions[names.index(named)]]


def _schema(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object."""
    parameters = tool.function.parameters or NO_PARAMETERS
    what = f"the parameters of {tool.function.name!r}"
    if parameters.get("type", "object") != "object":
        raise invalid_value(f"{what} are not of the type 'object'", "tools")
    _check_schema(parameters, what, "tools")
    made: dict[str, Any] = without_annotations(parameters)
    return {"type": "object"} | made


def _check_schema(schema: dict[str, Any], what: str, param: str) -> None:
    try:
        check_schema(schema)
    except RequestError as error:
        raise invalid_value(f"{what}: {error}", param) from None


def _unknown_format(model: ServedModel) -> ApiError:
    return ApiError(
        400,
        f"it is not known in which format {model.name!r} calls tools, because its chat template "
        "names none that is read: send tool_choice='required', a function or 'none', or let the "
        f"operator name one of {', '.join(FORMATS)} with --tool-call-parser",
        param="tool_choice",
        code="unsupported_value",
    )


def _wrong(text: str) -> ApiError:
    return invalid_value(text, "tool_choice")
