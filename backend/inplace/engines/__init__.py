"""Engines: what runs a program over state that is bound in place."""

from inplace.engines.base import ALONE, Engine, Finish
from inplace.runtime.loading import load_engine

__all__ = ["ALONE", "Engine", "Finish", "load_engine"]
