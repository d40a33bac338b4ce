"""Drivers: how requests reach the one step function. ``step`` answers inside the server's call."""

from inplace.drivers.step import Answer, StepDriver

__all__ = ["Answer", "StepDriver"]
