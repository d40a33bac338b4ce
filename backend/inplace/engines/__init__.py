"""Engines: what runs a program over state that is bound in place."""

from inplace.engines.base import Engine
from inplace.engines.loading import load_engine

__all__ = ["Engine", "load_engine"]
