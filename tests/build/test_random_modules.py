"""Random modules: each engine does what its module does, and what no engine can do is refused.

Every run tries the same few of each kind; `tests/long/test_random_modules.py` tries hundreds.
"""

import pytest
from support.random_checks import run

pytestmark = pytest.mark.slow

FEW = {
    "supported": 4,
    "rows and tokens": 2,
    "attention": 2,
    "written back whole": 1,
    "refused": 4,
    "layers": 1,
}


@pytest.mark.parametrize("kind", FEW)
def test_random_modules(kind: str) -> None:
    run(kind, FEW[kind])
