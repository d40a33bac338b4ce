"""The queue of requests that wait for a slot, fair between groups of requests."""

from collections import OrderedDict, deque
from itertools import chain

from inplace.drivers.sequence_queues import StreamRequest


class WaitingQueue:
    """Requests in the order in which they get slots: round-robin over groups.

    Within a group the first to come is the first to get a slot. `Request.fairness_group` says which
    group a request belongs to. A group that fills the queue neither delays nor excludes others: its
    newest request makes room for a group that has fewer.

    Args:
        max_waiting: requests that may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._groups: OrderedDict[bytes, deque[StreamRequest]] = OrderedDict()  # next group first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, request: StreamRequest) -> bool:
        return any(request in group for group in self._groups.copy().values())

    def append(self, request: StreamRequest) -> StreamRequest | None:
        """Add a request.

        Returns:
            None, or the request that has no place: this one, or the newest of the largest group,
            which was removed.
        """
        name = request.request.fairness_group()
        size = len(self._groups.get(name, ()))
        rejected = None
        if self._length >= self._max_waiting:
            largest = max(self._groups.values(), key=len, default=None)
            if largest is None or len(largest) <= size + 1:
                return request
            rejected = largest[-1]
            self.remove(rejected)
        self._groups.setdefault(name, deque()).append(request)
        self._length += 1
        return rejected

    def popleft(self) -> StreamRequest:
        """Remove the request that is next, and return it."""
        name, group = next(iter(self._groups.items()))
        request = group.popleft()
        self._length -= 1
        if group:
            self._groups.move_to_end(name)
        else:
            del self._groups[name]
        return request

    def remove(self, request: StreamRequest) -> None:
        """Remove a request that is in the queue."""
        name = request.request.fairness_group()
        self._groups[name].remove(request)
        self._length -= 1
        if not self._groups[name]:
            del self._groups[name]

    def clear(self) -> list[StreamRequest]:
        """Remove all requests and return them."""
        requests = list(chain.from_iterable(self._groups.values()))
        self._groups.clear()
        self._length = 0
        return requests
