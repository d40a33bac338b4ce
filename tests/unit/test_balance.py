"""Which instance of a model gets a new sequence."""

import socket
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from inplace.runtime.slots import SlotTable
from inplace.schema.prefixes import BLOCK_TOKENS, prefix_blocks
from inplace.server.balance import MUCH_FULLER, NEARLY, Balance, SlotReader


@dataclass(eq=False)
class Other:
    free_slots: int
    known: int = 0

    def known_blocks(self, blocks: Sequence[bytes]) -> int:
        return min(self.known, len(blocks))


def balance(slots: int, taken: int, part: int = NEARLY) -> tuple[Balance, SlotTable]:
    table = SlotTable(slots, idle_timeout=60.0)
    for number in range(taken):
        table.start(number + 1)
    return Balance(table, part), table


@pytest.mark.parametrize(
    ("taken", "others", "chosen"),
    [(0, [4], None), (1, [3], None), (1, [2, 4, 3], 1), (4, [0, 0], None), (4, [-1, 1], 1)],
)
def test_the_instance_with_most_free_slots_is_chosen_and_of_equals_this_one(
    taken: int, others: list[int], chosen: int | None
) -> None:
    targets = [Other(free) for free in others]
    found = balance(4, taken)[0].choose(targets)
    assert found is (None if chosen is None else targets[chosen])


@pytest.mark.parametrize("part", [NEARLY, MUCH_FULLER])
def test_a_few_slots_of_many_do_not_move_a_sequence(part: int) -> None:
    slots = 4 * part
    own, _ = balance(slots, 10, part)
    near, far = Other(slots - 10 + 4), Other(slots - 10 + 5)
    assert own.choose([near]) is None
    assert own.choose([near, far]) is far


def test_a_start_counts_from_when_it_is_sent_and_until_its_sequence_has_a_slot() -> None:
    own, table = balance(4, 0)
    other = Other(6)
    sent = []
    for start in range(6):
        target = own.choose([other])
        own.send(start, target)
        sent.append(target)
    assert sent == [other, other, None, other, None, other]
    own.send(0, None)  # declined there, and sent here
    assert own.choose([other]) is other
    table.start("one")
    own.publish()
    own.forget(0)
    for start in range(1, 6):
        own.forget(start)
    assert own.choose([Other(3)]) is None
    assert own.choose([Other(4)]) is not None


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


def test_the_instance_that_has_the_beginning_of_a_prompt_is_chosen() -> None:
    own, _ = balance(8, 2)
    blocks = list(prefix_blocks(b"salt", range(3 * BLOCK_TOKENS + 5)))
    assert len(blocks) == 3
    short, long = Other(8, known=1), Other(8 - 8 // MUCH_FULLER, known=2)
    assert own.choose([short, long], blocks) is long
    assert own.choose([short, long]) is short
    long.free_slots -= 1  # much fuller than the one with most free slots
    assert own.choose([short, long], blocks) is short
    own.board.add(b"salt", range(2 * BLOCK_TOKENS))
    assert own.choose([short, long], blocks) is None  # as long, and here
    near = Other(8)
    assert own.choose([near, Other(7)], list(prefix_blocks(b"other", range(99)))) is near


def test_blocks_are_those_of_the_salt_and_of_all_tokens_before() -> None:
    here, there = socket.socketpair()
    with here, there:
        own, _ = balance(4, 0)
        own.board.send(here)
        there.settimeout(5)
        reader = SlotReader(there)
        tokens = list(range(100, 100 + 4 * BLOCK_TOKENS))
        own.board.add(b"salt", array("i", tokens))
        for memory in (own.board, reader):
            assert memory.known_blocks(list(prefix_blocks(b"salt", tokens))) == 4
            assert memory.known_blocks(list(prefix_blocks(b"pepper", tokens))) == 0
            tokens[2 * BLOCK_TOKENS] += 1
            assert memory.known_blocks(list(prefix_blocks(b"salt", tokens))) == 2
            tokens[2 * BLOCK_TOKENS] -= 1
