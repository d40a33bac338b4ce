"""The stream driver over a real engine: generations and steps of a tiny Llama as transformers."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from inplace.drivers import StreamDriver, TokenizerConfig, engine_thread
from inplace.drivers.parsing import RequestParser
from inplace.drivers.queues import StreamRequest
from inplace.engines import Finish
from inplace.errors import Code
from inplace.runtime.requests import Request
from support.driving import random_tokens
from support.models import CAPACITY, CHUNK, SLOTS, Repository, greedy, open_instance
from support.streaming import (
    ALL_OUTPUTS,
    MAX_NEW_TOKENS,
    OpenStreams,
    RecordingChannel,
    StreamClient,
    slow_steps,
    wait_until,
)
from support.vocabulary import tiny_tokenizer


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17, 40])
def test_a_generation_has_the_tokens_of_transformers(
    streams: OpenStreams, repository: Repository, length: int
) -> None:
    channel = streams().generate("a", random_tokens(length, length))
    assert channel.finish_reason == "length"
    assert channel.tokens == greedy(repository.llama, random_tokens(length, length), 16)


def test_three_times_as_many_generations_as_slots_share_steps_and_have_their_own_tokens(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    prompts = [random_tokens(seed, 1 + 3 * seed % 40) for seed in range(3 * SLOTS)]
    channels = [
        client.generate(f"s{index}", ids, 12 + index % 5, end=True)
        for index, ids in enumerate(prompts)
    ]
    for index, channel in enumerate(channels):
        assert channel.finish_reason == "length"
        assert channel.tokens == greedy(repository.llama, prompts[index], 12 + index % 5)
    assert max(len(slots) for slots in client.engine.slots) == SLOTS
    assert client.num_free_slots() == SLOTS


def test_requests_that_arrive_together_begin_in_one_step(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    prompts = [random_tokens(seed, 1) for seed in range(SLOTS)]
    channels = [RecordingChannel(ALL_OUTPUTS) for _ in prompts]
    client.driver.submit(
        (Request(f"s{index}", True, False, {"input_ids": torch.tensor([ids])}), {}, channel)
        for index, (ids, channel) in enumerate(zip(prompts, channels, strict=True))
    )
    assert [[channel.next_token] for channel in channels] == [
        greedy(repository.llama, ids, 1) for ids in prompts
    ]
    assert [len(slots) for slots in client.engine.slots] == [SLOTS]


def test_the_engine_is_stepped_on_the_given_thread(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, seen = engine_thread(), set[int]()
    loaded = thread.submit(threading.get_ident).result()
    instance = thread.submit(open_instance, repository.path / "llama").result()
    launch = instance.engine.launch

    def watched(*given: Any) -> Finish:
        seen.add(threading.get_ident())
        return launch(*given)

    monkeypatch.setattr(instance.engine, "launch", watched)
    client = StreamDriver(instance, TokenizerConfig(), 4, thread)
    assert StreamClient(client).generate("a", [5], 6, end=True).finish_reason == "length"
    client.close()
    assert seen == {loaded}


def test_a_defect_in_one_of_several_requests_fails_that_request_alone(
    streams: OpenStreams, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, taken = streams(), RequestParser.parse

    def job(self: RequestParser, request: Request, *others: Any) -> StreamRequest:
        if request.sequence_id == "s1":
            raise ZeroDivisionError("a defect")
        return taken(self, request, *others)

    monkeypatch.setattr(RequestParser, "parse", job)
    channels = [RecordingChannel(ALL_OUTPUTS) for _ in range(3)]
    client.driver.submit(
        (Request(f"s{index}", True, False, {"input_ids": torch.tensor([[5]])}), {}, each)
        for index, each in enumerate(channels)
    )
    channels[1].assert_refused(Code.ENGINE_FAILED, "a defect")
    assert channels[0].next_token == channels[2].next_token == greedy(repository.llama, [5], 1)[0]


def test_random_requests_of_both_protocols_give_every_sequence_its_own_tokens(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()

    def converse(seed: int) -> None:
        rng = random.Random(seed)
        ids = random_tokens(seed, rng.randint(1, 20))
        history, start = list(ids), True
        while len(history) < CAPACITY - 12:
            more = rng.randint(1, 6)
            if rng.random() < 0.6:
                channel = client.generate(
                    seed, ids, more, start=start, position=0 if start else len(history) - len(ids)
                )
                assert channel.finish_reason == "length"
                assert channel.tokens == greedy(repository.llama, history, more)
                history += channel.tokens
                ids = random_tokens(seed + len(history), rng.randint(1, 3))
            else:
                token = client.step(seed, ids, start=start).next_token
                assert [token] == greedy(repository.llama, history, 1)
                ids = [token]
            history += ids
            start = False
        assert client.end(seed).wait().error is None

    with ThreadPoolExecutor(12) as pool:
        for future in [pool.submit(converse, seed) for seed in range(1, SLOTS + 1)]:
            future.result()
    assert client.num_free_slots() == SLOTS


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(5, 21)
    sampling: dict[str, Any] = {"temperature": "0.9", "top_k": 64, "top_p": "0.95"}
    alone = [client.generate("a", ids, seed=seed, **sampling).wait().tokens for seed in (1, 2)]
    batch = [
        client.generate(f"c{index}", ids, seed=seed, end=True, **sampling)
        for index, seed in enumerate((1, 2, 3, 1, 2, -(2**63)))
    ]
    tokens = [channel.wait().tokens for channel in batch]
    assert [tokens[0], tokens[3]] == [alone[0]] * 2
    assert [tokens[1], tokens[4]] == [alone[1]] * 2
    assert len({tuple(each) for each in tokens}) == 4
    assert greedy(repository.llama, ids, 16) not in tokens


def test_generations_and_steps_continue_a_sequence_with_its_pending_token(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(1, 9)
    first = client.generate("a", ids, 5).wait().tokens
    history = ids + first
    # One less than the length, which includes the pending token.
    assert client.step("a", [7], position=13).wait().error is not None
    assert (
        client.step("a", [7, 8], position=14).next_token
        == greedy(repository.llama, [*history, 7, 8], 1)[0]
    )
    history += [7, 8]
    second = client.generate("a", [9], 4, start=False, position=16).wait().tokens
    assert second == greedy(repository.llama, [*history, 9], 4)
    history += [9, *second]
    third = client.generate("a", [3, 4], 4, start=False, end=True, position=21).wait().tokens
    assert third == greedy(repository.llama, [*history, 3, 4], 4)
    client.step("a", [1]).assert_refused(Code.UNKNOWN_SEQUENCE)
    assert client.num_free_slots() == SLOTS


def test_an_end_token_finishes_a_generation_unless_it_is_ignored(
    streams: OpenStreams, repository: Repository
) -> None:
    ids = random_tokens(3, 8)
    expected = greedy(repository.llama, ids, 16)
    end = expected[6]
    client = streams(TokenizerConfig(tiny_tokenizer(), frozenset({end})))
    channel = client.generate("a", ids)
    assert channel.finish_reason == "eos"
    assert channel.tokens == expected[: expected.index(end) + 1]
    assert channel.text == tiny_tokenizer().decode(ids + channel.tokens[:-1])[
        len(tiny_tokenizer().decode(ids)) :
    ].rstrip("\ufffd")
    assert client.generate("b", ids, ignore_eos=True).wait().tokens == expected


def test_the_text_of_a_start_that_continues_a_sequence_has_no_beginning_token(
    streams: OpenStreams, repository: Repository
) -> None:
    client, more = streams(TokenizerConfig(tiny_tokenizer())), " Copyright"
    ids = tiny_tokenizer().encode("You may").ids
    history = [
        *ids,
        *greedy(repository.llama, ids, 3),
        *tiny_tokenizer().encode(more, add_special_tokens=False).ids,
    ]
    for start in (True, False):
        assert client.generate("a", "You may", 3, sequence_key="mine").finish_reason == "length"
        channel = client.generate(
            "a", more, 4, start=start, sequence_key="mine", position=len(ids) + 3
        )
        assert (channel.finish_reason, channel.tokens) == (
            "length",
            greedy(repository.llama, history, 4),
        )


def test_a_generation_finishes_when_its_slot_is_full(
    streams: OpenStreams, repository: Repository
) -> None:
    client, ids = streams(), random_tokens(4, 8)
    channel = client.generate("a", ids, 1000)
    assert channel.finish_reason == "capacity"
    assert channel.tokens == greedy(repository.llama, ids, MAX_NEW_TOKENS)
    client.generate("a", [1], 1, start=False).assert_refused(
        Code.CAPACITY, f"the sequence holds {CAPACITY} of {CAPACITY} positions"
    )
    assert client.generate("b", ids, MAX_NEW_TOKENS).finish_reason == "length"
    client.generate("c", random_tokens(5, CAPACITY), 1).assert_refused(
        Code.CAPACITY, f"{CAPACITY} tokens and 1 more do not fit"
    )
    assert client.generate("c", random_tokens(5, CAPACITY - 1), 1).finish_reason == "length"


def test_prompts_delay_running_generations_by_one_chunk_at_most(
    streams: OpenStreams, repository: Repository
) -> None:
    client = streams()
    engine = client.engine
    with slow_steps(client, 0.02):
        running = [
            client.generate(f"r{index}", random_tokens(index, 2), MAX_NEW_TOKENS)
            for index in range(3)
        ]
        for channel in running:
            channel.wait_for_tokens(2)
        engine.counts.clear()
        late = [
            client.generate(f"p{index}", random_tokens(90 + index, 40), 2, end=True)
            for index in range(5)
        ]
        for channel in late:
            channel.wait_for_tokens(1)
    for index, channel in enumerate(late):
        assert channel.wait().tokens == greedy(repository.llama, random_tokens(90 + index, 40), 2)
    for index, channel in enumerate(running):
        assert channel.wait().tokens == greedy(
            repository.llama, random_tokens(index, 2), MAX_NEW_TOKENS
        )
    mixed = [counts for counts in engine.counts if max(counts) > 1]
    assert mixed
    for counts in mixed:
        assert counts[:3] == [1, 1, 1]
        assert sum(counts[3:]) <= CHUNK + sum(count == 1 for count in counts[3:])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_more_sequences_than_rows_are_stepped_in_turn(
    streams: OpenStreams, repository: Repository, rows: int
) -> None:
    client = streams(rows=rows)
    channels = [
        client.generate(f"s{index}", random_tokens(index, 1 + 5 * index), 12, end=True)
        for index in range(SLOTS)
    ]
    for index, channel in enumerate(channels):
        assert channel.wait().tokens == greedy(
            repository.llama, random_tokens(index, 1 + 5 * index), 12
        )
    assert max(len(slots) for slots in client.engine.slots) == rows
    for slot in range(SLOTS):  # none waits until the others have finished
        steps = [number for number, slots in enumerate(client.engine.slots) if slot in slots]
        assert max(after - before for before, after in pairwise(steps)) <= 2 * SLOTS


def test_a_response_has_stream_interval_tokens_and_the_last_one_the_rest(
    streams: OpenStreams,
) -> None:
    channel = streams().generate("a", random_tokens(1, 3), 11, stream_interval=4).wait()
    sizes = [len(response["tokens"][0]) for response in channel.responses]
    assert sum(sizes) == 11
    assert all(size >= 4 for size in sizes[:-1])
    assert sizes[-1] <= 11 - 4 * (len(sizes) - 1)


def test_the_idle_clock_stops_while_a_generation_runs(
    streams: OpenStreams,
) -> None:
    client = streams(idle_timeout=1.5)
    with slow_steps(client, 0.1):
        begin = time.monotonic()
        assert client.generate("a", random_tokens(1, 8), 20).finish_reason == "length"
        assert time.monotonic() - begin > 1.8
    assert client.num_free_slots() == SLOTS - 1
    wait_until(lambda: client.num_free_slots() == SLOTS)
    client.step("a", [1]).assert_refused(Code.UNKNOWN_SEQUENCE, "was idle")
