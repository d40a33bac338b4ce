"""The turn: others begin nothing while the engine's thread has it, but are not kept for ever."""

import threading

import pytest
from inplace.drivers import senders as module
from inplace.drivers.senders import GilPriority


def passes(turn: GilPriority) -> threading.Event:
    """Set when another thread's wait for the turn is over."""
    passed = threading.Event()

    def other() -> None:
        turn.wait()
        passed.set()

    threading.Thread(target=other, daemon=True).start()
    return passed


def test_who_comes_while_it_is_taken_waits_until_it_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 60.0)
    turn = GilPriority()
    assert passes(turn).wait(10), "nobody has it"
    turn.take()
    waiting = [passes(turn) for _ in range(3)]
    assert not any(each.wait(0.05) for each in waiting)
    with turn:
        assert all(each.wait(10) for each in waiting)
        assert passes(turn).wait(10), "the device computes"
    last = passes(turn)
    assert not last.wait(0.05)
    turn.give()
    assert last.wait(10)


def test_nobody_waits_for_an_engine_that_never_waits() -> None:
    turn = GilPriority()
    turn.take()
    assert passes(turn).wait(10)
    turn.give()
