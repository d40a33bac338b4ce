"""A START with the key of a live sequence of a stream model: with a position it goes on.

Without one it starts anew. Triton calls every such START a conflict and passes it on.
"""

import queue
from collections.abc import Iterator
from typing import Any

import pytest
from support.client_adapters import AsyncAdapter, SyncAdapter
from support.faults import FORGOTTEN, eventually
from support.generating import GrpcStream, Output
from support.models import greedy
from support.served import MODEL, SLOTS, Served
from support.streams import prompt

pytestmark = pytest.mark.server

IDS = prompt(1, 9)
STEP, GENERATION = 0, 6
"""Tokens to generate."""


@pytest.fixture
def talk(served: Served) -> Iterator[GrpcStream]:
    with GrpcStream(served.server.grpc_url, MODEL) as opened:
        yield opened


def expected(served: Served, history: list[int], max_tokens: int) -> Output:
    """What transformers generates after a history, as the result of a step or a generation."""
    return Output(
        greedy(served.llama, history, max_tokens or 1), "length" if max_tokens else "step"
    )


def goes_on(served: Served, talk: GrpcStream, sequence: str, history: list[int]) -> None:
    """The live sequence holds this history and nothing else; it is ended."""
    more = [7, 8]
    result = talk.request(
        sequence, more, GENERATION, end=True, sequence_key="mine", position=len(history)
    )
    assert result == expected(served, history + more, GENERATION)


@pytest.mark.parametrize("before", [STEP, GENERATION])
@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_key_and_position_a_start_goes_on_with_the_live_sequence(
    served: Served, talk: GrpcStream, before: int, now: int
) -> None:
    first = talk.request("on", IDS, before, start=True, sequence_key="mine")
    assert first == expected(served, IDS, before)
    history = IDS + first.tokens * bool(
        before
    )  # what was generated belongs to the sequence; its last token is not fed yet
    for more in ([3, 4], [5]):
        result = talk.request(
            "on", more, now, start=True, sequence_key="mine", position=str(len(history))
        )
        history = history + more
        assert result == expected(served, history, now)
        assert result != expected(served, more, now)  # which a fresh sequence would have generated
        history += result.tokens * bool(now)
    goes_on(served, talk, "on", history)


@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_key_position_and_end_it_goes_on_and_ends(
    served: Served, talk: GrpcStream, now: int
) -> None:
    talk.request("last", IDS, start=True, sequence_key="mine")
    result = talk.request(
        "last", [3], now, start=True, end=True, sequence_key="mine", position=len(IDS)
    )
    assert result == expected(served, [*IDS, 3], now)
    result = talk.request("last", [3], now, start=True, sequence_key="mine", position=len(IDS) + 1)
    assert result.error.startswith("INPLACE-POSITION retryable=0 sequence=last ")
    assert "meant for position 10, the sequence holds 0;" in result.error
    assert (
        "INPLACE-UNKNOWN_SEQUENCE" in talk.request("last", [3], end=True, sequence_key="mine").error
    )


@pytest.mark.parametrize("before", [STEP, GENERATION])
@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_another_position_it_is_refused_and_nothing_changes(
    served: Served, talk: GrpcStream, before: int, now: int
) -> None:
    first = talk.request("wrong", IDS, before, start=True, sequence_key="mine")
    history = IDS + first.tokens * bool(before)
    for position in (1, len(history) - 1, len(history) + 1, 1 << 40):
        result = talk.request("wrong", [3], now, start=True, sequence_key="mine", position=position)
        assert (result.tokens, result.reason) == ([], "")
        assert result.error.startswith(
            "INPLACE-POSITION retryable=0 sequence=wrong request=-: the request was meant "
            f"for position {position}, "
            f"the sequence holds {len(history)};"
        )
    goes_on(served, talk, "wrong", history)


@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_another_position_and_end_it_is_refused_and_ends(talk: GrpcStream, now: int) -> None:
    talk.request("wrong", IDS, start=True, sequence_key="mine")
    assert (
        "INPLACE-POSITION"
        in talk.request(
            "wrong", [3], now, start=True, end=True, sequence_key="mine", position=3
        ).error
    )
    assert (
        "the sequence holds 0;"
        in talk.request(
            "wrong", [3], start=True, end=True, sequence_key="mine", position=len(IDS)
        ).error
    )


@pytest.mark.parametrize("now", [STEP, GENERATION])
@pytest.mark.parametrize("end", [False, True])
def test_with_another_key_it_is_refused_whatever_its_position_and_nothing_changes(
    served: Served, talk: GrpcStream, now: int, end: bool
) -> None:
    first = talk.request("guarded", IDS, GENERATION, start=True, sequence_key="mine")
    history = IDS + first.tokens
    for key, has in (({"sequence_key": "yours"}, "a sequence_key"), ({}, "no sequence_key")):
        for position in ({"position": len(history)}, {"position": 3}, {"position": 0}, {}):
            parameters: dict[str, Any] = key | position
            result = talk.request("guarded", [3], now, start=True, end=end, **parameters)
            assert (result.tokens, result.reason) == ([], "")
            assert result.error.startswith(
                "INPLACE-SEQUENCE_KEY retryable=1 sequence=guarded request=-: the request "
                f"carries {has}, "
            )
    if end:  # Triton has ended the sequence for all that, until the backend opens its place again
        results: list[Output] = []

        def served_again() -> bool:
            results.append(talk.request("guarded", [7], sequence_key="mine", position=len(history)))
            return FORGOTTEN not in results[-1].error

        eventually(served_again, "the sequence has a place again")
        assert results[-1] == expected(served, [*history, 7], STEP)
        history = [*history, 7]
    goes_on(served, talk, "guarded", history)


@pytest.mark.parametrize("now", [STEP, GENERATION])
@pytest.mark.parametrize("position", [{}, {"position": 0}, {"position": "0"}])
def test_with_the_key_but_no_position_above_0_a_fresh_sequence_replaces_the_live_one(
    served: Served, talk: GrpcStream, now: int, position: dict[str, Any]
) -> None:
    talk.request("anew", IDS, GENERATION, start=True, sequence_key="mine")
    for seed in range(SLOTS + 1):  # none keeps the slot of the one before
        ids = prompt(10 + seed, 5)
        result = talk.request("anew", ids, now, start=True, sequence_key="mine", **position)
        assert result == expected(served, ids, now)
    goes_on(served, talk, "anew", ids + result.tokens * bool(now))


@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_without_a_key_a_start_with_a_position_ends_the_live_sequence_and_is_refused(
    talk: GrpcStream, now: int
) -> None:
    talk.request("open", IDS, start=True)
    assert (
        "meant for position 9, the sequence holds 0;"
        in talk.request("open", [3], now, start=True, position=len(IDS)).error
    )
    assert "INPLACE-UNKNOWN_SEQUENCE" in talk.request("open", [3], end=True).error


def test_a_start_that_goes_on_needs_no_slot(served: Served, talk: GrpcStream) -> None:
    """It is served where every slot is taken and a generation waits for one."""
    talk.request("on", IDS, start=True, sequence_key="mine")
    filled: list[str] = []
    while not (refused := talk.request(f"filling {len(filled)}", [1], start=True)).error:
        filled.append(f"filling {len(filled)}")
    assert "INPLACE-NO_FREE_SLOT" in refused.error
    talk.request(f"filling {len(filled)}", [], end=True)  # of Triton's
    with GrpcStream(served.server.grpc_url, MODEL) as patient:
        patient.send("patient", IDS, GENERATION, start=True, end=True)
        with pytest.raises(queue.Empty):
            patient.receive(timeout=0.3)
        result = talk.request(
            "on", [3], GENERATION, start=True, sequence_key="mine", position=len(IDS)
        )
        assert result == expected(served, [*IDS, 3], GENERATION)
        history = [*IDS, 3, *result.tokens]
        result = talk.request("on", [5], start=True, sequence_key="mine", position=len(history))
        assert result == expected(served, [*history, 5], STEP)
        with pytest.raises(queue.Empty):
            patient.receive(timeout=0.1)
        goes_on(served, talk, "on", [*history, 5])
        assert patient.collect() == expected(served, IDS, GENERATION)
    for name in filled:
        assert talk.request(name, [], end=True) == Output([], "step")


@pytest.mark.parametrize("adapter", [SyncAdapter, AsyncAdapter], ids=["sync", "asyncio"])
def test_copies_of_a_sequence_go_on_alone(served: Served, adapter: type[SyncAdapter]) -> None:
    talk = adapter()
    client = talk.client([served.server.grpc_url])
    first = talk.sequence(client, MODEL, replay=False)  # the server copies, or there is an error
    begun = first.generate(IDS, 5, ignore_eos=True)
    tokens = [token for piece in talk.pieces(begun) for token in piece.tokens]
    copies = [talk.wait(first.fork()) for _ in range(2)]
    for copy, more in zip(copies, ([], [7, 8]), strict=True):
        generation = copy.generate(more, 6, ignore_eos=True)
        generated = [token for piece in talk.pieces(generation) for token in piece.tokens]
        assert generated == greedy(served.llama, [*IDS, *tokens, *more], 6)
        assert copy.length == len(IDS) + 5 + len(more) + 6
    assert talk.wait(first.tokens([9])) == greedy(served.llama, [*IDS, *tokens, 9], 1)[0]
    for sequence in (first, *copies):
        talk.wait(sequence.close())
    talk.wait(client.close())
    talk.close()
