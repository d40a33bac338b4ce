"""Queues of requests that wait: groups take turns, and share a full queue."""

import threading
from dataclasses import dataclass, field

from inplace.drivers.queues import StreamRequest
from inplace.drivers.reply import Reply
from inplace.runtime.fairness import StartQueue, WaitingQueue
from inplace.runtime.requests import Request, ValidatedRequest
from support.streaming import RecordingChannel


def waiting(name: str, **parameters: str) -> StreamRequest:
    request = Request(name, True, False, {}, parameters=parameters)
    return StreamRequest(ValidatedRequest(request), Reply(RecordingChannel()))


def order(queue: WaitingQueue[StreamRequest]) -> list[object]:
    return [queue.popleft().sequence_id for _ in range(len(queue))]


def test_groups_take_turns_and_keep_their_own_order() -> None:
    queue: WaitingQueue[StreamRequest] = WaitingQueue(10)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert queue.append(waiting(name, group=name[0])) is None
    assert order(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_the_group_is_the_parameter_else_the_key_else_the_sequence() -> None:
    queue: WaitingQueue[StreamRequest] = WaitingQueue(10)
    queue.append(waiting("a1", sequence_key="k", group="g"))
    queue.append(waiting("a2", group="g"))
    queue.append(waiting("b1", sequence_key="k"))
    queue.append(waiting("b2", sequence_key="k"))
    queue.append(waiting("c"))
    queue.append(waiting("k"))  # the id is another thing than the key
    assert order(queue) == ["a1", "b1", "c", "k", "a2", "b2"]


def test_a_full_queue_rejects_the_newest_of_the_largest_group() -> None:
    queue: WaitingQueue[StreamRequest] = WaitingQueue(4)
    greedy = [waiting(f"a{index}", group="a") for index in range(5)]
    assert [queue.append(request) for request in greedy] == [None] * 4 + [greedy[4]]
    modest = [waiting(f"b{index}", group="b") for index in range(3)]
    assert queue.append(modest[0]) is greedy[3]
    assert queue.append(modest[1]) is greedy[2]
    assert queue.append(modest[2]) is modest[2]  # as many as the other group has
    assert len(queue) == 4
    assert order(queue) == ["a0", "b0", "a1", "b1"]


def test_requests_are_removed_wherever_they_are() -> None:
    queue: WaitingQueue[StreamRequest] = WaitingQueue(4)
    requests = [waiting(name, group=name[0]) for name in ("a1", "b1", "a2")]
    for request in requests:
        queue.append(request)
    queue.remove(requests[0])
    assert requests[0] not in queue
    assert requests[2] in queue
    assert order(queue) == ["a2", "b1"]
    assert not queue


def test_without_places_every_request_is_rejected() -> None:
    queue: WaitingQueue[StreamRequest] = WaitingQueue(0)
    request = waiting("a")
    assert queue.append(request) is request
    assert not queue


@dataclass(eq=False)
class Start:
    name: str
    proceed: threading.Event = field(default_factory=threading.Event)

    @property
    def group(self) -> bytes:
        return self.name[0].encode()


def test_starts_are_limited_and_groups_take_turns() -> None:
    starts = [Start(name) for name in ("a1", "a2", "a3", "a4", "b1")]
    queue: StartQueue[Start] = StartQueue(2)
    for start in starts:
        queue.add(start)

    def started() -> list[str]:
        return [start.name for start in starts if start.proceed.is_set()]

    assert started() == ["a1", "a2"]
    queue.remove(starts[0])
    assert started() == ["a1", "a2", "a3"]  # of the group that came first
    queue.remove(starts[1])
    assert started() == ["a1", "a2", "a3", "b1"]


def test_a_start_that_is_stopped_while_it_waits_leaves_its_place_to_the_next() -> None:
    starts = [Start(name) for name in ("a1", "a2", "a3")]
    queue: StartQueue[Start] = StartQueue(1)
    for start in starts:
        queue.add(start)
    queue.remove(starts[1])
    assert not starts[2].proceed.is_set()
    queue.remove(starts[0])
    assert starts[2].proceed.is_set()
    assert not starts[1].proceed.is_set()


def test_a_start_makes_room_for_one_of_a_group_that_has_fewer() -> None:
    starts = [Start(name) for name in ("a1", "a2", "a3", "a4")]
    queue: StartQueue[Start] = StartQueue(1)
    for start in starts:
        queue.add(start)
    assert queue.replaced_by(Start("a5")) is None
    assert queue.replaced_by(Start("b1")) is starts[3]
    assert queue.replaced_by(Start("b1")) is starts[2]
    assert queue.replaced_by(Start("b1")) is None  # it would have as many as the other group
