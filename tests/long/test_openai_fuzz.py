"""Random bodies for the OpenAI front end, many; and clients that leave."""

from pathlib import Path

import pytest
from front_soak.run import soak

pytestmark = [pytest.mark.server, pytest.mark.long]


def test_ten_thousand_bodies_and_clients_that_leave_harm_nothing(tmp_path: Path) -> None:
    result = soak(tmp_path, bodies=10_000, seconds=120.0, clients=50, seed=0)
    assert result.faults == []
    assert result.numbers["bodies"]["200"] > 1000
    assert result.numbers["statuses"]["200"] > 100
