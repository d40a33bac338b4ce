"""Grammars: what the text of a generation must be."""

from inplace.grammars.service import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarMatcher,
    Next,
    wait_for_masks,
)
from inplace.grammars.source import GrammarSource

__all__ = [
    "CompiledGrammar",
    "GrammarCompiler",
    "GrammarMatcher",
    "GrammarSource",
    "Next",
    "wait_for_masks",
]
