"""Which instance of a model gets a new sequence."""

import socket
from dataclasses import dataclass

import pytest
from inplace.runtime.slots import SlotTable
from inplace.server.balance import NEARLY, Balance, SlotReader


@dataclass(eq=False)
class Other:
    free_slots: int


def balance(slots: int, taken: int) -> tuple[Balance, SlotTable]:
    table = SlotTable(slots, idle_timeout=60.0)
    for number in range(taken):
        table.start(number + 1)
    return Balance(table), table


@pytest.mark.parametrize(
    ("taken", "others", "chosen"),
    [(0, [4], None), (1, [3], None), (1, [2, 4, 3], 1), (4, [0, 0], None), (4, [-1, 1], 1)],
)
def test_the_instance_with_most_free_slots_is_chosen_and_of_equals_this_one(
    taken: int, others: list[int], chosen: int | None
) -> None:
    targets = [Other(free) for free in others]
    found = balance(4, taken)[0].most_free(targets)
    assert found is (None if chosen is None else targets[chosen])


def test_a_few_slots_of_many_do_not_move_a_sequence() -> None:
    slots = 4 * NEARLY
    own, _ = balance(slots, 10)
    near, far = Other(slots - 10 + 4), Other(slots - 10 + 5)
    assert own.most_free([near]) is None
    assert own.most_free([near, far]) is far


def test_a_start_counts_from_when_it_is_sent_and_until_its_sequence_has_a_slot() -> None:
    own, table = balance(4, 0)
    other = Other(6)
    sent = []
    for start in range(6):
        target = own.most_free([other])
        own.send(start, target)
        sent.append(target)
    assert sent == [other, other, None, other, None, other]
    own.send(0, None)  # declined there, and sent here
    assert own.most_free([other]) is other
    table.start("one")
    own.publish()
    own.forget(0)
    for start in range(1, 6):
        own.forget(start)
    assert own.most_free([Other(3)]) is None
    assert own.most_free([Other(4)]) is not None


def test_another_instance_reads_what_this_one_has_free() -> None:
    here, there = socket.socketpair()
    with here, there:
        own, table = balance(4, 1)
        own.board.send(here)
        there.settimeout(5)
        reader = SlotReader(there)
        assert reader.read() == 3
        sequence = table.start("two")
        own.publish()
        own.send("start", None)
        assert reader.read() == 1
        table.end(sequence)
        own.forget("start")
        assert reader.read() == 3


def test_an_instance_that_closes_the_connection_has_no_memory_to_read() -> None:
    here, there = socket.socketpair()
    here.close()
    there.settimeout(5)
    with there, pytest.raises(ConnectionRefusedError, match="closed the connection"):
        SlotReader(there)
