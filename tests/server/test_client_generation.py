"""Generations through both clients, on servers that hang, are disconnected and are killed."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
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
from support.client_adapters import AsyncAdapter, SyncAdapter
from support.engines import Engines
from support.fault_proxy import FaultProxy, kill_server
from support.long import long_except
from support.models import greedy
from support.pool import EXPLICIT, Deployment, ServerPool
from support.served import Served
from support.streams import prompt
from support.vocabulary import added, llama_with_tokenizer, tiny_tokenizer
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.server

CAPACITY, SLOTS = 600, 4
MODEL = "generator"
SAMPLED = {"temperature": 0.9, "top_k": 64, "top_p": 0.95, "seed": 5, "ignore_eos": True}


class ServerPair:
    """Two servers of one stream model with a tokenizer; the second has one without tokens too."""

    def __init__(self, model: LlamaForCausalLM, servers: list[TritonServer]) -> None:
        self.model, self.servers = model, servers
        self.urls = [server.grpc_url for server in servers]


@pytest.fixture(scope="module")
def pair(
    served: Served, engines: Engines, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerPair]:
    """The first server is one that tests stop and kill, the other one is the pool's."""
    source = engines.get("llama-with-tokenizer", llama_with_tokenizer)
    repository, logs = tmp_path_factory.mktemp("servers"), tmp_path_factory.mktemp("logs")
    options = BuildOptions(
        slots=SLOTS, max_rows=SLOTS, capacity=CAPACITY, chunk=32, serve="stream", idle_timeout=60.0
    )
    build_decoder(source, repository / MODEL, options)
    arguments = [*EXPLICIT, f"--load-model={MODEL}"]
    with (
        TritonServer(repository, Ports(0, 0, 0), log=logs / "log", arguments=arguments) as first,
        pool.serve(Deployment(repository / MODEL)) as other,
    ):
        yield ServerPair(served.llama, [first, other])


@pytest.fixture(
    params=long_except([AsyncAdapter], [SyncAdapter, AsyncAdapter]), ids=["sync", "asyncio"]
)
def adapter(request: pytest.FixtureRequest) -> Iterator[SyncAdapter]:
    """The asynchronous client; the synchronous one is generated from it."""
    created: SyncAdapter = request.param()
    yield created
    created.close()


@contextmanager
def open_sequence(
    adapter: SyncAdapter,
    urls: list[str],
    model: str = MODEL,
    retry: Retry | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A client with one sequence."""
    client = adapter.client(urls, retry)
    sequence = adapter.sequence(client, model, **options)
    yield sequence
    adapter.wait(sequence.close())
    adapter.wait(client.close())


def test_a_generation_equals_transformers_and_the_sequence_continues(
    pair: ServerPair, adapter: SyncAdapter
) -> None:
    ids = prompt(1, 40)
    with open_sequence(adapter, pair.urls) as sequence:
        generation = sequence.generate(ids, 24, ignore_eos=True)
        pieces = list(adapter.pieces(generation))
        expected = greedy(pair.model, ids, 24)
        assert (
            [token for piece in pieces for token in piece.tokens] == generation.tokens == expected
        )
        assert "".join(piece.text for piece in pieces) == generation.text == added(ids, expected)
        assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
        assert sequence.length == 64
        history = [*ids, *expected, 7, 8]
        token = adapter.wait(sequence.tokens([7, 8]))  # a step, between two generations
        assert [token] == greedy(pair.model, history, 1)
        again = sequence.generate(
            [token, 9], 8, ignore_eos=True, stream_interval=8, text=False, end=True
        )
        [piece] = adapter.pieces(again)
        assert piece.tokens == greedy(pair.model, [*history, token, 9], 8)
        assert (piece.text, piece.finish_reason) == ("", "length")


def test_a_text_is_continued_until_a_stop_text(pair: ServerPair, adapter: SyncAdapter) -> None:
    given = "Licensed under the Apache"
    ids = tiny_tokenizer().encode(given).ids
    tokens = greedy(pair.model, ids, 60)
    whole = added(ids, tokens)
    stop = whole[20:23]
    with open_sequence(adapter, pair.urls) as sequence:
        generation = sequence.generate(given, 60, stop=["never generated", stop], ignore_eos=True)
        text = "".join(piece.text for piece in adapter.pieces(generation))
        assert (text, generation.finish_reason) == (whole[: whole.index(stop)], "stop")
        assert generation.tokens == tokens[: len(generation.tokens)]
        assert sequence.length is None


def test_a_refused_request_raises_and_leaves_the_sequence_as_it_was(
    pair: ServerPair, adapter: SyncAdapter
) -> None:
    ids = prompt(2, 10)
    with open_sequence(adapter, pair.urls, id="sequence 7") as sequence:
        generated = [adapter.wait(sequence.tokens(ids))]
        for bad, options, code in (
            ([-1], {}, "VALUE_RANGE"),
            ([1], {"top_k": -1}, "BAD_PARAMETER"),
            ([1] * CAPACITY, {}, "CAPACITY"),
        ):
            with pytest.raises(RefusedError) as refused:
                list(adapter.pieces(sequence.generate(bad, 8, request_id="r9", **options)))
            assert (refused.value.code, refused.value.retryable) == (code, False)
            assert (refused.value.sequence, refused.value.request) == ("sequence 7", "r9")
        generated += [
            token
            for piece in adapter.pieces(sequence.generate(generated, 7, ignore_eos=True))
            for token in piece.tokens
        ]
        assert generated == greedy(pair.model, ids, 8)


def test_leaving_a_generation_cancels_it_and_the_sequence_continues(
    pair: ServerPair, adapter: SyncAdapter
) -> None:
    for seed in range(3 * SLOTS):
        ids = prompt(seed, 5)
        with open_sequence(adapter, pair.urls[:1], retry=Retry(attempts=3)) as sequence:
            generated: list[int] = []
            for piece in adapter.pieces(sequence.generate(ids, 500, **SAMPLED)):
                generated += piece.tokens
                if len(generated) > 3:
                    break
            after = sequence.generate([3, 4], 6, ignore_eos=True)
            assert [token for piece in adapter.pieces(after) for token in piece.tokens] == greedy(
                pair.model, [*ids, *generated, 3, 4], 6
            )


def collect(
    adapter: SyncAdapter, generation: Any, count: int, action: Any
) -> tuple[list[int], str]:
    """All tokens and the text of a generation; ``action`` is called after ``count`` tokens."""
    tokens: list[int] = []
    text = ""
    for piece in adapter.pieces(generation):
        if len(tokens) < count <= len(tokens) + len(piece.tokens):
            action()
        tokens += piece.tokens
        text += piece.text
    assert (tokens, text) == (generation.tokens, generation.text)
    return tokens, text


IDS, TEXT, GREEDY = prompt(3, 21), "You may reproduce", {"ignore_eos": True}
STOPPED, TOKENS_ONLY = SAMPLED | {"stop": ["never generated"]}, SAMPLED | {"text": False}


@pytest.mark.parametrize(
    ("given", "options"),
    long_except(
        [(TEXT, STOPPED), (IDS, TOKENS_ONLY)],
        product([IDS, TEXT], [GREEDY, SAMPLED, STOPPED, TOKENS_ONLY]),
    ),
)
def test_a_broken_connection_changes_no_token_and_no_text(
    pair: ServerPair, adapter: SyncAdapter, given: Any, options: dict[str, Any]
) -> None:
    with open_sequence(adapter, pair.urls) as sequence:
        expected = collect(adapter, sequence.generate(given, 200, **options), 0, None)
    with FaultProxy(pair.urls[0]) as proxy, open_sequence(adapter, [proxy.url]) as sequence:
        assert (
            collect(
                adapter,
                sequence.generate(given, 200, **options),
                random.Random(str(options)).randint(1, 100),
                proxy.disconnect,
            )
            == expected
        )
        proxy.disconnect()
        after = sequence.generate([5], 4, ignore_eos=True)
        ids = tiny_tokenizer().encode(given).ids if isinstance(given, str) else given
        assert collect(adapter, after, 0, None)[0] == greedy(pair.model, [*ids, *expected[0], 5], 4)


def test_a_server_that_hangs_is_left_after_the_timeout(
    pair: ServerPair, adapter: SyncAdapter
) -> None:
    ids = prompt(4, 12)
    expected = greedy(pair.model, ids, 200)
    first = pair.servers[0]
    assert first.process is not None
    processes = [
        psutil.Process(first.process.pid),
        *psutil.Process(first.process.pid).children(recursive=True),
    ]

    def stop() -> None:
        for process in processes:
            process.suspend()

    try:
        with open_sequence(adapter, pair.urls, timeout=5.0) as sequence:
            assert sequence.server == first.grpc_url
            assert (
                collect(adapter, sequence.generate(ids, 200, ignore_eos=True), 20, stop)[0]
                == expected
            )
            assert sequence.server == pair.urls[1]
        with (
            open_sequence(adapter, pair.urls[:1], timeout=1.0, retry=Retry(attempts=2)) as sequence,
            pytest.raises(UnreachableError) as gone,
        ):
            list(adapter.pieces(sequence.generate(ids, 4)))
        assert gone.value.code == "DEADLINE_EXCEEDED"
    finally:
        for process in processes:
            process.resume()


def test_more_generations_than_slots_all_finish(pair: ServerPair) -> None:
    def run(seed: int) -> None:
        with Sequence(client, MODEL) as sequence:
            generation = sequence.generate(prompt(seed, 6), 30, ignore_eos=True)
            assert [token for piece in generation for token in piece.tokens] == greedy(
                pair.model, prompt(seed, 6), 30
            )

    with Client(pair.urls) as client, ThreadPoolExecutor(6 * SLOTS) as pool:
        list(pool.map(run, range(6 * SLOTS)))


def test_asyncio_streams_share_one_connection(pair: ServerPair) -> None:
    expected = {seed: greedy(pair.model, prompt(seed, 6), 12) for seed in range(8)}

    async def run(client: AsyncClient, seed: int) -> bool:
        async with AsyncSequence(client, MODEL) as sequence:
            generation = sequence.generate(prompt(seed, 6), 12, ignore_eos=True)
            return [token async for piece in generation for token in piece.tokens] == expected[seed]

    async def main() -> None:
        async with AsyncClient(pair.urls[1]) as client:
            assert all(await asyncio.gather(*(run(client, index % 8) for index in range(48))))

    asyncio.run(main())


def test_an_asyncio_caller_that_stops_waiting_loses_nothing(pair: ServerPair) -> None:
    ids = prompt(6, 9)

    async def main() -> None:
        async with (
            AsyncClient(pair.urls[1]) as client,
            AsyncSequence(client, MODEL) as sequence,
            sequence.generate(ids, 200, ignore_eos=True) as generation,
        ):
            timeouts = 0
            await anext(generation)
            while not generation.finish_reason:
                try:
                    async with asyncio.timeout(0.0005):
                        await anext(generation)
                except TimeoutError:
                    timeouts += 1
            assert generation.tokens == greedy(pair.model, ids, 200)
            assert timeouts > 0
            task = asyncio.create_task(sequence.tokens([1, 2]))
            await asyncio.sleep(0)
            task.cancel()
            token = await sequence.tokens(
                [3]
            )  # whether the step before it ran is not known: the sequence is as if it had not
            assert [token] == greedy(pair.model, [*ids, *generation.tokens, 3], 1)

    asyncio.run(main())


def test_the_loss_of_a_stream_model_without_tokens_is_an_error(
    pair: ServerPair, adapter: SyncAdapter
) -> None:
    value = {"value": np.full(4, 2.0, np.float32)}
    with (
        FaultProxy(pair.urls[1]) as proxy,
        open_sequence(adapter, [proxy.url], "sums", Retry(attempts=4)) as sequence,
    ):
        for count in range(1, 8):
            assert adapter.wait(sequence.step(value))["sum"].tolist() == [2.0 * count] * 4
            if count < 6:
                proxy.disconnect()
        proxy.drop_next_response()
        with pytest.raises(
            SequenceLostError, match=r"the sequence holds 8.*its inputs are not tokens"
        ) as lost:
            adapter.wait(sequence.step(value))
        assert not lost.value.retryable


def test_a_synchronous_client_leaves_no_threads_behind(pair: ServerPair) -> None:
    before = threading.active_count()
    with Client(pair.urls[1]) as client:
        for _ in range(10):
            with Sequence(client, MODEL) as sequence:
                next(
                    sequence.generate([1, 2], 100, ignore_eos=True)
                )  # left running: cancelled at the end of the block
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_generations_continue_when_one_of_two_servers_is_killed(pair: ServerPair) -> None:
    """Both clients at once, on both servers; afterwards each sequence has a second generation."""
    cases: list[tuple[Any, dict[str, Any]]] = [
        (prompt(7, 30), {"ignore_eos": True}),
        (prompt(8, 30), SAMPLED),
        ("Unless required by applicable law", SAMPLED),
    ]
    adapters = [SyncAdapter(), AsyncAdapter()]
    turn: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True}
    with Client(pair.urls[1]) as reference:
        expected = []
        for given, options in cases:
            with Sequence(reference, MODEL) as sequence:
                generation = sequence.generate(given, 160, **options)
                assert [len(piece.tokens) for piece in generation]
                expected.append(
                    (
                        generation.tokens,
                        generation.text,
                        [*_tokens(sequence.generate([5, 6], **turn))],
                    )
                )
    clients = [adapter.client(pair.urls) for adapter in adapters]
    running = []
    for (given, options), tokens_text_after in zip(cases, expected, strict=True):
        for adapter, client in zip(adapters, clients, strict=True):
            for _ in pair.urls:
                sequence = adapter.sequence(client, MODEL)
                generation = sequence.generate(given, 160, **options)
                running.append(
                    (adapter, sequence, generation, adapter.pieces(generation), tokens_text_after)
                )
    on_killed_server = [one for one in running if one[1].server == pair.urls[0]]
    assert len(on_killed_server) == len(running) // 2
    for _, _, _, pieces, _ in on_killed_server[:SLOTS]:  # the others wait for a slot
        next(pieces)
    kill_server(pair.servers[0])
    for adapter, sequence, generation, pieces, (tokens, text, after) in running:
        for _ in pieces:
            pass
        assert (generation.tokens, generation.text) == (tokens, text)
        assert sequence.server == pair.urls[1]
        assert [
            token
            for piece in adapter.pieces(sequence.generate([5, 6], **turn))
            for token in piece.tokens
        ] == after
        adapter.wait(sequence.close())
    for adapter, client in zip(adapters, clients, strict=True):
        adapter.wait(client.close())
        adapter.close()


def _tokens(generation: Any) -> list[int]:
    return [token for piece in generation for token in piece.tokens]
