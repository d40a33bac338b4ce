"""Engines: each runs a program over states that are bound in place."""

from inplace.engines.base import NO_OTHER_THREADS, Finish, RepeatingEngine, StepEngine

__all__ = ["NO_OTHER_THREADS", "Finish", "RepeatingEngine", "StepEngine"]
