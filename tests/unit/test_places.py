"""Triton's sequence places: when one is unused, refused, freed, and opened again."""

import threading
import time
from collections import deque

import pytest
from inplace.drivers.places import (
    END_DELAY,
    PROBE_INTERVAL,
    PlaceKeeper,
    Places,
    ServerStoppingError,
)
from inplace.drivers.shutdown import EXIT_MARGIN, MAX_SILENCE, Shutdown
from inplace.errors import Code, RequestError
from inplace.runtime.slots import EndReason, SequenceId, SequenceState
from support.streaming import wait_until


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def places(clock: Clock) -> Places:
    return Places(40, clock)


def served(
    places: Places, sequence_id: SequenceId, *, start: bool = False, end: bool = False
) -> RequestError | None:
    """A request that is answered at once and gives its sequence no slot."""
    refusal = places.arrived(sequence_id, start=start, end=end)
    places.answered(sequence_id)
    return refusal


def unused(places: Places, clock: Clock) -> SequenceId | None:
    clock.now += END_DELAY
    return places.pop_unused()


def test_a_place_is_unused_once_its_sequence_has_ended_and_every_request_is_answered(
    places: Places, clock: Clock
) -> None:
    sequence = SequenceState("a", 0)
    places.arrived("a", start=True, end=False)
    places.sequence_started(sequence)
    places.answered("a")
    assert unused(places, clock) is None
    places.arrived("a", start=False, end=False)
    places.sequence_ended(sequence, EndReason.CANCELLED)
    assert unused(places, clock) is None
    places.answered("a")
    assert places.pop_unused() is None  # a client may START it again at once
    assert unused(places, clock) == "a"
    assert unused(places, clock) is None  # its END is on its way
    places.own_end_arrived("a")
    places.end_finished("a", was_known=True)
    assert len(places) == 0


def test_a_sequence_that_its_client_ends_needs_no_end_of_ours(places: Places, clock: Clock) -> None:
    served(places, 1, start=True)
    served(places, 1, end=True)
    served(places, 2, start=True, end=True)
    assert len(places) == 0
    assert unused(places, clock) is None


def test_near_the_limit_a_start_is_refused_and_its_place_is_freed(
    places: Places, clock: Clock
) -> None:
    for number in range(1, 36):
        assert places.arrived(number, start=True, end=False) is None
    assert served(places, 99, start=True, end=True) is None  # it keeps no place
    assert served(places, 1) is None  # of a sequence that has one
    refusal = served(places, 36, start=True)
    assert refusal is not None
    assert (refusal.code, refusal.retryable) == (Code.QUEUE_FULL, True)
    assert unused(places, clock) == 36


def test_a_start_before_our_end_keeps_the_place(places: Places, clock: Clock) -> None:
    served(places, 1, start=True)
    clock.now += END_DELAY
    places.arrived(1, start=True, end=False)
    assert places.pop_unused() is None


def test_a_place_that_our_end_closes_under_a_new_start_is_opened_again(
    places: Places, clock: Clock
) -> None:
    served(places, 1, start=True)
    assert unused(places, clock) == 1
    places.arrived(1, start=True, end=False)  # it overtook the END
    places.own_end_arrived(1)
    places.end_finished(1, was_known=True)
    assert (places.pop_reopened(), len(places)) == (1, 0)
    places.own_start_arrived(1)
    assert len(places) == 1
    places.answered(1)
    assert unused(places, clock) == 1


def test_a_start_after_our_end_has_a_place_of_its_own(places: Places, clock: Clock) -> None:
    served(places, 1, start=True)
    assert unused(places, clock) == 1
    places.own_end_arrived(1)
    places.arrived(1, start=True, end=False)
    places.end_finished(1, was_known=True)
    assert (places.pop_reopened(), len(places)) == (None, 1)


def test_an_end_that_triton_does_not_know_closes_the_place(places: Places, clock: Clock) -> None:
    served(places, 1, start=True)
    assert unused(places, clock) == 1
    places.end_finished(1, was_known=False)
    assert len(places) == 0


def test_an_end_that_could_not_be_sent_is_sent_again(places: Places, clock: Clock) -> None:
    served(places, 1, start=True)
    assert unused(places, clock) == 1
    places.end_finished(1, was_known=True)  # it never arrived
    assert unused(places, clock) == 1


def test_a_place_whose_end_cannot_be_sent_is_forgotten_when_triton_forgets_it(
    clock: Clock,
) -> None:
    places = Places(40, clock, idle_timeout=10.0)
    served(places, 1, start=True)
    for seconds in (9.0, 11.0):
        clock.now = seconds
        assert places.pop_unused() == 1
        assert len(places) == 1
        places.end_finished(1, was_known=True, retry=True)
    assert len(places) == 0


def test_an_end_that_the_backend_refuses_leaves_the_sequence_its_place(places: Places) -> None:
    places.arrived(1, start=True, end=False)
    places.sequence_started(SequenceState(1, 0))
    places.answered(1)
    served(places, 1, end=True)  # of a client without its key
    assert len(places) == 0
    assert (places.pop_reopened(), places.pop_reopened()) == (1, None)
    places.own_start_arrived(1)
    assert len(places) == 1


def test_a_sequence_that_is_started_again_needs_no_start_of_ours(places: Places) -> None:
    places.arrived(1, start=True, end=False)
    places.sequence_started(SequenceState(1, 0))
    places.answered(1)
    served(places, 1, end=True)
    served(places, 1, start=True)
    assert places.pop_reopened() is None


def test_sequences_that_cannot_be_named_count_until_triton_forgets_them(clock: Clock) -> None:
    places = Places(40, clock, idle_timeout=10.0)
    for _ in range(35):
        places.unnamed_arrived()
    assert len(places) == 35
    refusal = served(places, 1, start=True)
    assert refusal is not None and refusal.code == Code.QUEUE_FULL
    clock.now = 10.0
    assert served(places, 2, start=True, end=False) is None


class Driver:
    """Records what a shutdown asks for."""

    def __init__(self) -> None:
        self.calls: deque[object] = deque()
        self.handed_over = 0

    def hand_over(self) -> None:
        self.handed_over += 1

    def end_idle(self, seconds: float) -> None:
        self.calls.append(seconds)

    def stop_running(self, error: RequestError) -> None:
        self.calls.append(error.code)


def test_a_shutdown_ends_silent_sequences_and_answers_the_others_before_the_server_gives_up(
    clock: Clock,
) -> None:
    driver = Driver()
    shutdown = Shutdown(driver, 30.0, clock)
    shutdown.begin()
    shutdown.advance()
    clock.now = 30.0 - EXIT_MARGIN
    shutdown.advance()
    assert list(driver.calls) == [MAX_SILENCE, Code.SHUTDOWN]
    assert driver.handed_over == 2


class Requests:
    """A server that serves until it is stopped, and answers every END."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.stopping = threading.Event()
        self.ended: list[SequenceId] = []

    def end(self, sequence_id: SequenceId) -> bool:
        self.ended.append(sequence_id)
        self._places.own_end_arrived(sequence_id)
        return True

    def start(self, sequence_id: SequenceId) -> None:
        raise AssertionError(sequence_id)

    def check_serving(self) -> None:
        if self.stopping.is_set():
            raise ServerStoppingError


def test_the_keeper_frees_unused_places_and_notices_that_the_server_stops() -> None:
    places, driver = Places(40), Driver()
    requests = Requests(places)
    keeper = PlaceKeeper(places, requests, Shutdown(driver, 30.0))
    try:
        for number in range(1, 11):
            served(places, number, start=True)
        wait_until(lambda: len(places) == 0, 10.0)
        assert requests.ended == list(range(1, 11))
        places.arrived("live", start=True, end=False)
        assert not driver.calls
        requests.stopping.set()
        wait_until(lambda: bool(driver.calls))
    finally:
        keeper.close()


class Unreachable(Requests):
    """A server to which no END gets through."""

    def end(self, sequence_id: SequenceId) -> bool:
        self.ended.append(sequence_id)
        raise OSError("no way to the server")


def test_ends_that_fail_delay_no_shutdown_and_are_not_sent_without_pause() -> None:
    places, driver = Places(40), Driver()
    requests = Unreachable(places)
    keeper = PlaceKeeper(places, requests, Shutdown(driver, 30.0))
    try:
        served(places, 1, start=True)
        wait_until(lambda: requests.ended == [1], 10.0)
        requests.stopping.set()
        wait_until(lambda: len(driver.calls) >= 2, 10.0)
        assert len(requests.ended) < 5
        assert len(places) == 1
    finally:
        keeper.close()


def test_a_shutdown_sees_a_sequence_that_holds_no_place() -> None:
    places, driver = Places(40), Driver()
    requests = Requests(places)
    keeper = PlaceKeeper(places, requests, Shutdown(driver, 30.0))
    try:
        requests.stopping.set()
        places.arrived("one shot", start=True, end=True)
        wait_until(lambda: bool(driver.calls))
    finally:
        keeper.close()


class Alone(Requests):
    """A server that cannot be reached, and then can."""

    def __init__(self, places: Places) -> None:
        super().__init__(places)
        self.reachable = threading.Event()

    def check_serving(self) -> None:
        if not self.reachable.is_set():
            raise OSError("no way to the server")
        super().check_serving()


def test_a_server_that_cannot_be_asked_is_mentioned_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    places, driver = Places(40), Driver()
    requests = Alone(places)
    keeper = PlaceKeeper(places, requests, Shutdown(driver, 30.0))
    try:
        places.arrived("a", start=True, end=False)
        wait_until(lambda: "no way to the server" in caplog.text)
        time.sleep(3 * PROBE_INTERVAL)
        assert caplog.text.count("cannot be asked") == 1
        requests.stopping.set()
        requests.reachable.set()
        wait_until(lambda: bool(driver.calls))
    finally:
        keeper.close()


class Silent(Requests):
    """A server that does not answer any more."""

    def check_serving(self) -> None:
        self.stopping.wait()


def test_a_keeper_whose_request_is_never_answered_can_be_closed() -> None:
    places = Places(40)
    requests = Silent(places)
    keeper = PlaceKeeper(places, requests, Shutdown(Driver(), 30.0))
    places.arrived("a", start=True, end=False)
    closing = threading.Thread(target=keeper.close)
    closing.start()
    closing.join(60.0)
    assert not closing.is_alive()
    requests.stopping.set()


def test_one_place_is_enough_for_one_sequence(clock: Clock) -> None:
    assert Places(1, clock).arrived("a", start=True, end=False) is None
