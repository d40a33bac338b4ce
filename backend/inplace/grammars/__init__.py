"""Grammars: what the text of a generation must be."""

from inplace.grammars.service import (
    MAX_GENERATED,
    CompiledGrammar,
    GrammarCompiler,
    GrammarMatcher,
    Next,
    wait_for_masks,
)
from inplace.grammars.source import GrammarSource

__all__ = [
    "MAX_GENERATED",
    "CompiledGrammar",
    "GrammarCompiler",
    "GrammarMatcher",
    "GrammarSource",
    "Next",
    "wait_for_masks",
]
