"""Engines: what runs a program over state that is bound in place."""

from inplace.engines.base import ALONE, Engine
from inplace.engines.loading import load_engine

__all__ = ["ALONE", "Engine", "load_engine"]
