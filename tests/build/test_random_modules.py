"""Random modules: each engine does what its module does, and what no engine can do is refused.

Every run tries the same few of each kind; `tests/long/test_random_modules.py` tries hundreds.
"""

import pytest
from support.random_checks import run

pytestmark = pytest.mark.independent

FEW = {
    "supported": 8,
    "rows and tokens": 5,
    "attention": 5,
    "written back whole": 2,
    "refused": 8,
}


@pytest.mark.parametrize("kind", FEW)
def test_random_modules(kind: str) -> None:
    run(kind, FEW[kind])
