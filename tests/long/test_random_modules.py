"""Hundreds of random modules of each kind; `tests/build/test_random_modules.py` tries a few."""

import pytest
from support.random_checks import run

pytestmark = pytest.mark.long

MODULES = {
    "supported": 500,
    "rows and tokens": 250,
    "attention": 250,
    "written back whole": 100,
    "refused": 500,
    "layers": 300,
}
SHARD = 25
"""Modules of one test, so that the processes of a run share them."""


@pytest.mark.parametrize(
    ("kind", "shard"),
    [(kind, shard) for kind, count in MODULES.items() for shard in range(count // SHARD)],
)
def test_random_modules(kind: str, shard: int) -> None:
    run(kind, SHARD, shard)
