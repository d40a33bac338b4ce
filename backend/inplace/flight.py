"""A step between its launch and what comes of it."""

from dataclasses import dataclass

from inplace.batcher import Batch
from inplace.engines import Finish


@dataclass(slots=True)
class Flight:
    """A step that was launched.

    Attributes:
        batch: its rows and inputs.
        wanted: the outputs that are read.
        begin: when, in monotonic seconds.
        finish: waits for it; or why it could not be launched.
        seconds: from then until it was waited for.
        failed: the engine raised.
    """

    batch: Batch
    wanted: frozenset[str]
    begin: float
    finish: Finish | Exception
    seconds: float = 0.0
    failed: bool = False
