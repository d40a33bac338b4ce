"""Snapshots of a model instance's sequences: captured between steps, stored by threads."""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Protocol, runtime_checkable

import torch

from inplace.engines.arena import Arena
from inplace.runtime.observer import Observer
from inplace.runtime.slots import EndReason, SequenceId, SequenceState
from inplace.schema.served import Manifest
from inplace.schema.snapshots import SnapshotOptions
from inplace.snapshots import (
    Lease,
    Restored,
    Snapshot,
    SnapshotError,
    SnapshotReason,
    SnapshotStore,
)

NUM_WRITERS = 4
"""Threads that write snapshots; those of one sequence are written in their order."""

MAX_CAPTURED = NUM_WRITERS
"""Sequences whose states are copied and not written yet. Where there are more, snapshots wait."""

FENCE_INTERVAL = 5.0
"""Seconds between two looks whether other servers have restored sequences that live here."""

SWEEP_INTERVAL = 60.0
"""Seconds between two looks for snapshots that have expired."""

_FORGETTING = frozenset({EndReason.END, EndReason.START})
"""Ends after which a sequence has no use for its snapshot. A client whose connection broke
(cancelled) may come back, and an engine that failed has not changed what was stored before."""

log = logging.getLogger("inplace")


@runtime_checkable
class HasContext(Protocol):
    """A driver's state that knows the last tokens of a text."""

    @property
    def context(self) -> list[int]:
        """The last tokens of the text."""


@dataclass(frozen=True)
class Captured:
    """A sequence as it was between two steps.

    Attributes:
        sequence: the sequence, which has gone on since.
        snapshot: its tensors may be on the device.
        ready: waits until they are copied.
    """

    sequence: SequenceState
    snapshot: Snapshot
    ready: Callable[[], object]

    def on_host(self) -> Snapshot:
        """The snapshot with its tensors on the host."""
        self.ready()
        states = {name: tensor.cpu() for name, tensor in self.snapshot.states.items()}
        return replace(self.snapshot, states=states)


class SnapshotKeeper:
    """Stores the sequences of one model instance that have a key, and reads them back.

    Captures are made on the thread that runs steps. Other threads write, read and delete, so no
    step waits for the store. It observes the slot table (`inplace.runtime.slots.SlotObserver`).

    Args:
        store: where sequences are stored.
        options: what the operator has set.
        arena: the states.
        manifest: describes the engine.
        observer: counts.
        used_length: how many positions of states that append a sequence uses; None if not known.

    Attributes:
        on_fenced: called with a sequence that another server has restored, on a thread of its own.
    """

    def __init__(
        self,
        store: SnapshotStore,
        options: SnapshotOptions,
        arena: Arena,
        manifest: Manifest,
        observer: Observer,
        used_length: Callable[[SequenceState], int | None],
    ) -> None:
        self._store, self._every = store, options.every
        self._arena, self._manifest, self._observer = arena, manifest, observer
        self._used_length = used_length
        self._writers = [ThreadPoolExecutor(1, "inplace-snapshots") for _ in range(NUM_WRITERS)]
        self._readers = ThreadPoolExecutor(NUM_WRITERS, "inplace-restore")
        self._room = threading.Semaphore(MAX_CAPTURED)
        self._live: dict[str, SequenceState] = {}
        self._fenced: list[SequenceState] = []
        self._wake, self._closing = threading.Event(), False
        self.on_fenced: Callable[[SequenceState], None] = _ignore
        self._thread = threading.Thread(target=self._watch, name="inplace-fence", daemon=True)
        self._thread.start()

    # The slot table

    def sequence_started(self, sequence: SequenceState) -> None:
        """A sequence was given a slot; one without a lease begins anew."""
        if sequence.key_digest is None:
            return
        if sequence.lease is None:
            name = self._store.name(sequence.id, sequence.key_digest)
            lease = sequence.lease = Lease(name)
            self._submit(name, self._store.begin, lease)
        self._live[sequence.lease.name] = sequence

    def sequence_ended(self, sequence: SequenceState, reason: EndReason) -> None:
        """A sequence gave its slot back."""
        lease = sequence.lease
        if lease is None:
            return
        if self._live.get(lease.name) is sequence:
            del self._live[lease.name]
        if reason in _FORGETTING:
            self._submit(lease.name, self._store.end, lease)

    def forget(self, sequence_id: SequenceId, key_digest: bytes | None) -> None:
        """The client has ended a sequence that is not live here: delete what is stored of it.

        Another server that has it will not store it any more.
        """
        if key_digest is not None:
            name = self._store.name(sequence_id, key_digest)
            self._submit(name, self._store.forget, name)

    # Writing

    def is_stored(self, sequence: SequenceState) -> bool:
        """Whether the sequence may be stored: it has a key."""
        return sequence.lease is not None

    def write_if_due(self, sequence: SequenceState, pending: int | None) -> None:
        """Store a sequence that has come far enough since the last time, unless threads are behind.

        On the thread that runs steps, between two of them.

        Args:
            sequence: a live sequence.
            pending: its last token, which no step has consumed; None without one.
        """
        lease, every = sequence.lease, self._every
        if lease is None or every is None:
            return
        position = sequence.length + (pending is not None)
        if position - lease.stored_at >= every and self._room.acquire(blocking=False):
            self._write(sequence, pending)

    def write(
        self, sequence: SequenceState, pending: int | None, *, wait: bool
    ) -> "Future[bool] | None":
        """Store a sequence; whether it was stored is known later.

        On the thread that runs steps, between two of them.

        Args:
            sequence: a live sequence that may be stored.
            pending: its last token, which no step has consumed; None without one.
            wait: wait until threads have room for it; else None is returned where they have none.
        """
        if not self._room.acquire(blocking=wait):
            return None
        return self._write(sequence, pending)

    def _write(self, sequence: SequenceState, pending: int | None) -> "Future[bool]":
        """Store a sequence for which there is room."""
        lease = sequence.lease
        assert lease is not None
        try:
            captured = self._capture(sequence, pending)
        except Exception as error:  # the device has no memory for the copy; the sequence lives on
            self._room.release()
            lease.stored_at = sequence.length + (pending is not None)  # not again at the next step
            self._failed(_without_memory(error), sequence)
            failed = Future[bool]()
            failed.set_result(False)
            return failed
        return self._writer(lease.name).submit(self._write_now, captured, lease)

    def _capture(self, sequence: SequenceState, pending: int | None) -> Captured:
        """Copy what is to be stored, on the device."""
        lease = sequence.lease
        assert lease is not None
        assert sequence.key_digest is not None
        length = sequence.length
        states = self._arena.save_used(sequence.slot, self._used_length(sequence))
        ready: Callable[[], object] = _ignore_nothing
        if self._arena.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
            ready = copied.synchronize
        state = sequence.driver_state
        context = state if isinstance(state, list) else ()
        if isinstance(state, HasContext):
            context = state.context
        snapshot = Snapshot(
            contract=self._store.contract,
            key_digest=sequence.key_digest,
            capacity=self._manifest.capacity,
            length=length,
            token_ids=sequence.token_ids[:length],
            num_prompt_tokens=sequence.num_prompt_tokens,
            pending_token=pending,
            group=sequence.group,
            salt=sequence.salt,
            positions=dict(sequence.positions),
            context=tuple(context),
            audio=sequence.audio,
            states=states,
        )
        lease.stored_at = snapshot.position
        return Captured(sequence, snapshot, ready)

    def _write_now(self, captured: Captured, lease: Lease) -> bool:
        begin = monotonic()
        try:
            size = self._store.write(lease, captured.on_host())
            self._observer.snapshot_written(size, monotonic() - begin)
        except SnapshotError as error:
            self._failed(error, captured.sequence)
            return False
        except Exception:  # a defect, or no memory: the sequence lives on without a snapshot
            log.exception("a sequence could not be stored")
            return False
        finally:
            self._room.release()
        return True

    # Reading

    def fetch(self, sequence_id: SequenceId, key_digest: bytes) -> "Future[Restored]":
        """Read a sequence and claim it; the result raises `SnapshotError`."""
        return self._readers.submit(self._fetch, sequence_id, key_digest)

    def _fetch(self, sequence_id: SequenceId, key_digest: bytes) -> Restored:
        begin, name = monotonic(), self._store.name(sequence_id, key_digest)
        try:
            snapshot, lease = self._store.claim(name, key_digest, self._check)
            if self._arena.device.type == "cuda":
                with torch.cuda.device(self._arena.device):
                    states = {
                        each: tensor.to(self._arena.device)
                        for each, tensor in snapshot.states.items()
                    }
                    torch.cuda.current_stream().synchronize()
                snapshot = replace(snapshot, states=states)
        except SnapshotError as error:
            self._failed(error, None)
            raise
        except Exception as error:  # no memory: the claim goes on from the snapshot, so ask again
            failed = _without_memory(error)
            self._failed(failed, None)
            raise failed from error
        self._observer.snapshot_restored(snapshot.num_bytes, monotonic() - begin)
        return Restored(snapshot, lease)

    def _check(self, snapshot: Snapshot) -> None:
        """Refuse a snapshot whose states do not fit into a slot.

        Raises:
            SnapshotError: FOREIGN.
        """
        capacity = self._manifest.capacity
        probe = SequenceState("", 0, length=snapshot.length, positions=dict(snapshot.positions))
        length = self._used_length(probe)
        expected = {spec.name: spec.used_shape(length) for spec in self._arena.specs}
        shapes = {name: tuple(tensor.shape) for name, tensor in snapshot.states.items()}
        if shapes != expected or (capacity is not None and snapshot.position > capacity):
            raise SnapshotError(
                SnapshotReason.FOREIGN,
                f"the snapshot has {snapshot.position} positions, of an engine with a capacity of"
                f" {snapshot.capacity}, and does not fit into a slot here, with {capacity}",
            )

    # Other servers

    def close(self) -> None:
        """Finish what is to be written and deleted, and stop the threads."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        for executor in (*self._writers, self._readers):
            executor.shutdown()

    def _watch(self) -> None:
        next_fence = monotonic() + FENCE_INTERVAL
        next_sweep = monotonic() + SWEEP_INTERVAL
        while not self._closing:
            self._wake.wait(max(0.0, min(next_fence, next_sweep) - monotonic()))
            self._wake.clear()
            try:
                if monotonic() >= next_fence:
                    next_fence = monotonic() + FENCE_INTERVAL
                    self._find_fenced()
                if monotonic() >= next_sweep:
                    next_sweep = monotonic() + SWEEP_INTERVAL
                    self._store.sweep()
            except SnapshotError as error:
                self._failed(error, None)
            except Exception:  # a defect
                log.exception("the store of the snapshots was not looked through")
            while self._fenced and not self._closing:
                self.on_fenced(self._fenced.pop())

    def _find_fenced(self) -> None:
        live = [each for each in self._live.copy().values() if each.lease is not None]
        leases = [each.lease for each in live if each.lease is not None and each.lease.begun]
        if not leases:
            return
        names = {lease.name for lease in self._store.fenced(leases)}
        self._fenced += [
            each for each in live if each.lease is not None and each.lease.name in names
        ]

    def _failed(self, error: SnapshotError, sequence: SequenceState | None) -> None:
        self._observer.snapshot_failed(error)
        if error.reason is SnapshotReason.FENCED and sequence is not None:
            self._fenced.append(sequence)
            self._wake.set()

    def _writer(self, name: str) -> ThreadPoolExecutor:
        return self._writers[int(name[:8], 16) % NUM_WRITERS]

    def _submit(self, name: str, function: Callable[..., object], *arguments: Any) -> None:
        """Do something with a sequence in the store, after what is to be done with it before."""

        def run() -> None:
            try:
                function(*arguments)
            except SnapshotError as error:
                self._failed(error, None)
            except Exception:  # a defect
                log.exception("the store of the snapshots failed")

        with contextlib.suppress(RuntimeError):  # it is closed
            self._writer(name).submit(run)


def _without_memory(error: Exception) -> SnapshotError:
    reason = str(error).partition("\n")[0]
    return SnapshotError(
        SnapshotReason.UNAVAILABLE, f"states were not copied ({type(error).__name__}: {reason})"
    )


def _ignore(sequence: SequenceState) -> None:
    """Without a driver, nothing follows."""


def _ignore_nothing() -> None:
    """Nothing is to be waited for."""
