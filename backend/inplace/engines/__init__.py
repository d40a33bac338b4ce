"""Engines: what runs a program over state that is bound in place."""

from inplace.engines.base import ALONE, Engine, Later, Launched
from inplace.engines.loading import load_engine

__all__ = ["ALONE", "Engine", "Later", "Launched", "load_engine"]
