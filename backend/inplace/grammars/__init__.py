"""Grammars: what the text of a generation must be."""

from inplace.grammars.service import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarMatcher,
    Next,
    wait_for_masks,
)
from inplace.grammars.source import GrammarSource
from inplace.grammars.tools import (
    Tool,
    ToolCall,
    ToolFormat,
    parse_tool_calls,
    tool_parameters,
)

__all__ = [
    "CompiledGrammar",
    "GrammarCompiler",
    "GrammarMatcher",
    "GrammarSource",
    "Next",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "parse_tool_calls",
    "tool_parameters",
    "wait_for_masks",
]
