"""The queue of requests that wait for a slot: groups take turns, and share a full queue."""

from inplace.drivers.queues import StreamRequest, WaitingQueue
from inplace.drivers.reply import Reply
from inplace.runtime.requests import Request, ValidatedRequest
from support.streaming import RecordingChannel


def waiting(name: str, **parameters: str) -> StreamRequest:
    request = Request(name, True, False, {}, parameters=parameters)
    return StreamRequest(ValidatedRequest(request), Reply(RecordingChannel()))


def order(queue: WaitingQueue) -> list[object]:
    return [queue.popleft().sequence_id for _ in range(len(queue))]


def test_groups_take_turns_and_keep_their_own_order() -> None:
    queue = WaitingQueue(10)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        assert queue.append(waiting(name, group=name[0])) is None
    assert order(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_the_group_is_the_parameter_else_the_key_else_the_sequence() -> None:
    queue = WaitingQueue(10)
    queue.append(waiting("a1", sequence_key="k", group="g"))
    queue.append(waiting("a2", group="g"))
    queue.append(waiting("b1", sequence_key="k"))
    queue.append(waiting("b2", sequence_key="k"))
    queue.append(waiting("c"))
    queue.append(waiting("k"))  # the id is another thing than the key
    assert order(queue) == ["a1", "b1", "c", "k", "a2", "b2"]


def test_a_full_queue_rejects_the_newest_of_the_largest_group() -> None:
    queue = WaitingQueue(4)
    greedy = [waiting(f"a{index}", group="a") for index in range(5)]
    assert [queue.append(request) for request in greedy] == [None] * 4 + [greedy[4]]
    modest = [waiting(f"b{index}", group="b") for index in range(3)]
    assert queue.append(modest[0]) is greedy[3]
    assert queue.append(modest[1]) is greedy[2]
    assert queue.append(modest[2]) is modest[2]  # as many as the other group has
    assert len(queue) == 4
    assert order(queue) == ["a0", "b0", "a1", "b1"]


def test_requests_are_removed_wherever_they_are() -> None:
    queue = WaitingQueue(4)
    requests = [waiting(name, group=name[0]) for name in ("a1", "b1", "a2")]
    for request in requests:
        queue.append(request)
    queue.remove(requests[0])
    assert requests[0] not in queue
    assert requests[2] in queue
    assert order(queue) == ["a2", "b1"]
    assert not queue


def test_without_places_every_request_is_rejected() -> None:
    queue, request = WaitingQueue(0), waiting("a")
    assert queue.append(request) is request
    assert not queue
