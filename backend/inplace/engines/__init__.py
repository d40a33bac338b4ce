"""Engines: what runs a program over state that is bound in place."""

from inplace.engines.base import ALONE, Finish, StepEngine

__all__ = ["ALONE", "Finish", "StepEngine"]
