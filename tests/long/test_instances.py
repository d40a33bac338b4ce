"""Two instances of a model with two slots each: four sequences, wherever Triton sends them.

Each instance is a process with an engine and an arena of its own. Every answer is compared with
what the sequence says alone.
"""

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inplace.client import Client, Sequence, SequenceLostError
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.engines import Engines
from support.faults import Answer, Stream, add, eventually, idle_after, kill, stubs
from support.generating import ENDLESS, GrpcStream, long_stream
from support.instances import NO_FREE_SLOT, play
from support.models import accumulator, greedy
from support.observed import by_instance
from support.pool import EXPLICIT, Deployment, ServerPool
from support.streams import prompt
from transformers import LlamaForCausalLM
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = [pytest.mark.long, pytest.mark.server]

SLOTS, INSTANCES = 2, 2
ALL = SLOTS * INSTANCES
IDLE = 3600.0


def _two(config: pb.ModelConfig) -> None:
    config.instance_group[0].count = INSTANCES


def _two_patient(config: pb.ModelConfig) -> None:
    _two(config)
    idle_after(config, IDLE)


@dataclass(frozen=True)
class Served:
    server: TritonServer
    llama: LlamaForCausalLM

    def metric(self, model: str, name: str) -> dict[str, float]:
        """By instance."""
        return by_instance(self.server, model, name)


@pytest.fixture(scope="module")
def accumulators(engines: Engines) -> Path:
    def build(path: Path) -> None:
        options = BuildOptions(slots=SLOTS, max_rows=SLOTS, capacity=1)
        write_engine(accumulator(max_rows=SLOTS), path / "pair", options)
        write_engine(
            accumulator(max_rows=SLOTS), path / "pair_flow", replace(options, serve="stream")
        )

    return engines.get("instances-accumulators", build)


@pytest.fixture(scope="module")
def served(engines: Engines, accumulators: Path, pool: ServerPool) -> Iterator[Served]:
    llama, model = long_stream(engines, SLOTS)
    deployments = [
        Deployment(accumulators / "pair", "pair", _two_patient),
        Deployment(accumulators / "pair_flow", "pair_flow", _two_patient),
        Deployment(model, "pair_text", _two, proxy=True),
    ]
    with pool.serve(*deployments) as server:
        yield Served(server, llama)


def test_steps_of_four_sequences_are_served_in_every_order(served: Served) -> None:
    with InferenceServerClient(served.server.grpc_url) as client:
        refused, started = play(partial(add, client, "pair"), 1, 250, ALL)
    assert (started, refused > 20) == (250, True)
    assert set(served.metric("pair", "inplace_slots").values()) == {SLOTS}


def test_steps_over_streams_are_too(served: Served) -> None:
    with Stream(served.server.grpc_url) as stream:

        def ask(number: int, value: float, *, start: bool = False, end: bool = False) -> Answer:
            stream.send("pair_flow", number, value, start=start, end=end)
            return stream.receive()

        refused, started = play(ask, 2, 250, ALL)
    assert (started, refused > 20) == (250, True)


def test_generations_of_four_sequences_run_at_once_and_say_what_they_say_alone(
    served: Served,
) -> None:
    """Some with START and END in one request, some in two, one after the other on four threads."""

    def one(thread: int) -> None:
        randomly = random.Random(thread)
        with GrpcStream(served.server.grpc_url, "pair_text") as talk:
            for number in range(12):
                ids, count = prompt(100 * thread + number, 5), randomly.randint(1, 12)
                name, whole = f"text-{thread}-{number}", randomly.random() < 0.5
                first = talk.request(name, ids, count, start=True, end=whole)
                expected = greedy(served.llama, ids, count)
                assert (first.tokens, first.reason) == (expected, "length"), first
                if not whole:
                    more = talk.request(name, [7], 3, end=True)
                    assert more.tokens == greedy(served.llama, [*ids, *expected, 7], 3), more

    with ThreadPoolExecutor(ALL) as threads:
        list(threads.map(one, range(ALL)))


@pytest.mark.parametrize("whole", [True, False])
def test_four_endless_generations_run_and_a_fifth_waits_for_any(
    served: Served, whole: bool
) -> None:
    with ExitStack() as stack:
        talks = [
            stack.enter_context(GrpcStream(served.server.grpc_url, "pair_text"))
            for _ in range(ALL + 1)
        ]
        for number, talk in enumerate(talks[:ALL]):
            talk.send(
                f"endless-{whole}-{number}", prompt(number, 5), ENDLESS, start=True, end=whole
            )
        for number, talk in enumerate(talks[:ALL]):
            tokens = talk.collect(20).tokens[:20]
            assert tokens == greedy(served.llama, prompt(number, 5), 20)
        talks[ALL].send(f"fifth-{whole}", prompt(9, 5), 5, start=True, end=True)
        for talk in talks[:ALL]:
            talk.drop()
        assert talks[ALL].collect().tokens == greedy(served.llama, prompt(9, 5), 5)
    eventually(
        lambda: sum(served.metric("pair_text", "inplace_sequences_live").values()) == 0,
        "cancelled generations leave no slot",
        10.0,
    )


def test_a_copy_begins_where_the_original_is(served: Served) -> None:
    """Triton sends the START of a copy to any instance."""
    own: dict[str, Any] = {"sequence_key": "mine"}
    with InferenceServerClient(served.server.grpc_url) as client:
        for original in range(1, ALL):
            value = float(original)
            assert add(client, "pair", original, value, start=True, **own) == (value, 1)
            copy = 10 + original
            answer = add(
                client, "pair", copy, 10.0, start=True, end=True, **{"from": original, **own}
            )
            full = original == SLOTS or NO_FREE_SLOT in str(answer)
            assert answer == (value + 10.0, 2) or full, answer
        for original in range(1, ALL):
            assert add(client, "pair", original, 1.0, end=True, **own) == (original + 1.0, 2)


def test_one_instance_killed_the_sequences_of_the_other_go_on_and_new_ones_are_served(
    accumulators: Path, tmp_path: Path
) -> None:
    """Some are sent to the dead one, which Triton does not notice; it cannot unload the model."""
    deployment = Deployment(accumulators / "pair", "pair_killed", _two_patient)
    (tmp_path / "repository").mkdir()
    deployment.copy_to(tmp_path / "repository")
    with (
        TritonServer(tmp_path / "repository", Ports(0, 0, 0), log=tmp_path / "log") as server,
        InferenceServerClient(server.grpc_url) as client,
    ):
        ask = partial(add, client, "pair_killed")
        numbers = range(1, ALL + 1)
        assert [ask(number, 1.0, start=True) for number in numbers] == [(1.0, 1)] * ALL
        kill(stubs(server, "pair_killed")[0], signal.SIGKILL)
        answers = {number: ask(number, 1.0) for number in numbers}
        alive = [number for number, answer in answers.items() if answer == (2.0, 2)]
        assert len(alive) == SLOTS
        assert all("not healthy" in each for each in answers.values() if isinstance(each, str))
        assert [ask(number, 1.0, end=True) for number in alive] == [(3.0, 3)] * SLOTS
        new = [ask(number, 1.0, start=True, end=True) for number in range(20, 30)]
        assert (1.0, 1) in new, new
        assert all(each == (1.0, 1) or "not healthy" in str(each) for each in new), new


def test_a_client_goes_on_by_itself_when_one_of_two_instances_is_killed(
    engines: Engines, accumulators: Path, tmp_path: Path
) -> None:
    """Triton leaves an id, and the lowest free place, with the dead instance; the client mends it.

    What runs there gets no response: the client waits for its timeout.
    """
    llama, model = long_stream(engines, SLOTS)
    (tmp_path / "repository").mkdir()
    for deployment in (
        Deployment(accumulators / "pair", "pair_killed", _two_patient),
        Deployment(model, "text_killed", _two_patient),
    ):
        deployment.copy_to(tmp_path / "repository")
    value = {"value": np.ones(4, np.float32)}
    with (
        TritonServer(tmp_path / "repository", Ports(0, 0, 0), log=tmp_path / "log") as server,
        Client(server.grpc_url) as client,
    ):
        chats = [Sequence(client, "text_killed", timeout=5.0) for _ in range(INSTANCES)]
        histories = [prompt(seed, 9) for seed in range(INSTANCES)]
        running = []
        for chat, history in zip(chats, histories, strict=True):
            generation = chat.generate(history, 12, text=False, ignore_eos=True)
            running.append((generation, iter(generation)))
            next(running[-1][1])
        sums = [Sequence(client, "pair_killed", timeout=5.0) for _ in range(INSTANCES)]
        for each in sums:
            assert each.step(value)["values"].tolist() == [1]
        for name in ("text_killed", "pair_killed"):
            kill(stubs(server, name)[0], signal.SIGKILL)

        for chat, history, (generation, rest) in zip(chats, histories, running, strict=True):
            list(rest)
            assert generation.tokens == greedy(llama, history, 12)
            history += [*generation.tokens, 7]
            again = chat.generate([7], 6, text=False, ignore_eos=True)
            list(again)
            assert again.tokens == greedy(llama, history, 6)
            chat.close()

        lost = 0
        for each in sums:
            try:
                assert each.step(value)["values"].tolist() == [2]
            except SequenceLostError:
                lost += 1
            each.close()
        assert lost == 1
        for _ in range(6):
            with Sequence(client, "pair_killed", timeout=5.0) as new:
                assert [new.step(value)["values"].tolist() for _ in range(3)] == [[1], [2], [3]]
            with Sequence(client, "text_killed", timeout=5.0) as new:
                said = new.generate(histories[0], 3, text=False, ignore_eos=True)
                list(said)
                assert said.tokens == greedy(llama, histories[0], 3)


def test_stored_sequences_are_restored_in_the_instances_with_free_slots(
    accumulators: Path, tmp_path: Path
) -> None:
    """They are live in no instance; each START comes to the one that Triton chooses."""
    (tmp_path / "secret").write_bytes(b"0123456789abcdef" * 2)

    def stored(config: pb.ModelConfig) -> None:
        _two_patient(config)
        config.parameters["snapshot_store"].string_value = (tmp_path / "store").as_uri()
        config.parameters["snapshot_secret_file"].string_value = str(tmp_path / "secret")

    (tmp_path / "repository").mkdir()
    Deployment(accumulators / "pair", "pair_stored", stored).copy_to(tmp_path / "repository")
    server = TritonServer(
        tmp_path / "repository", Ports(0, 0, 0), log=tmp_path / "log", arguments=EXPLICIT
    )
    with server, InferenceServerClient(server.grpc_url) as client:
        ask = partial(add, client, "pair_stored", sequence_key="k")
        numbers = range(1, ALL + 1)
        client.load_model("pair_stored")
        assert [ask(each, each, start=True) for each in numbers] == [(each, 1) for each in numbers]
        client.unload_model("pair_stored")
        eventually(lambda: not stubs(server, "pair_stored"), "the model is unloaded")
        client.load_model("pair_stored")
        answers = [ask(each, 1.0, start=True, restore=True, position=1) for each in numbers]
        assert answers == [(each + 1.0, 2) for each in numbers]
        eventually(
            lambda: (
                list(by_instance(server, "pair_stored", "inplace_sequences_live").values())
                == [SLOTS] * INSTANCES
            ),
            "both instances are full",
        )
        full = ask(ALL + 1, 1.0, start=True)
        assert NO_FREE_SLOT in str(full)
        answers = [ask(each, 1.0, end=True) for each in numbers]
        assert answers == [(each + 2.0, 3) for each in numbers]
