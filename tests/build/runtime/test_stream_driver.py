"""The stream driver over a real engine: generations and steps of a tiny Llama against transformers itself."""

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
from inplace.drivers.sequence_queues import StreamRequest
from inplace.engines import Finish
from inplace.errors import Code
from inplace.runtime.requests import Request
from support.driving import prompt
from support.models import CAPACITY, CHUNK, SLOTS, Repository, greedy, open_instance
from support.streaming import FREE, OUTPUTS, Heard, OpenStreams, Streams, slowed, until
from support.vocabulary import tiny_tokenizer


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17, 40])
def test_a_generation_is_transformers_own(
    streams: OpenStreams, repository: Repository, length: int
) -> None:
    heard = streams().generate("a", prompt(length, length))
    assert heard.reason == "length"
    assert heard.tokens == greedy(repository.llama, prompt(length, length), 16)


def test_many_more_generations_than_slots_are_each_what_they_are_alone_and_share_steps(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()
    prompts = [prompt(seed, 1 + 3 * seed % 40) for seed in range(3 * SLOTS)]
    said = [
        driver.generate(f"s{index}", ids, 12 + index % 5, end=True)
        for index, ids in enumerate(prompts)
    ]
    for index, heard in enumerate(said):
        assert heard.reason == "length"
        assert heard.tokens == greedy(repository.llama, prompts[index], 12 + index % 5)
    assert max(len(slots) for slots in driver.engine.slots) == SLOTS
    assert driver.free() == SLOTS


def test_requests_that_come_together_begin_in_one_step(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()
    prompts = [prompt(seed, 1) for seed in range(SLOTS)]
    said = [Heard(OUTPUTS) for _ in prompts]
    driver.driver.submit(
        (Request(f"s{index}", True, False, {"input_ids": torch.tensor([ids])}), {}, heard)
        for index, (ids, heard) in enumerate(zip(prompts, said, strict=True))
    )
    assert [[heard.next_token] for heard in said] == [
        greedy(repository.llama, ids, 1) for ids in prompts
    ]
    assert [len(slots) for slots in driver.engine.slots] == [SLOTS]


def test_the_engine_is_stepped_on_the_thread_that_is_given(
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
    driver = StreamDriver(instance, TokenizerConfig(), 4, thread)
    assert Streams(driver).generate("a", [5], 6, end=True).reason == "length"
    driver.close()
    assert seen == {loaded}


def test_a_defect_in_one_of_the_requests_that_come_together_is_its_own(
    streams: OpenStreams, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, taken = streams(), RequestParser.parse

    def job(self: RequestParser, request: Request, *others: Any) -> StreamRequest:
        if request.sequence_id == "s1":
            raise ZeroDivisionError("a defect")
        return taken(self, request, *others)

    monkeypatch.setattr(RequestParser, "parse", job)
    said = [Heard(OUTPUTS) for _ in range(3)]
    driver.driver.submit(
        (Request(f"s{index}", True, False, {"input_ids": torch.tensor([[5]])}), {}, each)
        for index, each in enumerate(said)
    )
    said[1].refused(Code.ENGINE_FAILED, "a defect")
    assert said[0].next_token == said[2].next_token == greedy(repository.llama, [5], 1)[0]


def test_random_requests_of_both_protocols_give_every_sequence_its_own_tokens(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        ids = prompt(seed, rng.randint(1, 20))
        history, start = list(ids), True
        while len(history) < CAPACITY - 12:
            more = rng.randint(1, 6)
            if rng.random() < 0.6:
                heard = driver.generate(
                    seed, ids, more, start=start, position=0 if start else len(history) - len(ids)
                )
                assert heard.reason == "length"
                assert heard.tokens == greedy(repository.llama, history, more)
                history += heard.tokens
                ids = prompt(seed + len(history), rng.randint(1, 3))
            else:
                token = driver.ask(seed, ids, start=start).next_token
                assert [token] == greedy(repository.llama, history, 1)
                ids = [token]
            history += ids
            start = False
        assert driver.end(seed).wait().error is None

    with ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(client, seed) for seed in range(1, SLOTS + 1)]:
            done.result()
    assert driver.free() == SLOTS


def test_a_seed_says_the_same_alone_and_in_company(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(5, 21)
    sampling: dict[str, Any] = {"temperature": "0.9", "top_k": 64, "top_p": "0.95"}
    alone = [driver.generate("a", ids, seed=seed, **sampling).wait().tokens for seed in (1, 2)]
    company = [
        driver.generate(f"c{index}", ids, seed=seed, end=True, **sampling)
        for index, seed in enumerate((1, 2, 3, 1, 2, -(2**63)))
    ]
    said = [heard.wait().tokens for heard in company]
    assert [said[0], said[3]] == [alone[0]] * 2
    assert [said[1], said[4]] == [alone[1]] * 2
    assert len({tuple(tokens) for tokens in said}) == 4
    assert greedy(repository.llama, ids, 16) not in said


def test_generations_and_steps_continue_a_sequence_and_the_last_token_is_never_sent_back(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, ids = streams(), prompt(1, 9)
    first = driver.generate("a", ids, 5).wait().tokens
    history = ids + first
    assert (
        driver.ask("a", [7], position=13).wait().error is not None
    )  # one less: the pending token counts
    assert (
        driver.ask("a", [7, 8], position=14).next_token
        == greedy(repository.llama, [*history, 7, 8], 1)[0]
    )
    history += [7, 8]
    second = driver.generate("a", [9], 4, start=False, position=16).wait().tokens
    assert second == greedy(repository.llama, [*history, 9], 4)
    history += [9, *second]
    third = driver.generate("a", [3, 4], 4, start=False, end=True, position=21).wait().tokens
    assert third == greedy(repository.llama, [*history, 3, 4], 4)
    driver.ask("a", [1]).refused(Code.UNKNOWN_SEQUENCE)
    assert driver.free() == SLOTS


def test_an_end_token_ends_a_generation_and_may_be_ignored(
    streams: OpenStreams, repository: Repository
) -> None:
    ids = prompt(3, 8)
    expected = greedy(repository.llama, ids, 16)
    end = expected[6]
    driver = streams(TokenizerConfig(tiny_tokenizer(), frozenset({end})))
    heard = driver.generate("a", ids)
    assert heard.reason == "eos"
    assert heard.tokens == expected[: expected.index(end) + 1]
    assert heard.text == tiny_tokenizer().decode(ids + heard.tokens[:-1])[
        len(tiny_tokenizer().decode(ids)) :
    ].rstrip("\ufffd")
    assert driver.generate("b", ids, ignore_eos=True).wait().tokens == expected


def test_the_text_of_a_start_that_goes_on_is_no_beginning(
    streams: OpenStreams, repository: Repository
) -> None:
    driver, more = streams(TokenizerConfig(tiny_tokenizer())), " Copyright"
    ids = tiny_tokenizer().encode("You may").ids
    history = [
        *ids,
        *greedy(repository.llama, ids, 3),
        *tiny_tokenizer().encode(more, add_special_tokens=False).ids,
    ]
    for start in (True, False):
        assert driver.generate("a", "You may", 3, sequence_key="mine").reason == "length"
        heard = driver.generate(
            "a", more, 4, start=start, sequence_key="mine", position=len(ids) + 3
        )
        assert (heard.reason, heard.tokens) == ("length", greedy(repository.llama, history, 4))


def test_a_sequence_ends_where_its_slot_does(streams: OpenStreams, repository: Repository) -> None:
    driver, ids = streams(), prompt(4, 8)
    heard = driver.generate("a", ids, 1000)
    assert heard.reason == "capacity"
    assert heard.tokens == greedy(repository.llama, ids, FREE)
    driver.generate("a", [1], 1, start=False).refused(
        Code.CAPACITY, f"the sequence holds {CAPACITY} of {CAPACITY} positions"
    )
    assert driver.generate("b", ids, FREE).reason == "length"
    driver.generate("c", prompt(5, CAPACITY), 1).refused(
        Code.CAPACITY, f"{CAPACITY} tokens and 1 more do not fit"
    )
    assert driver.generate("c", prompt(5, CAPACITY - 1), 1).reason == "length"


def test_prompts_hold_running_generations_up_by_one_chunk_at_most(
    streams: OpenStreams, repository: Repository
) -> None:
    driver = streams()
    engine = driver.engine
    with slowed(driver, 0.02):
        running = [driver.generate(f"r{index}", prompt(index, 2), FREE) for index in range(3)]
        for heard in running:
            heard.said(2)
        engine.counts.clear()
        late = [
            driver.generate(f"p{index}", prompt(90 + index, 40), 2, end=True) for index in range(5)
        ]
        for heard in late:
            heard.said(1)
    for index, heard in enumerate(late):
        assert heard.wait().tokens == greedy(repository.llama, prompt(90 + index, 40), 2)
    for index, heard in enumerate(running):
        assert heard.wait().tokens == greedy(repository.llama, prompt(index, 2), FREE)
    mixed = [counts for counts in engine.counts if max(counts) > 1]
    assert mixed
    for counts in mixed:
        assert counts[:3] == [1, 1, 1]
        assert sum(counts[3:]) <= CHUNK + sum(count == 1 for count in counts[3:])


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_more_sequences_than_rows_take_turns(
    streams: OpenStreams, repository: Repository, rows: int
) -> None:
    driver = streams(rows=rows)
    said = [
        driver.generate(f"s{index}", prompt(index, 1 + 5 * index), 12, end=True)
        for index in range(SLOTS)
    ]
    for index, heard in enumerate(said):
        assert heard.wait().tokens == greedy(repository.llama, prompt(index, 1 + 5 * index), 12)
    assert max(len(slots) for slots in driver.engine.slots) == rows
    for slot in range(SLOTS):  # none waits for the others to finish
        steps = [number for number, slots in enumerate(driver.engine.slots) if slot in slots]
        assert max(after - before for before, after in pairwise(steps)) <= 2 * SLOTS


def test_a_response_has_at_least_the_interval_and_the_last_one_the_rest(
    streams: OpenStreams,
) -> None:
    heard = streams().generate("a", prompt(1, 3), 11, stream_interval=4).wait()
    sizes = [len(response["tokens"][0]) for response in heard.responses]
    assert sum(sizes) == 11
    assert all(size >= 4 for size in sizes[:-1])
    assert sizes[-1] <= 11 - 4 * (len(sizes) - 1)


def test_the_idle_clock_stands_still_while_a_generation_runs_and_goes_on_after_it(
    streams: OpenStreams,
) -> None:
    driver = streams(idle_timeout=1.5)
    with slowed(driver, 0.1):
        begin = time.monotonic()
        assert driver.generate("a", prompt(1, 8), 20).reason == "length"
        assert time.monotonic() - begin > 1.8
    assert driver.free() == SLOTS - 1
    until(lambda: driver.free() == SLOTS, 10.0)
    driver.ask("a", [1]).refused(Code.UNKNOWN_SEQUENCE, "was idle")
