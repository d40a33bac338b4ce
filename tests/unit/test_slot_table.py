"""The slot table, with a clock that the tests set."""

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from inplace.errors import Code, RequestError
from inplace.runtime.slots import MAX_RECLAIMED_IDS, SequenceId, SequenceState, SlotTable


class Clock:
    """A clock that stands still until a test advances it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(table: SlotTable, id: SequenceId, *, start: bool = False) -> RequestError:
    with pytest.raises(RequestError) as error:
        table.start(id) if start else table.find(id)
    return error.value


def test_a_sequence_keeps_its_slot_from_start_to_end(clock: Clock) -> None:
    table = SlotTable(2, 10.0, clock)
    one, two = table.start(1), table.start("1")
    assert {one.slot, two.slot} == {0, 1}
    assert (len(table), table.num_free) == (2, 0)
    assert table.find(1) is table.get(1) is one
    assert table.find("1") is two
    table.touch(one)
    assert table.find(1).slot == one.slot
    table.end(one)
    assert table.get(1) is None
    assert (len(table), table.num_free) == (1, 1)
    assert table.start(3).slot == one.slot


def test_no_free_slot_is_retryable_and_says_how_many_there_are(clock: Clock) -> None:
    table = SlotTable(2, 10.0, clock)
    owned = [table.start(1), table.start(2)]
    clock.now += 9.9
    error = refused(table, 3, start=True)
    assert (error.code, error.retryable) == (Code.NO_FREE_SLOT, True)
    assert "all 2 slots are owned by live sequences" in str(error)
    assert [table.find(1), table.find(2)] == owned
    table.end(owned[0])
    assert table.start(3).slot == owned[0].slot


def test_a_start_reclaims_what_has_been_idle_for_exactly_the_timeout(clock: Clock) -> None:
    table = SlotTable(1, 10.0, clock)
    first = table.start(1)
    clock.now += 10.0
    assert table.start(2).slot == first.slot
    assert table.get(1) is None


def test_reclaim_ends_the_longest_idle_first_and_only_those_past_the_timeout(clock: Clock) -> None:
    table = SlotTable(4, 10.0, clock)
    for name in ("a", "b", "c", "d"):
        table.start(name)
        clock.now += 1.0
    table.touch(table.find("a"))  # now the youngest: idle since 1004
    assert table.reclaim_idle() == []
    clock.now = 1012.0
    assert [sequence.id for sequence in table.reclaim_idle()] == ["b", "c"]
    assert (len(table), table.num_free) == (2, 2)
    clock.now = 1014.0
    assert [sequence.id for sequence in table.reclaim_idle()] == ["d", "a"]
    assert table.reclaim_idle() == []


def test_a_busy_sequence_is_not_reclaimed_but_others_are(clock: Clock) -> None:
    table = SlotTable(2, 10.0, clock)
    busy, idle = table.start(1), table.start(2)
    busy.busy = True
    clock.now += 100.0
    assert table.reclaim_idle() == [idle]
    assert table.find(1) is busy
    table.start(3)
    assert refused(table, 4, start=True).code is Code.NO_FREE_SLOT
    busy.busy = False
    assert table.start(4).slot == busy.slot


def test_the_error_distinguishes_a_reclaimed_sequence_from_an_unknown_one(clock: Clock) -> None:
    table = SlotTable(1, 7.5, clock)
    table.start("late")
    clock.now += 12.0
    table.reclaim_idle()
    reclaimed = refused(table, "late")
    assert (reclaimed.code, reclaimed.retryable) == (Code.UNKNOWN_SEQUENCE, False)
    assert str(reclaimed).startswith(
        "no sequence 'late' is live: it was idle for 12 s and its slot was reclaimed"
        " (idle timeout 7.5 s);"
    )
    never = refused(table, 5)
    assert never.code is Code.UNKNOWN_SEQUENCE
    assert str(never).startswith(
        "no sequence 5 is live: it has not started, has ended, or its START was refused;"
    )
    table.end(table.start("late"))  # it is started again and ended
    assert "it has not started, has ended" in str(refused(table, "late"))


def test_a_limited_number_of_reclaimed_ids_is_remembered(clock: Clock) -> None:
    table = SlotTable(1, 1.0, clock)
    for number in range(1, MAX_RECLAIMED_IDS + 2):
        table.start(number)
        clock.now += 1.0
        table.reclaim_idle()
    assert "has not started" in str(refused(table, 1))
    assert "was reclaimed" in str(refused(table, 2))
    assert "was reclaimed" in str(refused(table, MAX_RECLAIMED_IDS + 1))


def test_next_expiry_is_that_of_the_longest_idle(clock: Clock) -> None:
    table = SlotTable(3, 10.0, clock)
    assert table.next_expiry() == 10.0
    first = table.start(1)
    clock.now += 4.0
    table.start(2)
    assert table.next_expiry() == 6.0
    table.touch(first)
    clock.now += 1.0
    assert table.next_expiry() == 9.0  # of 2
    clock.now += 50.0
    assert table.next_expiry() == 0.0
    table.reclaim_idle()
    assert table.next_expiry() == 10.0


class AnyHistory(RuleBasedStateMachine):
    """Random operations on a table, compared with a list in order of the last response."""

    SLOTS, TIMEOUT = 3, 5

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = SlotTable(self.SLOTS, float(self.TIMEOUT), self.clock)
        self.live: list[SequenceState] = []  # the longest idle first
        self.since: dict[SequenceId, float] = {}
        self.fresh = count(1)

    def idle(self) -> list[SequenceState]:
        return [
            s for s in self.live if self.clock.now - self.since[s.id] >= self.TIMEOUT and not s.busy
        ]

    def forget(self, gone: list[SequenceState]) -> None:
        self.live = [sequence for sequence in self.live if sequence not in gone]

    @rule(seconds=st.integers(0, 4))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def start(self) -> None:
        number = next(self.fresh)
        if len(self.live) == self.SLOTS and not self.idle():
            assert refused(self.table, number, start=True).code is Code.NO_FREE_SLOT
            return
        if len(self.live) == self.SLOTS:
            self.forget(self.idle())
        sequence = self.table.start(number)
        assert sequence.slot not in {other.slot for other in self.live}
        assert (sequence.length, sequence.busy) == (0, False)
        self.live.append(sequence)
        self.since[number] = self.clock.now

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, SLOTS - 1))
    def answer(self, which: int) -> None:
        sequence = self.live.pop(which % len(self.live))
        sequence.busy = False
        self.table.touch(sequence)
        self.live.append(sequence)
        self.since[sequence.id] = self.clock.now

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, SLOTS - 1))
    def begin_a_step(self, which: int) -> None:
        self.live[which % len(self.live)].busy = True

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, SLOTS - 1))
    def end(self, which: int) -> None:
        sequence = self.live[which % len(self.live)]
        self.table.end(sequence)
        self.forget([sequence])
        assert refused(self.table, sequence.id).code is Code.UNKNOWN_SEQUENCE

    @rule()
    def reclaim(self) -> None:
        expected = self.idle()
        assert self.table.reclaim_idle() == expected
        self.forget(expected)
        for sequence in expected:
            assert "was reclaimed" in str(refused(self.table, sequence.id))

    @invariant()
    def every_slot_has_at_most_one_owner_and_none_is_lost(self) -> None:
        slots = [sequence.slot for sequence in self.live]
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(self.SLOTS))
        assert len(self.table) == len(self.live)
        assert self.table.num_free == self.SLOTS - len(self.live)
        for sequence in self.live:
            assert self.table.find(sequence.id) is sequence

    @invariant()
    def the_next_expiry_is_the_oldest_ones(self) -> None:
        oldest = min((self.since[sequence.id] for sequence in self.live), default=self.clock.now)
        assert self.table.next_expiry() == max(0.0, oldest + self.TIMEOUT - self.clock.now)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
