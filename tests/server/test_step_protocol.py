"""The step protocol on a real tritonserver: a tiny random Llama against transformers."""

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from inplace.client import Sequence
from inplace_builder.tools.tritonserver import TritonServer
from support.faults import eventually
from support.models import BRIEF_IDLE, BRIEF_SLOTS, CAPACITY, SLOTS, VOCABULARY, Repository, greedy
from support.streams import batch_counts, generate, prompt, retried, split
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17, 40])
def test_greedy_tokens_equal_transformers(
    client: InferenceServerClient, repository: Repository, length: int
) -> None:
    with Sequence(client, "llama") as sequence:
        assert generate(sequence, prompt(length, length), 16) == greedy(
            repository.llama, prompt(length, length), 16
        )


def test_a_prompt_in_random_parts_is_the_same_prompt(
    client: InferenceServerClient, repository: Repository
) -> None:
    ids = prompt(1, 40)
    expected = greedy(repository.llama, ids, 8)
    for seed in range(5):
        with Sequence(client, "llama") as sequence:
            parts = split(ids, random.Random(seed))
            for part in parts[:-1]:
                sequence.tokens(part)
            assert generate(sequence, parts[-1], 8) == expected


def test_eight_interleaved_sequences_share_batches(
    client: InferenceServerClient, repository: Repository
) -> None:
    before = batch_counts(client, "llama").get(SLOTS, 0)
    gate = threading.Barrier(SLOTS)

    def stream(seed: int) -> list[int]:
        gate.wait()
        with Sequence(client, "llama", id=f"stream-{seed}") as sequence:
            return generate(sequence, prompt(seed, 1 + seed * 4), 24)

    with ThreadPoolExecutor(SLOTS) as pool:
        results = list(pool.map(stream, range(SLOTS)))
    assert results == [
        greedy(repository.llama, prompt(seed, 1 + seed * 4), 24) for seed in range(SLOTS)
    ]
    assert batch_counts(client, "llama").get(SLOTS, 0) > before


def test_thirty_two_sequences_never_mix(server: TritonServer, repository: Repository) -> None:
    """Different secrets, random interleaving, drops and restarts, more sequences than slots."""
    expected = {
        seed: greedy(repository.llama, prompt(seed, 5 + seed % 7), 12) for seed in range(32)
    }

    def stream(seed: int) -> None:
        rng = random.Random(1000 + seed)
        with InferenceServerClient(server.grpc_url) as own:
            for _ in range(3):
                sequence = Sequence(
                    own, "llama", id=7000 + seed, key="ours"
                )  # the same id again: a restart where it was dropped
                cut = rng.choice([12, 12, rng.randint(1, 11)])
                generated = retried(sequence, prompt(seed, 5 + seed % 7))
                got = [generated]
                while len(got) < cut:
                    time.sleep(rng.random() * 0.01)
                    got.append(sequence.tokens(got[-1:]))
                assert got == expected[seed][:cut]
                if cut == 12 or rng.random() < 0.5:
                    sequence.close()

        with InferenceServerClient(
            server.grpc_url
        ) as own:  # what was dropped keeps its slot until it is ended
            Sequence(own, "llama", id=7000 + seed, key="ours").tokens([1], end=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(stream, range(32)))


def test_start_resets_a_live_sequence(
    client: InferenceServerClient, repository: Repository
) -> None:
    with Sequence(client, "llama", id=77) as first:
        generate(first, prompt(1, 20), 4)
        again = Sequence(client, "llama", id=77, key=first.key)
        assert generate(again, prompt(2, 9), 8) == greedy(repository.llama, prompt(2, 9), 8)


def test_logits_come_only_on_request(client: InferenceServerClient, repository: Repository) -> None:
    ids = {"input_ids": np.array(prompt(3, 6))}
    with Sequence(client, "llama") as sequence:
        assert set(sequence.step(ids)) == {"next_token"}
        answer = sequence.step({"input_ids": np.array([5])}, parameters={"logits": True})
        assert set(answer) == {"next_token", "logits"}
        assert answer["logits"].shape == (VOCABULARY,)
        assert answer["logits"].argmax() == answer["next_token"][0]


def test_integer_and_text_ids_are_different_sequences(
    client: InferenceServerClient, repository: Repository
) -> None:
    expected = {seed: greedy(repository.llama, prompt(seed, 5), 6) for seed in (1, 2)}
    with Sequence(client, "llama", id=99) as number, Sequence(client, "llama", id="99") as text:
        generated = {1: [number.tokens(prompt(1, 5))], 2: [text.tokens(prompt(2, 5))]}
        for _ in range(5):
            generated[1].append(number.tokens(generated[1][-1:]))
            generated[2].append(text.tokens(generated[2][-1:]))
    assert generated == expected


def test_exactly_the_capacity_fits(client: InferenceServerClient, repository: Repository) -> None:
    ids = prompt(4, CAPACITY)
    with Sequence(client, "llama") as sequence:
        assert sequence.tokens(ids) == greedy(repository.llama, ids, 1)[0]
        with pytest.raises(
            InferenceServerException,
            match=rf"INPLACE-CAPACITY .*holds {CAPACITY} of {CAPACITY} positions, 0 are left",
        ):
            sequence.tokens([1])


def test_the_slot_is_free_after_end(client: InferenceServerClient) -> None:
    for _ in range(3 * SLOTS):
        with Sequence(client, "llama") as sequence:
            sequence.tokens([1])
    for _ in range(3 * SLOTS):
        Sequence(client, "llama").tokens([1], end=True)


def test_a_full_table_answers_at_once_and_can_be_retried(client: InferenceServerClient) -> None:
    owned = [Sequence(client, "brief", id=1 + n) for n in range(BRIEF_SLOTS)]
    for sequence in owned:
        sequence.tokens([1, 2, 3])
    late = Sequence(client, "brief", id=3)
    seconds = []
    for _ in range(5):  # the fastest counts: other tests run beside this one
        begin = time.monotonic()
        with pytest.raises(
            InferenceServerException, match="INPLACE-NO_FREE_SLOT retryable=1 sequence=3 "
        ) as refused:
            late.tokens([1])
        seconds.append(time.monotonic() - begin)
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
    assert min(seconds) < BRIEF_IDLE / 4  # no other slot was reclaimed for it
    owned[0].close()
    late.tokens([1])
    late.close()
    owned[1].close()


def test_an_idle_slot_is_reclaimed(client: InferenceServerClient, server: TritonServer) -> None:
    owned = [Sequence(client, "brief", id=11 + n) for n in range(BRIEF_SLOTS)]
    for sequence in owned:
        sequence.tokens([1, 2, 3])
    for _ in range(8):
        time.sleep(0.15 * BRIEF_IDLE)
        owned[0].tokens([4])  # its clock starts again
    with Sequence(client, "brief", id=13) as late:
        late.tokens([1])
        owned[0].tokens([5])
    with pytest.raises(InferenceServerException):  # Triton and the backend have both forgotten it
        owned[1].tokens([4])
    owned[0].close()
    line = re.compile(r"sequence ended: sequence=12 slot=\d length=3 reason=idle")
    eventually(
        lambda: (
            server.log is not None
            and line.search(server.log.read_text(errors="replace")) is not None
        ),
        "a line of the log",
    )


def test_a_thousand_steps_leave_the_server_as_large_as_before(
    client: InferenceServerClient, server: TritonServer
) -> None:
    assert server.process is not None
    processes = psutil.Process(server.process.pid).children(recursive=True)
    stub = next(
        child
        for child in processes
        if "stub" in child.name() and any("/brief/" in part for part in child.cmdline())
    )
    resident = {}
    with Sequence(client, "brief") as sequence:
        token = sequence.tokens([1])
        for step in range(1, 1001):
            token = sequence.tokens([token])
            if step in (200, 1000):
                resident[step] = stub.memory_info().rss
    assert resident[1000] < 1.01 * resident[200]


def test_a_model_that_is_not_a_language_model(client: InferenceServerClient) -> None:
    rng = np.random.default_rng(0)
    with Sequence(client, "accumulator") as one, Sequence(client, "accumulator", id="two") as two:
        sums = {one.id: np.zeros(4, np.float32), two.id: np.zeros(4, np.float32)}
        for count in range(1, 6):
            for sequence in (one, two):
                value = rng.standard_normal(4).astype(np.float32)
                sums[sequence.id] += value
                answer = sequence.step({"value": value})
                assert answer["sum"].tolist() == sums[sequence.id].tolist()
                assert answer["values"] == [count]


def test_the_client_frees_slots_of_any_model(client: InferenceServerClient) -> None:
    for _ in range(6):  # there are four
        with Sequence(client, "accumulator") as sequence:
            answer = sequence.step({"value": np.full(4, 3.0, dtype=np.float32)})
            assert answer["sum"].tolist() == [3.0] * 4
