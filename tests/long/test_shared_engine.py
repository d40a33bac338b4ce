"""Instances that share an engine under load, killed, and loaded again."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.engines import Engines
from support.faults import FORGOTTEN, Answer, Stream, add, kill, stubs
from support.generating import GrpcStream, long_stream
from support.instances import play
from support.models import greedy
from support.pool import EXPLICIT, ServerPool
from support.shared_engine import SLOTS, Shared, serve_shared, shared_models
from support.streams import prompt
from tritonclient.grpc import InferenceServerClient

pytestmark = [pytest.mark.long, pytest.mark.server]

INSTANCES = 3


@pytest.fixture(scope="module")
def shared(engines: Engines, pool: ServerPool) -> Iterator[Shared]:
    with serve_shared(engines, pool, INSTANCES, ("unary", "flow", "text")) as served:
        yield served


def test_steps_of_many_sequences_in_every_order(shared: Shared) -> None:
    with InferenceServerClient(shared.server.grpc_url) as client:
        refused, started = play(partial(add, client, "shared_unary"), 1, 400, SLOTS)
    assert (started, refused > 20) == (400, True)
    assert shared.sums("shared_unary", "inplace_slots") == [SLOTS, 0, 0]


def test_steps_over_streams_too(shared: Shared) -> None:
    with Stream(shared.server.grpc_url) as stream:

        def ask(number: int, value: float, *, start: bool = False, end: bool = False) -> Answer:
            stream.send("shared_flow", number, value, start=start, end=end)
            return stream.receive()

        refused, started = play(ask, 2, 400, SLOTS)
    assert (started, refused > 20) == (400, True)


def test_clients_at_once_get_what_they_get_alone(shared: Shared) -> None:
    """Steps of several instances arrive together, and share steps of the engine."""

    def one(seed: int) -> None:
        with InferenceServerClient(shared.server.grpc_url) as client:
            for round_ in range(10):
                number = f"{seed}-{round_}"
                for step in range(1, 21):
                    answer = add(
                        client, "shared_unary", number, seed + 1.0, start=step == 1, end=step == 20
                    )
                    assert answer == (step * (seed + 1.0), step)

    with ThreadPoolExecutor(SLOTS) as threads:
        list(threads.map(one, range(SLOTS)))


def test_a_copy_and_a_start_with_key_and_position_find_their_sequence(shared: Shared) -> None:
    own: dict[str, Any] = {"sequence_key": "mine"}
    with InferenceServerClient(shared.server.grpc_url) as client:
        ask = partial(add, client, "shared_unary")
        for original in range(1, SLOTS):
            value = float(original)
            assert ask(original, value, start=True, **own) == (value, 1)
            copy = ask(10 + original, 9.0, start=True, end=True, **{"from": original, **own})
            assert copy == (value + 9.0, 2)
            again = ask(original, 1.0, start=True, position=1, **own)
            assert again == (value + 1.0, 2)
        for original in range(1, SLOTS):
            assert ask(original, 1.0, end=True, **own) == (original + 2.0, 3)


def _killed(server: TritonServer, client: InferenceServerClient, model: str, owner: bool) -> None:
    ask = partial(add, client, model)
    numbers = range(1, SLOTS + 1)
    assert [ask(number, 1.0, start=True) for number in numbers] == [(1.0, 1)] * SLOTS
    processes = stubs(server, model)
    assert len(processes) == INSTANCES
    # The owner is the only one that has an arena, and listens.
    listening = {
        int(line.rsplit("/", 1)[1])
        for line in Path("/proc/net/unix").read_text().splitlines()
        if f"@inplace/{server.process.pid if server.process else 0}/" in line and "00010000" in line
    }
    [owning] = [process for process in processes if process in listening]
    victim = owning if owner else next(each for each in processes if each != owning)
    kill(victim, signal.SIGKILL)
    answers = {number: ask(number, 1.0) for number in numbers}
    alive = [number for number, answer in answers.items() if answer == (2.0, 2)]
    if owner:
        assert not alive
        assert all(
            "ENGINE_FAILED" in each or "not healthy" in each or FORGOTTEN in each
            for each in answers.values()
            if isinstance(each, str)
        ), answers
        return
    assert len(alive) >= SLOTS - 2, answers  # Triton divides four sequences over three
    assert all("not healthy" in each for each in answers.values() if isinstance(each, str))
    assert [ask(number, 1.0, end=True) for number in alive] == [(3.0, 3)] * len(alive)


@pytest.mark.parametrize("owner", [False, True], ids=["relay", "owner"])
def test_an_instance_that_is_killed_takes_only_its_own_requests_with_it(
    engines: Engines, tmp_path: Path, owner: bool
) -> None:
    """The owner has the states of all sequences; without it none goes on, and none waits."""
    (tmp_path / "repository").mkdir()
    [deployment] = shared_models(engines, ["unary"], INSTANCES)
    deployment.copy_to(tmp_path / "repository")
    with (
        TritonServer(tmp_path / "repository", Ports(0, 0, 0), log=tmp_path / "log") as server,
        InferenceServerClient(server.grpc_url) as client,
    ):
        _killed(server, client, "shared_unary", owner)


def test_a_model_that_is_loaded_again_is_served_by_its_new_engine(
    engines: Engines, tmp_path: Path
) -> None:
    (tmp_path / "repository").mkdir()
    [deployment] = shared_models(engines, ["text"], INSTANCES)
    deployment.copy_to(tmp_path / "repository")
    model, llama = "shared_text", long_stream(engines, SLOTS)[0]
    server = TritonServer(
        tmp_path / "repository", Ports(0, 0, 0), log=tmp_path / "log", arguments=EXPLICIT
    )
    with server, InferenceServerClient(server.grpc_url) as client:
        client.load_model(model)
        before = set(stubs(server, model))
        for round_ in range(2):
            with GrpcStream(server.grpc_url, model) as talk:
                for number in range(2 * INSTANCES):
                    ids = prompt(number, 5)
                    answer = talk.request(f"{round_}-{number}", ids, 4, start=True, end=True)
                    assert answer.tokens == greedy(llama, ids, 4), answer
            if not round_:
                (tmp_path / "repository" / model / "1" / "engine.json").touch()
                client.load_model(model)
        assert len(set(stubs(server, model)) - before) == INSTANCES
