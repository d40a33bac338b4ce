"""Drivers: how requests reach the one step function. ``step`` answers inside the server's call, ``stream`` from threads of its own."""

from inplace.drivers.step import Answer, StepDriver
from inplace.drivers.stream import Language, StreamDriver

__all__ = ["Answer", "Language", "StepDriver", "StreamDriver"]
