"""Accumulators that come and go over several instances, each compared with what it is alone."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from support.faults import FORGOTTEN, Answer

NO_FREE_SLOT = "INPLACE-NO_FREE_SLOT retryable=1"


@dataclass
class Sequences:
    """Accumulators that are live, and what each has added up."""

    sums: dict[int, tuple[float, int]] = field(default_factory=dict)

    def expect(self, number: int, value: float, *, start: bool, end: bool) -> tuple[float, int]:
        total, count = (0.0, 0) if start else self.sums[number]
        self.sums[number] = total + value, count + 1
        return self.sums.pop(number) if end else self.sums[number]


def play(ask: Callable[..., Answer], seed: int, num_sequences: int, slots: int) -> tuple[int, int]:
    """Start, step and end sequences at random, as many at a time as there are slots.

    An id that was refused is used again soon, also at once.

    Returns:
        How many STARTs were refused, each with all slots taken, and how many were served.
    """
    randomly, live = random.Random(seed), Sequences()
    refused = started = 0
    while started < num_sequences or live.sums:
        idle = [number for number in range(1, 2 * slots) if number not in live.sums]
        if started < num_sequences and randomly.random() < 0.5:
            number, end = randomly.choice(idle), randomly.random() < 0.1
            if len(live.sums) == slots:
                answer = ask(number, 1.0, start=True, end=end)
                assert NO_FREE_SLOT in str(answer), answer
                refused += 1
                continue
            value = float(randomly.randint(1, 9))
            answer = ask(number, value, start=True, end=end)
            assert answer == live.expect(number, value, start=True, end=end)
            started += 1
        elif live.sums:
            number, end = randomly.choice(list(live.sums)), randomly.random() < 0.5
            answer = ask(number, 2.0, end=end)
            while FORGOTTEN in str(answer):  # an END of the backend's crossed the START
                time.sleep(0.05)
                answer = ask(number, 2.0, end=end)
            assert answer == live.expect(number, 2.0, start=False, end=end)
    return refused, started
