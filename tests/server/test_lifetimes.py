"""Sequences that come, go, vanish and overlap on a real tritonserver, and what becomes of them.

`patient` lets requests wait a quarter of a second for others to share their step, `full` takes
four sequences at a time (as many as it has slots) and forgets them after a second, `twins` has two
instances. All are accumulators: a step that ran twice, not at all or in another slot shows in its
sum.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from inplace_builder.tools.tritonserver import TritonServer
from support.faults import (
    BLANK,
    FORGOTTEN,
    SLOTS,
    Stream,
    add,
    eventually,
    idle_after,
    kill,
    stubs,
)
from support.instances import play
from support.models import Repository
from support.pool import Deployment, ServerPool
from support.streams import batch_counts
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

DELAY, IDLE = 0.5, 1.0


def _patient(config: pb.ModelConfig) -> None:
    config.sequence_batching.oldest.max_queue_delay_microseconds = int(DELAY * 1e6)


def _full(config: pb.ModelConfig) -> None:
    idle_after(config, IDLE)
    config.sequence_batching.oldest.max_candidate_sequences = SLOTS + 2


def _twins(config: pb.ModelConfig) -> None:
    config.instance_group[0].count = 2


@pytest.fixture(scope="module")
def accumulating(repository: Repository, pool: ServerPool) -> Iterator[TritonServer]:
    changes = {"patient": _patient, "full": _full, "twins": _twins}
    source = repository.path / "accumulator"
    models = [Deployment(source, name, change) for name, change in changes.items()]
    with pool.serve(*models) as running:
        yield running


@pytest.fixture
def client(accumulating: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(accumulating.grpc_url) as connected:
        yield connected


@pytest.fixture
def stream(accumulating: TritonServer) -> Iterator[Stream]:
    with Stream(accumulating.grpc_url) as opened:
        yield opened


def free(client: InferenceServerClient, model: str, ids: range, slots: int = SLOTS) -> int:
    """How many sequences can be started; they are ended again."""
    with ThreadPoolExecutor(slots + 1) as pool:  # in one batch where the model waits for more
        chosen = ids[: slots + 1]
        answers = list(pool.map(lambda one: add(client, model, one, 1.0, start=True), chosen))
        list(pool.map(lambda one: add(client, model, one, 0.0, end=True), chosen))
    assert all(
        answer == (1.0, 1) or "INPLACE-NO_FREE_SLOT retryable=1" in str(answer)
        for answer in answers
    ), answers
    return answers.count((1.0, 1))


def test_a_batch_with_one_bad_request_serves_the_others(
    client: InferenceServerClient, stream: Stream
) -> None:
    for number in range(1, 5):
        assert add(client, "patient", number, number, start=True) == (number, 1)
    before = batch_counts(client, "patient").get(4, 0)
    for number in range(1, 5):
        stream.send("patient", number, 10.0, position=7 if number == 3 else 1)
    answers = [stream.receive() for _ in range(4)]
    eventually(
        lambda: batch_counts(client, "patient").get(4, 0) == before + 1, "they were one batch"
    )
    assert [answer for answer in answers if isinstance(answer, tuple)] == [
        (11.0, 2),
        (12.0, 2),
        (14.0, 2),
    ]
    (refused,) = [answer for answer in answers if isinstance(answer, str)]
    assert "INPLACE-POSITION retryable=0 sequence=3 " in refused
    assert [add(client, "patient", number, 0.0, end=True) for number in (1, 2, 3, 4)] == [
        (11.0, 3),
        (12.0, 3),
        (3.0, 2),
        (14.0, 3),
    ]


@pytest.mark.parametrize("trial", range(2))
def test_without_a_key_a_pipelined_end_may_hit_the_next_sequence_of_its_id(
    stream: Stream, client: InferenceServerClient, trial: int
) -> None:
    """Triton gives the second START a place of its own, beside the END, not behind it."""
    for value, flags in ((1.0, "start"), (10.0, "end"), (100.0, "start"), (1000.0, "")):
        stream.send("patient", "again", value, start=flags == "start", end=flags == "end")
    first, end, second, step = (stream.receive() for _ in range(4))
    assert (first, second) == ((1.0, 1), (100.0, 1))
    in_order = end == (11.0, 2) and step == (1100.0, 2)
    overtaken = end == (110.0, 2) and isinstance(step, str) and "INPLACE-UNKNOWN_SEQUENCE" in step
    assert in_order or overtaken, (end, step)
    add(client, "patient", "again", 0.0, end=True)
    assert free(client, "patient", range(50, 60)) == SLOTS


@pytest.mark.parametrize("trial", range(2))
def test_with_keys_a_pipelined_end_ends_its_own_sequence_only(
    stream: Stream, client: InferenceServerClient, trial: int
) -> None:
    for value, flags, key in (
        (1.0, "start", "old"),
        (10.0, "end", "old"),
        (100.0, "start", "new"),
        (1000.0, "", "new"),
    ):
        stream.send(
            "patient", "keyed", value, start=flags == "start", end=flags == "end", sequence_key=key
        )
    first, end, second, step = (stream.receive() for _ in range(4))
    assert (first, end) == ((1.0, 1), (11.0, 2))
    if isinstance(second, str):  # it overtook the END: nothing was changed, and it may come again
        assert "INPLACE-SEQUENCE_KEY retryable=1 sequence=keyed " in second
        assert isinstance(step, str) and "INPLACE-UNKNOWN_SEQUENCE" in step
        second, step = (
            add(client, "patient", "keyed", v, start=v == 100.0, sequence_key="new")
            for v in (100.0, 1000.0)
        )
    assert (second, step) == ((100.0, 1), (1100.0, 2))
    assert add(client, "patient", "keyed", 0.0, end=True, sequence_key="new") == (1100.0, 3)


def test_a_foreign_end_is_refused_and_the_owner_goes_on_once_its_place_is_open_again(
    client: InferenceServerClient,
) -> None:
    assert add(client, "patient", 5, 1.0, start=True, sequence_key="mine") == (1.0, 1)
    assert "INPLACE-SEQUENCE_KEY retryable=0" in str(add(client, "patient", 5, 1.0, end=True))
    assert "INPLACE-SEQUENCE_KEY" in str(
        add(client, "patient", 5, 1.0, start=True)
    )  # has a place in Triton again, the slot is unchanged
    assert add(client, "patient", 5, 1.0, sequence_key="mine") == (2.0, 2)
    assert "INPLACE-SEQUENCE_KEY" in str(
        add(client, "patient", 5, 1.0, end=True, sequence_key="guess")
    )
    answers: list[object] = []

    def served() -> bool:
        answers.append(add(client, "patient", 5, 1.0, sequence_key="mine"))
        return FORGOTTEN not in str(answers[-1])

    eventually(served, "the backend opens the place again")
    assert answers[-1] == (3.0, 3)
    assert add(client, "patient", 5, 1.0, end=True, sequence_key="mine") == (4.0, 4)


def test_a_step_cancelled_while_it_waits_alone_vanishes_and_its_sequence_goes_on(
    client: InferenceServerClient,
) -> None:
    assert add(client, "patient", 6, 1.0, start=True) == (1.0, 1)
    assert "DEADLINE_EXCEEDED" in str(add(client, "patient", 6, 50.0, timeout=DELAY / 3))
    time.sleep(DELAY)
    assert add(client, "patient", 6, 1.0) == (2.0, 2)
    assert add(client, "patient", 6, 1.0, end=True) == (3.0, 3)


def test_several_waiting_steps_cancelled_end_the_sequence_in_triton_and_its_owner_goes_on(
    accumulating: TritonServer, client: InferenceServerClient
) -> None:
    assert add(client, "patient", 7, 1.0, start=True, sequence_key="k") == (1.0, 1)
    with Stream(accumulating.grpc_url) as dropped:
        for _ in range(2):
            dropped.send("patient", 7, 50.0, sequence_key="k")
        time.sleep(DELAY / 3)
        dropped.drop()
    time.sleep(DELAY)
    assert FORGOTTEN in str(add(client, "patient", 7, 1.0, sequence_key="k"))
    assert add(client, "patient", 7, 1.0, start=True, sequence_key="k", position=1) == (2.0, 2)
    assert add(client, "patient", 7, 1.0, end=True, sequence_key="k") == (3.0, 3)


def test_a_cancelled_step_takes_those_behind_it_along_which_hear_nothing_but_that(
    accumulating: TritonServer, stream: Stream, client: InferenceServerClient
) -> None:
    """Its stream gets a response without outputs and without an error."""
    stream.send("patient", 77, 1.0, start=True, sequence_key="k")
    with Stream(accumulating.grpc_url) as dropped, Stream(accumulating.grpc_url) as other:
        time.sleep(DELAY / 10)
        dropped.send("patient", 77, 50.0, sequence_key="k")
        time.sleep(DELAY / 10)
        other.send("patient", 77, 10.0, sequence_key="k")
        time.sleep(DELAY / 5)
        dropped.drop()
        assert (stream.receive(), other.receive()) == ((1.0, 1), BLANK)
    assert add(client, "patient", 77, 10.0, start=True, sequence_key="k", position=1) == (11.0, 2)
    assert add(client, "patient", 77, 1.0, end=True, sequence_key="k") == (12.0, 3)


def test_a_start_cancelled_while_it_waits_holds_no_slot(client: InferenceServerClient) -> None:
    assert "DEADLINE_EXCEEDED" in str(
        add(client, "patient", 8, 50.0, start=True, timeout=DELAY / 3)
    )
    time.sleep(DELAY)
    assert "INPLACE-UNKNOWN_SEQUENCE" in str(
        add(client, "patient", 8, 1.0)
    )  # Triton knows it, the backend does not
    assert free(client, "patient", range(60, 70)) == SLOTS
    assert add(client, "patient", 8, 1.0, start=True, end=True) == (1.0, 1)


def test_an_end_cancelled_while_it_waits_leaves_its_slot_to_the_idle_clock_or_the_next_start(
    client: InferenceServerClient,
) -> None:
    assert add(client, "patient", 9, 1.0, start=True) == (1.0, 1)
    assert "DEADLINE_EXCEEDED" in str(add(client, "patient", 9, 1.0, end=True, timeout=DELAY / 3))
    time.sleep(DELAY)
    assert FORGOTTEN in str(add(client, "patient", 9, 1.0))
    assert free(client, "patient", range(70, 80)) == SLOTS - 1
    assert add(client, "patient", 9, 1.0, start=True, end=True) == (1.0, 1)
    assert free(client, "patient", range(80, 90)) == SLOTS


def test_a_sequence_belongs_to_its_id_not_to_the_stream_that_dropped(
    accumulating: TritonServer, client: InferenceServerClient
) -> None:
    with Stream(accumulating.grpc_url) as dropped:
        dropped.send("twins", "moving", 1.0, start=True)
        assert dropped.receive() == (1.0, 1)
    assert add(client, "twins", "moving", 1.0) == (2.0, 2)
    assert add(client, "twins", "moving", 1.0, end=True) == (3.0, 3)


def test_a_start_near_the_number_of_triton_s_places_is_refused_until_one_is_free(
    client: InferenceServerClient,
) -> None:
    """Beyond that number it would wait in Triton, which the backend does not see."""
    for number in range(1, SLOTS + 1):
        assert add(client, "full", number, 1.0, start=True) == (1.0, 1)
    for number, code in ((5, "NO_FREE_SLOT"), (7, "QUEUE_FULL")):
        refusal = str(add(client, "full", number, 1.0, start=True, timeout=60.0))
        assert f"INPLACE-{code} retryable=1" in refusal
    assert add(client, "full", 2, 1.0, end=True) == (2.0, 2)
    eventually(lambda: add(client, "full", 6, 1.0, start=True) == (1.0, 1), "the place is free")
    for number in (1, 3, 4, 6):
        add(client, "full", number, 1.0, end=True)


def test_refused_starts_do_not_fill_triton_s_places(client: InferenceServerClient) -> None:
    """There are far more places than slots: the sixtieth START is refused as fast as the first."""
    for number in range(100, 108):
        assert add(client, "twins", number, 1.0, start=True) == (1.0, 1)
    for number in range(108, 168):
        assert "INPLACE-NO_FREE_SLOT retryable=1" in str(
            add(client, "twins", number, 1.0, start=True)
        )
    for number in range(100, 168):
        add(client, "twins", number, 0.0, end=True)
    assert free(client, "twins", range(170, 190), slots=8) == 8


def test_two_instances_have_two_arenas_and_a_sequence_stays_in_one(
    accumulating: TritonServer, client: InferenceServerClient
) -> None:
    assert len(stubs(accumulating, "twins")) == 2
    for number in range(1, 9):
        assert add(client, "twins", number, number, start=True) == (number, 1)
    assert "INPLACE-NO_FREE_SLOT retryable=1 sequence=9 request=-: all 4 slots" in str(
        add(client, "twins", 9, 1.0, start=True)
    )
    for step in range(2, 6):
        for number in range(1, 9):
            assert add(client, "twins", number, number) == (step * number, step)
    for number in (3, 4):
        assert add(client, "twins", number, number, end=True) == (6 * number, 6)
    for number in (9, 10):
        assert add(client, "twins", number, 1.0, start=True) == (1.0, 1)
    for number in (1, 2, 5, 6, 7, 8, 9, 10):
        assert isinstance(add(client, "twins", number, 0.0, end=True), tuple)


def test_of_two_instances_the_start_that_goes_on_reaches_the_one_that_has_the_sequence(
    client: InferenceServerClient,
) -> None:
    """Triton forgets the sequence at the refused END, and may choose either for the START."""
    for number in range(11, 15):
        assert add(client, "twins", number, 1.0, start=True, sequence_key="mine") == (1.0, 1)
        assert "INPLACE-SEQUENCE_KEY" in str(add(client, "twins", number, 1.0, end=True))
    for number in range(11, 15):
        own: dict[str, Any] = {"sequence_key": "mine"}
        assert add(client, "twins", number, 1.0, start=True, position=1, **own) == (2.0, 2)
        assert add(client, "twins", number, 1.0, end=True, **own) == (3.0, 3)


def test_two_instances_serve_as_many_sequences_as_both_have_slots_in_every_order(
    client: InferenceServerClient,
) -> None:
    """Ids that were refused START again at once, while Triton has their place somewhere."""
    refused, started = play(partial(add, client, "twins"), 1, 150, 2 * SLOTS)
    assert (started, refused > 10) == (150, True)


VANISHING = """
import sys, time
from support.faults import Stream
stream = Stream(sys.argv[1])
for number in range(1, 5):
    stream.send("full", number, 1.0, start=True)
print([stream.receive() for _ in range(4)], flush=True)
while True:
    stream.send("full", 1, 1.0)
"""


def test_a_killed_client_keeps_its_slots_until_they_are_idle(
    accumulating: TritonServer, client: InferenceServerClient
) -> None:
    """And what it had under way neither answers nor harms anybody."""
    tests = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", VANISHING, accumulating.grpc_url],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(tests)},
    ) as vanishing:
        assert vanishing.stdout is not None
        line = vanishing.stdout.readline()
        time.sleep(0.2)
        kill(vanishing.pid, signal.SIGKILL)  # before any assertion: it never ends by itself
    assert line == "[(1.0, 1), (1.0, 1), (1.0, 1), (1.0, 1)]\n"
    result = add(client, "full", 9, 1.0, start=True)  # waits in Triton until it forgets one
    while result != (1.0, 1):
        assert "INPLACE-NO_FREE_SLOT retryable=1" in str(result)
        time.sleep(0.05)
        result = add(client, "full", 9, 1.0, start=True)
    add(client, "full", 9, 0.0, end=True)
    time.sleep(1.5 * IDLE)
    assert FORGOTTEN in str(add(client, "full", 1, 1.0))
    assert free(client, "full", range(20, 30), slots=3) == 4
