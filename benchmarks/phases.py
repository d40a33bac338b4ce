"""Times of the phases of a build."""

import sys
import time


class Phases:
    """Prints the phases of a build as they begin, and takes their times.

    Attributes:
        seconds: of each phase that has ended, by name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = self._since = time.perf_counter()
        self._name = ""

    def __call__(self, name: str) -> None:
        """Begin a phase."""
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = round(now - self._since, 1)
        print(f"{now - self._begin:7.1f} s  {name}", file=sys.stderr, flush=True)
        self._name, self._since = name, now
