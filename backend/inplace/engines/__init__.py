"""Engines: what runs a program over state that is bound in place."""

from inplace.engines.base import NO_OTHER_THREADS, Finish, StepEngine

__all__ = ["NO_OTHER_THREADS", "Finish", "StepEngine"]
