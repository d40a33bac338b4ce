"""Clients that come, go, vanish and misbehave, for seconds; `make soak` runs for minutes.

Replay: ``PYTHONPATH=tests:tests/long python -m soak --clients 60 --seconds 8 --seed N``.
"""

import os
import random
from pathlib import Path

import pytest
from soak.run import soak
from support.long import long_except

pytestmark = pytest.mark.server


@pytest.mark.parametrize(("clients", "seconds"), long_except([(60, 8)], [(60, 8), (200, 60)]))
def test_clients_that_come_go_vanish_and_misbehave_harm_no_other(
    clients: int, seconds: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("INPLACE_SOAK_SEED", random.SystemRandom().randrange(10**6)))
    print(f"python -m soak --clients {clients} --seconds {seconds} --seed {seed}")
    # memory is only judged by `make soak`: it has not settled after seconds
    judgement = soak(
        tmp_path, seconds=seconds, seed=seed, clients=clients, songs=60, idle=3.0, growth=1.0
    )
    assert judgement.faults == []
    assert set(judgement.numbers["came_to_their_end"]) == {
        "normal",
        "garbage",
        "idle",
        "vanish",
        "restart",
        "cancel",
        "kill",
    }
    assert judgement.numbers["tokens_compared"] > 80 * seconds
