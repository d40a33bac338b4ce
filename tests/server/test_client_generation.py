"""Generations through both clients, on real servers that are stopped, cut off and killed."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest
from inplace.client import (
    AsyncClient,
    AsyncSequence,
    Client,
    RefusedError,
    Retry,
    Sequence,
    SequenceLostError,
    UnreachableError,
)
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.cable import Cable, killed
from support.engines import Engines
from support.models import greedy
from support.pool import EXPLICIT, Deployment, ServerPool
from support.served import Served
from support.streams import prompt
from support.talking import AsyncTalker, Talker
from support.vocabulary import added, llama_with_tokenizer, tiny_tokenizer
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.server

CAPACITY, SLOTS = 600, 4
MODEL = "teller"
SAMPLED = {"temperature": 0.9, "top_k": 64, "top_p": 0.95, "seed": 5, "ignore_eos": True}


class Tellers:
    """Two servers of one stream model with a tokenizer; the second has one without tokens too."""

    def __init__(self, model: LlamaForCausalLM, servers: list[TritonServer]) -> None:
        self.model, self.servers = model, servers
        self.urls = [server.grpc_url for server in servers]


@pytest.fixture(scope="module")
def tellers(
    served: Served, engines: Engines, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tellers]:
    """The first server is one that tests stop and kill, the other one is the pool's."""
    source = engines.get("llama-with-tokenizer", llama_with_tokenizer)
    repository, logs = tmp_path_factory.mktemp("tellers"), tmp_path_factory.mktemp("logs")
    options = BuildOptions(
        slots=SLOTS, max_rows=SLOTS, capacity=CAPACITY, chunk=32, serve="stream", idle_timeout=60.0
    )
    build_decoder(source, repository / MODEL, options)
    arguments = [*EXPLICIT, f"--load-model={MODEL}"]
    with (
        TritonServer(repository, Ports(0, 0, 0), log=logs / "log", arguments=arguments) as first,
        pool.serve(Deployment(repository / MODEL)) as other,
    ):
        yield Tellers(served.llama, [first, other])


@pytest.fixture(params=[Talker, AsyncTalker], ids=["sync", "asyncio"])
def talker(request: pytest.FixtureRequest) -> Iterator[Talker]:
    made: Talker = request.param()
    yield made
    made.close()


@contextmanager
def talking(
    talker: Talker, urls: list[str], model: str = MODEL, retry: Retry | None = None, **options: Any
) -> Iterator[Any]:
    """A client with one sequence."""
    client = talker.client(urls, retry)
    sequence = talker.sequence(client, model, **options)
    yield sequence
    talker.wait(sequence.close())
    talker.wait(client.close())


def test_a_generation_says_what_transformers_says_and_the_sequence_goes_on(
    tellers: Tellers, talker: Talker
) -> None:
    ids = prompt(1, 40)
    with talking(talker, tellers.urls) as sequence:
        generation = sequence.generate(ids, 24, ignore_eos=True)
        pieces = list(talker.pieces(generation))
        expected = greedy(tellers.model, ids, 24)
        assert (
            [token for piece in pieces for token in piece.tokens] == generation.tokens == expected
        )
        assert "".join(piece.text for piece in pieces) == generation.text == added(ids, expected)
        assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
        assert sequence.length == 64
        history = [*ids, *expected, 7, 8]
        token = talker.wait(sequence.tokens([7, 8]))  # a step, between two generations
        assert [token] == greedy(tellers.model, history, 1)
        again = sequence.generate(
            [token, 9], 8, ignore_eos=True, stream_interval=8, text=False, end=True
        )
        [piece] = talker.pieces(again)
        assert piece.tokens == greedy(tellers.model, [*history, token, 9], 8)
        assert (piece.text, piece.finish_reason) == ("", "length")


def test_a_text_is_continued_until_a_stop_text(tellers: Tellers, talker: Talker) -> None:
    asked = "Licensed under the Apache"
    ids = tiny_tokenizer().encode(asked).ids
    tokens = greedy(tellers.model, ids, 60)
    whole = added(ids, tokens)
    stop = whole[20:23]
    with talking(talker, tellers.urls) as sequence:
        generation = sequence.generate(asked, 60, stop=["never generated", stop], ignore_eos=True)
        text = "".join(piece.text for piece in talker.pieces(generation))
        assert (text, generation.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert generation.tokens == tokens[: len(generation.tokens)]
        assert sequence.length is None


def test_what_is_refused_is_raised_and_the_sequence_is_as_before(
    tellers: Tellers, talker: Talker
) -> None:
    ids = prompt(2, 10)
    with talking(talker, tellers.urls, id="teller 7") as sequence:
        generated = [talker.wait(sequence.tokens(ids))]
        for bad, options, code in (
            ([-1], {}, "VALUE_RANGE"),
            ([1], {"top_k": -1}, "BAD_PARAMETER"),
            ([1] * CAPACITY, {}, "CAPACITY"),
        ):
            with pytest.raises(RefusedError) as refused:
                list(talker.pieces(sequence.generate(bad, 8, request_id="r9", **options)))
            assert (refused.value.code, refused.value.retryable) == (code, False)
            assert (refused.value.sequence, refused.value.request) == ("teller 7", "r9")
        generated += [
            token
            for piece in talker.pieces(sequence.generate(generated, 7, ignore_eos=True))
            for token in piece.tokens
        ]
        assert generated == greedy(tellers.model, ids, 8)


def test_a_generation_that_is_left_frees_its_slot_and_the_sequence_can_go_on(
    tellers: Tellers, talker: Talker
) -> None:
    for seed in range(3 * SLOTS):
        ids = prompt(seed, 5)
        with talking(talker, tellers.urls[:1], retry=Retry(attempts=3)) as sequence:
            generated: list[int] = []
            for piece in talker.pieces(sequence.generate(ids, 500, **SAMPLED)):
                generated += piece.tokens
                if len(generated) > 3:
                    break
            after = sequence.generate([3, 4], 6, ignore_eos=True)
            assert [token for piece in talker.pieces(after) for token in piece.tokens] == greedy(
                tellers.model, [*ids, *generated, 3, 4], 6
            )


def cut_at(talker: Talker, generation: Any, count: int, action: Any) -> tuple[list[int], str]:
    """Iterate to the end, with something happening after so many tokens."""
    tokens: list[int] = []
    text = ""
    for piece in talker.pieces(generation):
        if len(tokens) < count <= len(tokens) + len(piece.tokens):
            action()
        tokens += piece.tokens
        text += piece.text
    assert (tokens, text) == (generation.tokens, generation.text)
    return tokens, text


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_eos": True},
        SAMPLED,
        SAMPLED | {"stop": ["never generated"]},
        SAMPLED | {"text": False},
    ],
)
@pytest.mark.parametrize("asked", [prompt(3, 21), "You may reproduce"], ids=["ids", "text"])
def test_a_cut_connection_changes_nothing_that_is_said(
    tellers: Tellers, talker: Talker, asked: Any, options: dict[str, Any]
) -> None:
    with talking(talker, tellers.urls) as sequence:
        expected = cut_at(talker, sequence.generate(asked, 200, **options), 0, None)
    with Cable(tellers.urls[0]) as cable, talking(talker, [cable.url]) as sequence:
        assert (
            cut_at(
                talker,
                sequence.generate(asked, 200, **options),
                random.Random(str(options)).randint(1, 100),
                cable.cut,
            )
            == expected
        )
        cable.cut()
        after = sequence.generate([5], 4, ignore_eos=True)
        ids = tiny_tokenizer().encode(asked).ids if isinstance(asked, str) else asked
        assert cut_at(talker, after, 0, None)[0] == greedy(
            tellers.model, [*ids, *expected[0], 5], 4
        )


def test_a_server_that_hangs_is_left_after_the_timeout(tellers: Tellers, talker: Talker) -> None:
    ids = prompt(4, 12)
    expected = greedy(tellers.model, ids, 200)
    first = tellers.servers[0]
    assert first.process is not None
    processes = [
        psutil.Process(first.process.pid),
        *psutil.Process(first.process.pid).children(recursive=True),
    ]

    def stop() -> None:
        for process in processes:
            process.suspend()

    try:
        with talking(talker, tellers.urls, timeout=4.0) as sequence:
            assert sequence.server == first.grpc_url
            assert (
                cut_at(talker, sequence.generate(ids, 200, ignore_eos=True), 20, stop)[0]
                == expected
            )
            assert sequence.server == tellers.urls[1]
        with (
            talking(talker, tellers.urls[:1], timeout=1.0, retry=Retry(attempts=2)) as sequence,
            pytest.raises(UnreachableError) as gone,
        ):
            list(talker.pieces(sequence.generate(ids, 4)))
        assert gone.value.code == "DEADLINE_EXCEEDED"
    finally:
        for process in processes:
            process.resume()


def test_more_generations_than_slots_wait_their_turn(tellers: Tellers) -> None:
    def generate(seed: int) -> None:
        with Sequence(client, MODEL) as sequence:
            generation = sequence.generate(prompt(seed, 6), 30, ignore_eos=True)
            assert [token for piece in generation for token in piece.tokens] == greedy(
                tellers.model, prompt(seed, 6), 30
            )

    with Client(tellers.urls) as client, ThreadPoolExecutor(6 * SLOTS) as pool:
        list(pool.map(generate, range(6 * SLOTS)))


def test_asyncio_streams_share_one_connection(tellers: Tellers) -> None:
    expected = {seed: greedy(tellers.model, prompt(seed, 6), 12) for seed in range(8)}

    async def generate(client: AsyncClient, seed: int) -> bool:
        async with AsyncSequence(client, MODEL) as sequence:
            generation = sequence.generate(prompt(seed, 6), 12, ignore_eos=True)
            return [token async for piece in generation for token in piece.tokens] == expected[seed]

    async def main() -> None:
        async with AsyncClient(tellers.urls[1]) as client:
            assert all(await asyncio.gather(*(generate(client, index % 8) for index in range(48))))

    asyncio.run(main())


def test_an_asyncio_caller_that_stops_waiting_loses_nothing(tellers: Tellers) -> None:
    ids = prompt(6, 9)

    async def main() -> None:
        async with (
            AsyncClient(tellers.urls[1]) as client,
            AsyncSequence(client, MODEL) as sequence,
            sequence.generate(ids, 200, ignore_eos=True) as generation,
        ):
            impatience = 0
            await anext(generation)
            while not generation.finish_reason:
                try:
                    async with asyncio.timeout(0.0005):
                        await anext(generation)
                except TimeoutError:
                    impatience += 1
            assert generation.tokens == greedy(tellers.model, ids, 200)
            assert impatience > 0
            task = asyncio.create_task(sequence.tokens([1, 2]))
            await asyncio.sleep(0)
            task.cancel()
            token = await sequence.tokens(
                [3]
            )  # whether the step before it ran is not known: the sequence is as if it had not
            assert [token] == greedy(tellers.model, [*ids, *generation.tokens, 3], 1)

    asyncio.run(main())


def test_a_stream_model_without_tokens_is_stepped_and_its_loss_is_told(
    tellers: Tellers, talker: Talker
) -> None:
    value = {"value": np.full(4, 2.0, np.float32)}
    with (
        Cable(tellers.urls[1]) as cable,
        talking(talker, [cable.url], "sums", Retry(attempts=4)) as sequence,
    ):
        for count in range(1, 8):
            assert talker.wait(sequence.step(value))["sum"].tolist() == [2.0 * count] * 4
            if count < 6:
                cable.cut()
        cable.lose_the_next_answer()
        with pytest.raises(
            SequenceLostError, match=r"the sequence holds 8.*its inputs are not tokens"
        ) as lost:
            talker.wait(sequence.step(value))
        assert not lost.value.retryable


def test_a_synchronous_client_leaves_no_threads_behind(tellers: Tellers) -> None:
    before = threading.active_count()
    with Client(tellers.urls[1]) as client:
        for _ in range(10):
            with Sequence(client, MODEL) as sequence:
                next(
                    sequence.generate([1, 2], 100, ignore_eos=True)
                )  # left running: cancelled at the end of the block
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_generations_go_on_when_one_of_two_servers_is_killed(tellers: Tellers) -> None:
    """Both clients at once, on the killed server and on the other; then one more turn each."""
    asks: list[tuple[Any, dict[str, Any]]] = [
        (prompt(7, 30), {"ignore_eos": True}),
        (prompt(8, 30), SAMPLED),
        ("Unless required by applicable law", SAMPLED),
    ]
    talkers = [Talker(), AsyncTalker()]
    turn: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True}
    with Client(tellers.urls[1]) as alone:
        expected = []
        for asked, options in asks:
            with Sequence(alone, MODEL) as sequence:
                generation = sequence.generate(asked, 300, **options)
                assert [len(piece.tokens) for piece in generation]
                expected.append(
                    (
                        generation.tokens,
                        generation.text,
                        [*_said(sequence.generate([5, 6], **turn))],
                    )
                )
    clients = [talker.client(tellers.urls) for talker in talkers]
    owned = []
    for (asked, options), reference in zip(asks, expected, strict=True):
        for talker, client in zip(talkers, clients, strict=True):
            for _ in tellers.urls:
                sequence = talker.sequence(client, MODEL)
                generation = sequence.generate(asked, 300, **options)
                owned.append((talker, sequence, generation, talker.pieces(generation), reference))
    dying = [one for one in owned if one[1].server == tellers.urls[0]]
    assert len(dying) == len(owned) // 2
    for _, _, _, pieces, _ in dying[
        :SLOTS
    ]:  # as many as have slots there run; the others wait for one
        next(pieces)
    killed(tellers.servers[0])
    for talker, sequence, generation, pieces, (tokens, text, after) in owned:
        for _ in pieces:
            pass
        assert (generation.tokens, generation.text) == (tokens, text)
        assert sequence.server == tellers.urls[1]
        assert [
            token
            for piece in talker.pieces(sequence.generate([5, 6], **turn))
            for token in piece.tokens
        ] == after
        talker.wait(sequence.close())
    for talker, client in zip(talkers, clients, strict=True):
        talker.wait(client.close())
        talker.close()


def _said(generation: Any) -> list[int]:
    return [token for piece in generation for token in piece.tokens]
