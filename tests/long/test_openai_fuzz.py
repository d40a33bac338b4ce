"""Random bodies for the OpenAI front end, many."""

from collections import Counter
from pathlib import Path

import hypothesis
import pytest
from inplace.openai import Frontend
from support.fronts import running
from support.openai_bodies import REQUESTS, check_answer
from support.served import Served

pytestmark = [pytest.mark.server, pytest.mark.long]


def test_ten_thousand_bodies_are_answered(served: Served, stream_models: Path) -> None:
    statuses: Counter[int] = Counter()
    with running(Frontend([served.server.grpc_url], stream_models)) as front:

        @hypothesis.settings(max_examples=10_000, derandomize=False)
        @hypothesis.given(REQUESTS)
        def send(request: tuple[str, bytes]) -> None:
            statuses[check_answer(front, *request)] += 1

        send()
        front.wait_for("inplace_openai_requests_in_flight", 1)
        assert front.send("/health")[0] == 200
    assert statuses[200] > 1000
