"""Which cases of a test `make test` runs, and which are left to `make test-long`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long_except(kept: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters of a test or a fixture: all but the kept ones are marked ``long``.

    A tuple is a set of parameters. Each one that is kept must be among all of them.
    """
    cases = list(every)
    assert all(case in cases for case in kept), [case for case in kept if case not in cases]
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=[] if case in kept else pytest.mark.long))
    return marked
