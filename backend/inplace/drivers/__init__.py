"""Drivers: how requests reach the step function of a model instance.

`StepDriver` answers inside the server's call. `StreamDriver` queues requests, steps the engine on a
thread of its own and answers from others; it serves generations.
"""

from inplace.drivers.parsing import TokenizerConfig
from inplace.drivers.step_driver import StepDriver
from inplace.drivers.stream_driver import Arrival, StreamDriver, engine_thread

__all__ = ["Arrival", "StepDriver", "StreamDriver", "TokenizerConfig", "engine_thread"]
