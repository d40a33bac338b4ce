"""Instances that share the engine of the first (`inplace.server.relay`).

The sequences of all of them have the slots of one arena, whichever instance Triton sends them to.
`tests/long/test_shared_engine.py` kills instances and loads the model again.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from support.engines import Engines
from support.faults import add, eventually
from support.generating import ENDLESS, GrpcStream
from support.instances import play
from support.models import greedy
from support.pool import ServerPool
from support.shared_engine import SLOTS, Shared, serve_shared
from support.streams import prompt
from tritonclient.grpc import InferenceServerClient

pytestmark = pytest.mark.server

INSTANCES = 2


@pytest.fixture(scope="module")
def shared(engines: Engines, pool: ServerPool) -> Iterator[Shared]:
    with serve_shared(engines, pool, INSTANCES, ("unary", "text")) as served:
        yield served


def test_steps_are_served_in_every_order_with_the_slots_of_one_arena(shared: Shared) -> None:
    with InferenceServerClient(shared.server.grpc_url) as client:
        refused, started = play(partial(add, client, "shared_unary"), 1, 60, SLOTS)
    assert started == 60
    assert refused > 5
    assert shared.sums("shared_unary", "inplace_slots") == [SLOTS, 0]
    assert shared.sums("shared_unary", "inplace_state_bytes")[1] == 0
    eventually(  # metrics are exported from time to time
        lambda: shared.sums("shared_unary", "inplace_requests_forwarded_total")[1] > 0,
        "the second instance has forwarded requests",
    )
    eventually(
        lambda: sum(shared.sums("shared_unary", "inplace_places_open")) == 0,
        "every place in Triton is freed",
    )


def test_generations_are_those_of_the_model_and_a_client_that_leaves_frees_its_slot(
    shared: Shared,
) -> None:
    def one(seed: int) -> None:
        with GrpcStream(shared.server.grpc_url, "shared_text") as talk:
            ids = prompt(seed, 5)
            first = talk.request(f"text-{seed}", ids, 9, start=True)
            expected = greedy(shared.llama, ids, 9)
            assert first.tokens == expected
            more = talk.request(f"text-{seed}", [7], 5, end=True)
            assert more.tokens == greedy(shared.llama, [*ids, *expected, 7], 5)

    with ThreadPoolExecutor(SLOTS) as threads:
        list(threads.map(one, range(2 * SLOTS)))
    talks = [GrpcStream(shared.server.grpc_url, "shared_text") for _ in range(SLOTS)]
    for number, talk in enumerate(talks):
        talk.send(f"endless-{number}", prompt(number, 5), ENDLESS, start=True)
        assert talk.collect(5).tokens[:5] == greedy(shared.llama, prompt(number, 5), 5)
    for talk in talks:
        talk.drop()
    eventually(
        lambda: sum(shared.sums("shared_text", "inplace_sequences_live")) == 0,
        "cancelled generations leave no slot",
    )
    one(99)
