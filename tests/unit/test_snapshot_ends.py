"""Ends of sequences that several replicas have, or had: no snapshot is left.

Every order of the operations of two replicas on the store is run, and the death of one before each
of its operations.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from inplace.snapshots import Bucket, Lease, Snapshot, SnapshotError, SnapshotReason, SnapshotStore
from inplace.snapshots.buckets import Entry, Part
from inplace.snapshots.store import MARK_SECONDS
from support.long import long_except

SECRET, KEY, SECONDS = b"s" * 32, b"k" * 32, 1000.0


class Clock:
    """Seconds since 1970 that a test sets."""

    seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Objects:
    """A bucket in memory, with the clock of the test."""

    clock: Clock
    held: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    @property
    def snapshots(self) -> list[str]:
        """All but marks that a sequence has ended."""
        return [name for name in self.held if not name.endswith(".ended")]

    def read(self, name: str) -> bytes:
        if name not in self.held:
            raise FileNotFoundError(name)
        return self.held[name][0]

    def write(self, name: str, parts: Iterable[Part]) -> None:
        self.held[name] = b"".join(parts), self.clock()

    def create(self, name: str, parts: Iterable[Part]) -> bool:
        if name in self.held:
            return False
        self.write(name, parts)
        return True

    def delete(self, name: str) -> None:
        self.held.pop(name, None)

    def list(self, prefix: str = "") -> list[Entry]:
        return [
            Entry(name, len(content), modified)
            for name, (content, modified) in self.held.items()
            if name.startswith(prefix)
        ]


class DiedError(BaseException):
    """A replica was killed."""


class Replica:
    """A replica whose operations on the store wait until they are allowed, one after the other.

    Args:
        objects: the store.
        act: what it does, with a store of its own.
        dies_before: the number of the operation before which it is killed; None if it is not.
    """

    def __init__(
        self,
        objects: Objects,
        act: Callable[[SnapshotStore], object],
        dies_before: int | None = None,
    ) -> None:
        self._objects, self._act, self._dies_before = objects, act, dies_before
        self._may_run, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.count, self.done, self.error = 0, False, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._waits.acquire()

    error: BaseException | None

    def __getattr__(self, name: str) -> Callable[..., object]:
        operation = getattr(self._objects, name)

        def run(*arguments: object) -> object:
            self._waits.release()
            self._may_run.acquire()
            if self.count == self._dies_before:
                raise DiedError
            self.count += 1
            return operation(*arguments)

        return run

    def advance(self) -> None:
        """Run its next operation, up to the one behind it."""
        self._may_run.release()
        self._waits.acquire()

    def _run(self) -> None:
        try:
            self._act(store(self, self._objects.clock))  # type: ignore[arg-type]
        except (SnapshotError, DiedError) as error:
            self.error = error
        self.done = True
        self._waits.release()


def store(bucket: Bucket, clock: Clock) -> SnapshotStore:
    return SnapshotStore(bucket, SECRET, "m", "c", slot_bytes=1 << 10, seconds=SECONDS, clock=clock)


def snapshot(length: int) -> Snapshot:
    return Snapshot("c", KEY, 16, length, states={"keys": torch.zeros(length)})


Act = Callable[[SnapshotStore], object]
Scene = Callable[[SnapshotStore], tuple[Act, Act]]
"""What has happened before, and then what two replicas do at the same time."""


def never_stored(before: SnapshotStore) -> tuple[Act, Act]:
    """A server that stops stores a sequence which its client ends elsewhere."""
    lease = Lease(before.name("a", KEY))
    before.begin(lease)
    return lambda mine: mine.write(lease, snapshot(3)), lambda mine: mine.forget(lease.name)


def stored_before(before: SnapshotStore) -> tuple[Act, Act]:
    lease = Lease(before.name("a", KEY))
    before.begin(lease)
    before.write(lease, snapshot(2))
    return lambda mine: mine.write(lease, snapshot(3)), lambda mine: mine.forget(lease.name)


def restored_elsewhere(before: SnapshotStore) -> tuple[Act, Act]:
    """The last holder writes late, while the sequence is restored elsewhere, goes on and ends."""
    lease = Lease(before.name("a", KEY))
    before.write(lease, snapshot(2))

    def take_over(mine: SnapshotStore) -> None:
        _, taken = mine.claim(lease.name, KEY)
        mine.write(taken, snapshot(5))
        mine.end(taken)

    return lambda mine: mine.write(lease, snapshot(3)), take_over


def ended_while_restored(before: SnapshotStore) -> tuple[Act, Act]:
    """The client gives up waiting for a restore, and ends the sequence by another server."""
    lease = Lease(before.name("a", KEY))
    before.write(lease, snapshot(2))

    def take_over(mine: SnapshotStore) -> None:
        _, taken = mine.claim(lease.name, KEY)
        mine.write(taken, snapshot(5))

    return take_over, lambda mine: mine.forget(lease.name)


def ended_where_it_was(before: SnapshotStore) -> tuple[Act, Act]:
    """The END comes to the holder that does not know yet that the sequence was restored."""
    lease = Lease(before.name("a", KEY))
    before.write(lease, snapshot(2))
    _, taken = before.claim(lease.name, KEY)
    return lambda mine: mine.write(taken, snapshot(3)), lambda mine: mine.end(lease)


def begun_elsewhere(before: SnapshotStore) -> tuple[Act, Act]:
    """The last holder writes late, while the sequence begins anew elsewhere, and ends."""
    lease = Lease(before.name("a", KEY))
    before.write(lease, snapshot(2))

    def begin_anew(mine: SnapshotStore) -> None:
        begun = Lease(lease.name)
        mine.begin(begun)
        mine.end(begun)

    return lambda mine: mine.write(lease, snapshot(3)), begin_anew


SCENES: list[Scene] = [
    never_stored,
    stored_before,
    restored_elsewhere,
    begun_elsewhere,
    ended_while_restored,
    ended_where_it_was,
]


def orders(scene: Scene, dies_before: int | None = None) -> Iterator[tuple[Objects, list[Replica]]]:
    """Both replicas' acts, in every order of their operations on the store.

    Args:
        scene: what happens.
        dies_before: the operation before which the first one is killed.
    """
    pending: list[list[int]] = [[]]
    while pending:
        begin = pending.pop()
        objects = Objects(Clock())
        acts = scene(store(objects, objects.clock))
        replicas = [Replica(objects, acts[0], dies_before), Replica(objects, acts[1])]
        order: list[int] = []
        while running := [number for number in (0, 1) if not replicas[number].done]:
            if len(order) < len(begin):
                number = begin[len(order)]
            else:
                number = running[0]
                pending += [[*order, other] for other in running[1:]]
            order.append(number)
            replicas[number].advance()
        yield objects, replicas


@pytest.mark.parametrize("scene", SCENES)
def test_nothing_is_left_in_any_order(scene: Scene) -> None:
    count, refused = 0, set[SnapshotReason]()
    for objects, replicas in orders(scene):
        assert objects.snapshots == [], objects.held
        refused |= {each.error.reason for each in replicas if isinstance(each.error, SnapshotError)}
        objects.clock.seconds += MARK_SECONDS
        store(objects, objects.clock).sweep()
        assert objects.held == {}
        count += 1
    assert count > 30
    assert SnapshotReason.FENCED in refused  # who came late
    assert refused <= {SnapshotReason.FENCED, SnapshotReason.MISSING, SnapshotReason.CLAIMED}


@pytest.mark.parametrize("scene", long_except([never_stored, stored_before], SCENES))
def test_what_a_killed_replica_writes_goes_with_the_mark(scene: Scene) -> None:
    left = 0
    for dies_before in range(20):
        died = False
        for objects, replicas in orders(scene, dies_before):
            died |= isinstance(replicas[0].error, DiedError)
            left += bool(objects.snapshots)
            objects.clock.seconds += MARK_SECONDS - 1
            other = store(objects, objects.clock)
            other.sweep()
            objects.clock.seconds += 1
            other.sweep()
            assert objects.held == {}, dies_before
        if not died:
            assert dies_before > 3
            assert left > 0
            return
    raise AssertionError("it has more operations than were tried")


def test_what_a_server_did_not_delete_before_it_was_killed_stays_until_its_time_is_over() -> None:
    """It had answered END, and had not left the mark: only the client knows of that END."""
    for dies_before in range(4):  # a listing, the mark, a listing, the deletion
        objects = Objects(Clock())
        before = store(objects, objects.clock)
        name = before.name("a", KEY)
        before.write(Lease(name), snapshot(2))

        def end(mine: SnapshotStore, name: str = name) -> None:
            mine.forget(name)

        ended = Replica(objects, end, dies_before)
        while not ended.done:
            ended.advance()
        assert isinstance(ended.error, DiedError)
        assert objects.snapshots == [f"{name}.1"]
        objects.clock.seconds += MARK_SECONDS
        before.sweep()
        assert objects.snapshots == ([f"{name}.1"] if dies_before < 2 else [])
        objects.clock.seconds += SECONDS - MARK_SECONDS
        before.sweep()
        assert objects.held == {}


def test_a_sequence_that_begins_anew_is_not_that_which_has_ended() -> None:
    objects = Objects(Clock())
    before = store(objects, objects.clock)
    name = before.name("a", KEY)
    before.forget(name)
    begun, unknown = Lease(name), Lease(name)
    assert before.fenced([unknown]) == []  # its START was not looked up yet
    before.begin(begun)
    assert begun.epoch == 1001
    before.write(begun, snapshot(4))
    assert before.fenced([begun]) == []
    objects.clock.seconds += MARK_SECONDS
    assert before.sweep() == 1
    assert before.claim(name, KEY)[0].length == 4
    silent = Lease(before.name("b", KEY))
    before.begin(silent)
    before.forget(silent.name)
    assert before.fenced([silent]) == [silent]  # though it was never stored
