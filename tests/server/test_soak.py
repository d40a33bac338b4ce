"""A short soak; `make soak` is the long one. Replay: ``PYTHONPATH=tests:tests/long python -m soak --clients 80 --seconds 12 --seed N``."""

import os
import random
from pathlib import Path

import pytest
from soak.run import soak

pytestmark = pytest.mark.server


def test_clients_that_come_go_vanish_and_misbehave_harm_nobody(tmp_path: Path) -> None:
    seed = int(os.environ.get("INPLACE_SOAK_SEED", random.SystemRandom().randrange(10**6)))
    print(f"PYTHONPATH=tests:tests/long python -m soak --clients 80 --seconds 12 --seed {seed}")
    # memory is only judged by the long one: in some seconds it has not settled
    found = soak(tmp_path, seconds=12, seed=seed, clients=80, songs=60, idle=5.0, growth=1.0)
    assert found.faults == []
    assert set(found.numbers["came_to_their_end"]) == {
        "normal",
        "garbage",
        "idle",
        "vanish",
        "restart",
        "cancel",
    }
    assert found.numbers["tokens_compared"] > 1000
