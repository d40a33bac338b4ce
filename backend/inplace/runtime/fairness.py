"""Whose request is next: groups of requests take turns.

A generate proxy uses it too, which needs no PyTorch.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from itertools import chain
from typing import Generic, Protocol, TypeVar

from inplace.parameters import BY_NAME, Parameter, digest
from inplace.protocol import GROUP, SEQUENCE_KEY


def fairness_group(sequence_id: int | str, parameters: Mapping[str, Parameter]) -> bytes:
    """What a request shares its place in the queue for slots with.

    The digest of the parameter ``group``, else of its ``sequence_key``, else of its sequence.

    Raises:
        RequestError: BAD_PARAMETER, a parameter is not a name of a group or no key.
    """
    for name in (GROUP, SEQUENCE_KEY):
        if name in parameters:
            return digest(f"{name} {BY_NAME[name].parse(parameters[name])}")
    return digest(f"id {sequence_id!r}")


class Grouped(Protocol):
    """A request that waits."""

    @property
    def group(self) -> bytes:
        """The group that it belongs to; see `fairness_group`."""


Waiting = TypeVar("Waiting", bound=Grouped)


class WaitingQueue(Generic[Waiting]):
    """Requests in the order in which they get slots: round-robin over groups.

    Within a group the first to come is the first to get a slot. A group that fills the queue
    neither delays nor excludes others: its newest request makes room for a group that has fewer.

    Args:
        max_waiting: requests that may wait; None for no limit.

    Attributes:
        size: the number of requests.
    """

    def __init__(self, max_waiting: int | None = None) -> None:
        self._max_waiting = max_waiting
        self._groups: OrderedDict[bytes, deque[Waiting]] = OrderedDict()  # next group first
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def __contains__(self, request: Waiting) -> bool:
        return request in self._groups.get(request.group, ())

    def append(self, request: Waiting) -> Waiting | None:
        """Add a request.

        Returns:
            None, or the request that has no place: this one, or another one, which was removed.
        """
        rejected = None
        if self._max_waiting is not None and self.size >= self._max_waiting:
            rejected = self.find_rejected(request)
            if rejected is request:
                return request
            self.remove(rejected)
        self._groups.setdefault(request.group, deque()).append(request)
        self.size += 1
        return rejected

    def find_rejected(self, request: Waiting) -> Waiting:
        """Which has no place if one request must go, for a request that is not in the queue.

        It is the newest request of the largest group, if that still has as many as the group of
        this one then; else this one.
        """
        size = len(self._groups.get(request.group, ()))
        largest = max(self._groups.values(), key=len, default=None)
        return request if largest is None or len(largest) <= size + 1 else largest[-1]

    def popleft(self) -> Waiting:
        """Remove the request that is next, and return it."""
        name, group = next(iter(self._groups.items()))
        request = group.popleft()
        self.size -= 1
        if group:
            self._groups.move_to_end(name)
        else:
            del self._groups[name]
        return request

    def remove(self, request: Waiting) -> None:
        """Remove a request that is in the queue."""
        name = request.group
        self._groups[name].remove(request)
        self.size -= 1
        if not self._groups[name]:
            del self._groups[name]

    def clear(self) -> list[Waiting]:
        """Remove all requests and return them."""
        requests = list(chain.from_iterable(self._groups.values()))
        self._groups.clear()
        self.size = 0
        return requests


class Startable(Grouped, Protocol):
    """A request that waits until it may start.

    Attributes:
        proceed: set when it may start, or has been stopped.
    """

    proceed: threading.Event


Starting = TypeVar("Starting", bound=Startable)


class StartQueue(Generic[Starting]):
    """Which requests may send their START: so many at a time, of waiting ones each group in turn.

    Thread-safe.

    Args:
        limit: STARTs without a response at the same time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: WaitingQueue[Starting] = WaitingQueue()
        self._starting: set[Starting] = set()

    def add(self, request: Starting) -> None:
        """Let a request wait; its ``proceed`` is set when it may start."""
        with self._lock:
            self._waiting.append(request)
            self._admit()

    def remove(self, request: Starting) -> None:
        """A request has a response to its START, or has been stopped."""
        with self._lock:
            self._starting.discard(request)
            if request in self._waiting:
                self._waiting.remove(request)
            self._admit()

    def replaced_by(self, request: Starting) -> Starting | None:
        """The request that waits and must make room for this one; None if this one has no place."""
        with self._lock:
            rejected = self._waiting.find_rejected(request)
            if rejected is request:
                return None
            self._waiting.remove(rejected)
            return rejected

    def _admit(self) -> None:
        while self._waiting and len(self._starting) < self._limit:
            request = self._waiting.popleft()
            self._starting.add(request)
            request.proceed.set()
