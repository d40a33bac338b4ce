"""Tool calls: grammars that make a model call a tool, and calls that are read from a text."""

import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from inplace.errors import RequestError
from inplace.grammars import (
    GrammarCompiler,
    GrammarSource,
    Tool,
    ToolCall,
    ToolFormat,
    parse_tool_calls,
    tool_parameters,
)
from support.matching import follow
from support.models import VOCABULARY
from support.vocabulary import tiny_tokenizer

CITY = {"$defs": {"name": {"enum": ["Oslo", "Rome"]}}, "type": "object"} | {
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
}
COUNT = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]} | {
    "additionalProperties": False
}
TOOLS = [Tool("weather", CITY), Tool("count", COUNT)]


@pytest.mark.parametrize("tool_format", ["hermes", "llama3_json"])
def test_a_random_model_calls_the_tools_that_it_must(tool_format: ToolFormat) -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), VOCABULARY, {2})
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    for choice, names in [("required", {"weather", "count"}), ("count", {"count"})]:
        given: dict[str, Any] = {**tool_parameters(TOOLS, choice, tool_format)}
        source = GrammarSource.parse(given)
        assert source is not None
        called = set()
        for seed in range(8):
            text = follow(compiler, source, seed)
            content, [call] = parse_tool_calls(text, tool_format)
            assert content == ""
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
            called.add(call.name)
        assert called == names
    compiler.close()


def test_nothing_is_enforced_where_no_call_is_asked_for() -> None:
    assert tool_parameters(TOOLS, "auto", "hermes") == tool_parameters([], "none", "hermes") == {}
    with pytest.raises(RequestError, match="asks for 'missing'; expected 'none', 'auto'"):
        tool_parameters(TOOLS, "missing", "hermes")
    with pytest.raises(RequestError, match="the keyword 'not' at # is not supported"):
        tool_parameters([Tool("odd", {"not": {}})], "auto", "hermes")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", []),
        (
            'Wait.\n<tool_call>\n{"name": "a", "arguments": {"x": "\u00e9"}}\n</tool_call>\n'
            '<tool_call>{"name": "b"}</tool_call>',
            "Wait.",
            [ToolCall("a", '{"x": "\u00e9"}'), ToolCall("b", "{}")],
        ),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", []),
        ('<tool_call>{"name": "a"}', '<tool_call>{"name": "a"}', []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ],
)
def test_calls_are_read_from_a_text(text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text, "hermes") == (content, calls)


def test_a_call_of_llama_is_the_whole_text() -> None:
    call = '{"name": "a", "parameters": {"x": 1}}'
    assert parse_tool_calls(call, "llama3_json") == ("", [ToolCall("a", '{"x": 1}')])
    assert parse_tool_calls(f"x {call}", "llama3_json") == (f"x {call}", [])
