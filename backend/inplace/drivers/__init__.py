"""Drivers: how requests reach the one step function. ``step`` answers inside the server's call, ``stream`` from threads of its own."""

from inplace.drivers.parsing import TokenizerConfig
from inplace.drivers.step import Answer, StepDriver
from inplace.drivers.stream import Arrived, StreamDriver, engine_thread

__all__ = ["Answer", "Arrived", "StepDriver", "StreamDriver", "TokenizerConfig", "engine_thread"]
