"""A START with the key of a live sequence of a stream model: with a position it goes on.

Without one it starts anew. Triton calls every such START a conflict and passes it on.
"""

import queue
from collections.abc import Iterator
from typing import Any

import pytest
from support.faults import FORGOTTEN
from support.generating import Said, Talk
from support.models import greedy
from support.served import MODEL, SLOTS, Served
from support.streams import prompt

pytestmark = pytest.mark.server

IDS = prompt(1, 9)
STEP, GENERATION = 0, 6
"""Tokens to generate."""


@pytest.fixture
def talk(served: Served) -> Iterator[Talk]:
    with Talk(served.server.grpc_url, MODEL) as opened:
        yield opened


def says(served: Served, history: list[int], max_tokens: int) -> Said:
    """What transformers says after a history, as a step or a generation says it."""
    return Said(greedy(served.llama, history, max_tokens or 1), "length" if max_tokens else "step")


def goes_on(served: Served, talk: Talk, sequence: str, history: list[int]) -> None:
    """The live sequence holds this history and nothing else; it is ended."""
    more = [7, 8]
    found = talk.ask(
        sequence, more, GENERATION, end=True, sequence_key="mine", position=len(history)
    )
    assert found == says(served, history + more, GENERATION)


@pytest.mark.parametrize("before", [STEP, GENERATION])
@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_key_and_position_a_start_goes_on_with_the_live_sequence(
    served: Served, talk: Talk, before: int, now: int
) -> None:
    first = talk.ask("on", IDS, before, start=True, sequence_key="mine")
    assert first == says(served, IDS, before)
    history = IDS + first.tokens * bool(
        before
    )  # what a generation said is the sequence's, its last token still to be fed
    for more in ([3, 4], [5]):
        found = talk.ask(
            "on", more, now, start=True, sequence_key="mine", position=str(len(history))
        )
        history = history + more
        assert found == says(served, history, now)
        assert found != says(served, more, now)  # which a fresh sequence would have said
        history += found.tokens * bool(now)
    goes_on(served, talk, "on", history)


@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_key_position_and_end_it_goes_on_and_ends(
    served: Served, talk: Talk, now: int
) -> None:
    talk.ask("last", IDS, start=True, sequence_key="mine")
    found = talk.ask("last", [3], now, start=True, end=True, sequence_key="mine", position=len(IDS))
    assert found == says(served, [*IDS, 3], now)
    found = talk.ask("last", [3], now, start=True, sequence_key="mine", position=len(IDS) + 1)
    assert found.error.startswith("INPLACE-POSITION retryable=0 sequence=last ")
    assert "meant for position 10, the sequence holds 0;" in found.error
    assert "INPLACE-UNKNOWN_SEQUENCE" in talk.ask("last", [3], end=True, sequence_key="mine").error


@pytest.mark.parametrize("before", [STEP, GENERATION])
@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_another_position_it_is_refused_and_nothing_changes(
    served: Served, talk: Talk, before: int, now: int
) -> None:
    first = talk.ask("wrong", IDS, before, start=True, sequence_key="mine")
    history = IDS + first.tokens * bool(before)
    for position in (1, len(history) - 1, len(history) + 1, 1 << 40):
        found = talk.ask("wrong", [3], now, start=True, sequence_key="mine", position=position)
        assert (found.tokens, found.reason) == ([], "")
        assert found.error.startswith(
            "INPLACE-POSITION retryable=0 sequence=wrong request=-: the request was meant "
            f"for position {position}, "
            f"the sequence holds {len(history)};"
        )
    goes_on(served, talk, "wrong", history)


@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_with_another_position_and_end_it_is_refused_and_ends(talk: Talk, now: int) -> None:
    talk.ask("wrong", IDS, start=True, sequence_key="mine")
    assert (
        "INPLACE-POSITION"
        in talk.ask("wrong", [3], now, start=True, end=True, sequence_key="mine", position=3).error
    )
    assert (
        "the sequence holds 0;"
        in talk.ask(
            "wrong", [3], start=True, end=True, sequence_key="mine", position=len(IDS)
        ).error
    )


@pytest.mark.parametrize("now", [STEP, GENERATION])
@pytest.mark.parametrize("end", [False, True])
def test_with_another_key_it_is_refused_whatever_its_position_and_nothing_changes(
    served: Served, talk: Talk, now: int, end: bool
) -> None:
    first = talk.ask("guarded", IDS, GENERATION, start=True, sequence_key="mine")
    history = IDS + first.tokens
    for key, has in (({"sequence_key": "yours"}, "a sequence_key"), ({}, "no sequence_key")):
        for position in ({"position": len(history)}, {"position": 3}, {"position": 0}, {}):
            parameters: dict[str, Any] = key | position
            found = talk.ask("guarded", [3], now, start=True, end=end, **parameters)
            assert (found.tokens, found.reason) == ([], "")
            assert found.error.startswith(
                "INPLACE-SEQUENCE_KEY retryable=1 sequence=guarded request=-: the request "
                f"carries {has}, "
            )
    if end:  # Triton has ended the sequence for all that
        assert (
            FORGOTTEN in talk.ask("guarded", [7], sequence_key="mine", position=len(history)).error
        )
        found = talk.ask("guarded", [7], start=True, sequence_key="mine", position=len(history))
        assert found == says(served, [*history, 7], STEP)
        history = [*history, 7]
    goes_on(served, talk, "guarded", history)


@pytest.mark.parametrize("now", [STEP, GENERATION])
@pytest.mark.parametrize("position", [{}, {"position": 0}, {"position": "0"}])
def test_with_the_key_but_no_position_above_0_a_fresh_sequence_replaces_the_live_one(
    served: Served, talk: Talk, now: int, position: dict[str, Any]
) -> None:
    talk.ask("anew", IDS, GENERATION, start=True, sequence_key="mine")
    for seed in range(SLOTS + 1):  # none keeps the slot of the one before
        ids = prompt(10 + seed, 5)
        found = talk.ask("anew", ids, now, start=True, sequence_key="mine", **position)
        assert found == says(served, ids, now)
    goes_on(served, talk, "anew", ids + found.tokens * bool(now))


@pytest.mark.parametrize("now", [STEP, GENERATION])
def test_without_a_key_a_start_with_a_position_ends_the_live_sequence_and_is_refused(
    talk: Talk, now: int
) -> None:
    talk.ask("open", IDS, start=True)
    assert (
        "meant for position 9, the sequence holds 0;"
        in talk.ask("open", [3], now, start=True, position=len(IDS)).error
    )
    assert "INPLACE-UNKNOWN_SEQUENCE" in talk.ask("open", [3], end=True).error


def test_a_start_that_goes_on_needs_no_slot(served: Served, talk: Talk) -> None:
    """It is served where every slot is taken and a generation waits for one."""
    talk.ask("on", IDS, start=True, sequence_key="mine")
    filled: list[str] = []
    while not (refused := talk.ask(f"filling {len(filled)}", [1], start=True)).error:
        filled.append(f"filling {len(filled)}")
    assert "INPLACE-NO_FREE_SLOT" in refused.error
    talk.ask(f"filling {len(filled)}", [], end=True)  # of Triton's
    with Talk(served.server.grpc_url, MODEL) as patient:
        patient.send("patient", IDS, GENERATION, start=True, end=True)
        with pytest.raises(queue.Empty):
            patient.receive(timeout=0.3)
        found = talk.ask("on", [3], GENERATION, start=True, sequence_key="mine", position=len(IDS))
        assert found == says(served, [*IDS, 3], GENERATION)
        history = [*IDS, 3, *found.tokens]
        found = talk.ask("on", [5], start=True, sequence_key="mine", position=len(history))
        assert found == says(served, [*history, 5], STEP)
        with pytest.raises(queue.Empty):
            patient.receive(timeout=0.1)
        goes_on(served, talk, "on", [*history, 5])
        assert patient.hear() == says(served, IDS, GENERATION)
    for name in filled:
        assert talk.ask(name, [], end=True) == Said([], "step")
