"""The GIL: other threads begin nothing while the engine's thread has priority, but not for ever."""

import threading

import pytest
from inplace.drivers import senders
from inplace.drivers.senders import GilPriority


def start_waiting(gil: GilPriority) -> threading.Event:
    """Set when another thread's wait for the engine is over."""
    passed = threading.Event()

    def wait() -> None:
        gil.wait_for_engine()
        passed.set()

    threading.Thread(target=wait, daemon=True).start()
    return passed


def test_threads_wait_while_the_engine_has_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "MAX_GIL_WAIT", 60.0)
    gil = GilPriority()
    assert start_waiting(gil).wait(60), "the engine's thread has not acquired it"
    gil.acquire()
    waiting = [start_waiting(gil) for _ in range(3)]
    assert not any(each.wait(0.05) for each in waiting)
    with gil.released:
        assert all(each.wait(60) for each in waiting)
        assert start_waiting(gil).wait(60), "the device computes"
    last = start_waiting(gil)
    assert not last.wait(0.05)
    gil.release()
    assert last.wait(60)


def test_an_engine_that_never_releases_blocks_no_other_thread_for_ever() -> None:
    gil = GilPriority()
    gil.acquire()
    assert start_waiting(gil).wait(60)
    gil.release()
