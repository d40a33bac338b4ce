"""Engines: what runs a program over state that is bound in place."""

from inplace.engines.base import ALONE, Finish, StepEngine
from inplace.runtime.loading import load_engine

__all__ = ["ALONE", "Finish", "StepEngine", "load_engine"]
