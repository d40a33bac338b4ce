"""The store of one model's sequences: names, epochs, time to live and quota."""

import hmac
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from inplace.parameters import MAX_SEQUENCE_ID_BYTES
from inplace.snapshots.buckets import PARTIAL, Bucket, Entry
from inplace.snapshots.content import OVERHEAD, EpochRecord, Snapshot, decode, encode
from inplace.snapshots.errors import SnapshotError, SnapshotReason

log = logging.getLogger("inplace")

_OBJECT = re.compile(r"(?P<name>[0-9a-f]{64})\.(?P<epoch>[0-9]{1,18})")
_UNFINISHED = re.compile(rf"{_OBJECT.pattern}(\.ended)?\.[0-9a-f]+{re.escape(PARTIAL)}")
_MARK = re.compile(rf"{_OBJECT.pattern}\.ended")

OBJECT_BYTES = 1024
"""About what an object has beside tensors and tokens."""

USAGE_SECONDS = 5.0
"""For how long the sum of the sizes of all objects is taken for true."""


MARK_SECONDS = 60.0
"""How long a mark that a sequence has ended stays: longer than a replica takes to write a snapshot,
and many times longer than between two looks for such marks."""

MARK_ABOVE = 1000
"""How far above all epochs a mark is: above those that are being claimed at the same moment."""


@dataclass(slots=True)
class Lease:
    """What a replica has of a sequence in the store.

    Attributes:
        name: of the sequence.
        epoch: that the replica has; None before it has written anything.
        stored_at: the position at which it was captured last, or restored; 0 before.
        expires: of the last object that it has written, in seconds since 1970.
        begun: the store was looked through when the sequence began, or it was restored.
        moved: another replica may have it too, or have had it.
    """

    name: str
    epoch: int | None = None
    stored_at: int = 0
    expires: float = 0.0
    begun: bool = False
    moved: bool = False


@dataclass(frozen=True)
class Restored:
    """A sequence that was read from the store, and claimed.

    Attributes:
        snapshot: the sequence.
        lease: what this server has of it now.
    """

    snapshot: Snapshot
    lease: Lease


def model_folder(secret: bytes, model: str) -> str:
    """The name of the folder of a model's sequences in a store that several models have.

    Their times to live and quotas may differ, and looking through one finds nothing of the others.
    """
    digest = hmac.digest(secret, b"inplace snapshots folder " + model.encode(), "sha256")
    return digest.hex()[:32]


class SnapshotStore:
    """Snapshots of the sequences of one model. Thread-safe.

    Each sequence has a name, and each replica that has it an *epoch*. The object of an epoch is
    created on the condition that it does not exist, as a claim, so of several replicas one gets it;
    the snapshot replaces the claim. A replica that finds an epoch above its own is fenced.

    Where a sequence ends that another replica may have too, a *mark* is left for `MARK_SECONDS`: an
    empty object of an epoch above all others. It fences every replica below it, and when it is
    removed, what was written below it meanwhile goes too.

    Args:
        bucket: where the objects lie, and nothing of other models.
        secret: that all servers of the store share.
        model: the model's name.
        contract: of its engine (`inplace.snapshots.contract.state_contract`).
        slot_bytes: of a sequence's states at most; a larger object is not read.
        seconds: time to live of an object.
        quota_bytes: that all objects together may have; None for no limit.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        bucket: Bucket,
        secret: bytes,
        model: str,
        contract: str,
        *,
        slot_bytes: int,
        seconds: float = 3600.0,
        quota_bytes: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bucket, self._model, self.contract = bucket, model, contract
        self._name_key, self._mac_key, self.salt_key = (
            hmac.digest(secret, b"inplace snapshots " + purpose, "sha256")
            for purpose in (b"name", b"mac", b"salt")
        )
        self._max_bytes = 2 * slot_bytes + OVERHEAD
        self._seconds, self._quota, self._clock = seconds, quota_bytes, clock
        self._usage, self._usage_until = 0, 0.0
        self._lock = threading.Lock()

    def name(self, sequence_id: int | str, key_digest: bytes) -> str:
        """The name of a sequence in the store: an HMAC, from which nobody learns id or key.

        Args:
            sequence_id: the correlation id; a number and its digits are different ones.
            key_digest: digest of its key.
        """
        if isinstance(sequence_id, str):
            identity = b"s" + sequence_id.encode(errors="surrogatepass")
        else:
            identity = b"i" + str(sequence_id).encode()
        assert len(identity) <= MAX_SEQUENCE_ID_BYTES + 1
        model = self._model.encode()
        parts = b"".join(len(each).to_bytes(4, "big") + each for each in (model, identity))
        return hmac.digest(self._name_key, parts + key_digest, "sha256").hex()

    # Of the replica that has a sequence

    def begin(self, lease: Lease) -> None:
        """A sequence begins anew: what the store has of an earlier one is not restored any more.

        Raises:
            SnapshotError: UNAVAILABLE.
        """
        with _store_errors():
            objects = self._find(lease.name)
            if objects.highest or objects.ended:
                self._claim(lease, objects)
                lease.moved = True
            lease.begun = True

    def write(self, lease: Lease, snapshot: Snapshot) -> int:
        """Store a sequence in the place of its last snapshot; returns the bytes.

        Raises:
            SnapshotError: FENCED, QUOTA or UNAVAILABLE.
        """
        with _store_errors():
            objects = self._find(lease.name)
            self._check_fence(lease, objects)
            replaced = sum(entry.size for entry in objects.epochs.values())
            expected = snapshot.num_bytes + OBJECT_BYTES - replaced
            self._check_quota(expected)
            if lease.epoch is None:
                lease.moved = lease.moved or bool(objects.highest or objects.ended)
                self._claim(lease, objects)
            assert lease.epoch is not None
            expires = self._clock() + self._seconds
            parts = list(
                encode(EpochRecord(lease.name, lease.epoch, expires, snapshot), self._mac_key)
            )
            size = sum(map(len, parts))
            self._bucket.write(_object(lease.name, lease.epoch), parts)
            lease.expires = expires
            objects = self._find(lease.name)
            self._check_fence(lease, objects)
            self._delete(objects, up_to=lease.epoch - 1)
            return size

    def end(self, lease: Lease) -> None:
        """The client has ended the sequence: delete all that the store has of it.

        Raises:
            SnapshotError: UNAVAILABLE.
        """
        with _store_errors():
            objects = self._find(lease.name)
            if lease.moved or objects.highest > (lease.epoch or 0) or objects.ended:
                self._mark_and_delete(lease.name, objects)
            else:
                self._delete(objects)

    def forget(self, name: str) -> None:
        """The client has ended the sequence, which this replica does not have: delete all of it.

        Another one may have it, and may be about to store it.

        Raises:
            SnapshotError: UNAVAILABLE.
        """
        with _store_errors():
            self._mark_and_delete(name, self._find(name))

    def fenced(self, leases: list[Lease]) -> list[Lease]:
        """Those of these leases whose sequences another replica has since, by one listing.

        Raises:
            SnapshotError: UNAVAILABLE.
        """
        with _store_errors():
            sequences = _sequences_in(self._bucket.list())
        objects = [sequences.get(lease.name, _StoredObjects()) for lease in leases]
        pairs = zip(leases, objects, strict=True)
        return [lease for lease, each in pairs if self._is_fenced(lease, each)]

    # Of a replica that takes a sequence over

    def claim(
        self, name: str, key_digest: bytes, check: Callable[[Snapshot], None] | None = None
    ) -> tuple[Snapshot, Lease]:
        """Read a sequence's snapshot and claim the sequence; its last holder is fenced then.

        Args:
            name: of the sequence.
            key_digest: digest of its key.
            check: raises `SnapshotError` for a snapshot that cannot be used, before it is claimed.

        Raises:
            SnapshotError: any but FENCED and QUOTA.
        """
        with _store_errors():
            objects = self._find(name)
            epochs, highest = objects.epochs, objects.highest
            if highest <= objects.ended:
                raise _missing()
            record = self._read(name, highest, epochs[highest])
            data_epoch = highest
            if record.snapshot is None:
                if record.continues not in epochs:
                    raise _missing()
                data_epoch = record.continues
                record = self._read(name, data_epoch, epochs[data_epoch])
            snapshot = record.snapshot
            if snapshot is None:
                raise _missing()
            if record.expires <= self._clock():
                raise SnapshotError(
                    SnapshotReason.EXPIRED,
                    f"the snapshot has expired {self._clock() - record.expires:.0f} s ago",
                )
            if snapshot.key_digest != key_digest:
                raise _missing()
            if snapshot.contract != self.contract:
                raise SnapshotError(
                    SnapshotReason.FOREIGN,
                    f"the snapshot is of an engine with the state contract"
                    f" {snapshot.contract[:12]}…, this one has {self.contract[:12]}…: weights,"
                    f" states or tokenizer differ",
                )
            if check is not None:
                check(snapshot)
            lease = Lease(
                name, highest + 1, snapshot.position, record.expires, begun=True, moved=True
            )
            claim = EpochRecord(name, highest + 1, record.expires, continues=data_epoch)
            if not self._create(claim):
                raise SnapshotError(
                    SnapshotReason.CLAIMED, "another server has claimed the snapshot just now"
                )
            return snapshot, lease

    def sweep(self) -> int:
        """Delete what has expired, and files that were never finished; returns how many objects.

        With a mark goes what was written below it after the end of its sequence.

        Raises:
            SnapshotError: UNAVAILABLE.
        """
        with _store_errors():
            everything, now = self._bucket.list(), self._clock()
            expired = {
                entry.name
                for entry in everything
                if entry.modified + self._seconds <= now
                and (_OBJECT.fullmatch(entry.name) or entry.name.endswith(PARTIAL))
            }
            for objects in _sequences_in(everything).values():
                due = [each for each in objects.marks if each.modified + MARK_SECONDS <= now]
                if due:
                    below = max(map(_epoch_of, due))
                    expired |= objects.names(up_to=below)
                    expired |= {entry.name for entry in due}
            for name in sorted(expired, key=lambda name: _MARK.fullmatch(name) is not None):
                self._bucket.delete(name)  # marks last: a server that is killed has not lost them
            return len(expired)

    # Objects

    def _find(self, name: str) -> "_StoredObjects":
        return _sequences_in(self._bucket.list(f"{name}.")).get(name, _StoredObjects())

    def _mark_and_delete(self, name: str, objects: "_StoredObjects") -> None:
        """Delete what the store has of a sequence, and let nobody store it again."""
        epoch = max(objects.highest, objects.ended) + MARK_ABOVE
        self._bucket.write(f"{_object(name, epoch)}.ended", [b""])
        self._delete(self._find(name), up_to=epoch)

    def _delete(self, objects: "_StoredObjects", up_to: int | None = None) -> None:
        """Delete objects of a sequence, and what killed servers have left half written.

        Args:
            objects: all that there is of it.
            up_to: only of epochs up to this one; None for all.
        """
        for name in objects.names(up_to):
            self._bucket.delete(name)

    def _read(self, name: str, epoch: int, entry: Entry) -> EpochRecord:
        if entry.size > self._max_bytes:
            raise SnapshotError(
                SnapshotReason.FOREIGN,
                f"the snapshot has {entry.size} bytes, a sequence of this model at most"
                f" {self._max_bytes}",
            )
        try:
            content = self._bucket.read(entry.name)
        except FileNotFoundError:
            raise _missing() from None
        return decode(content, name, epoch, self._mac_key)

    def _create(self, record: EpochRecord) -> bool:
        name = _object(record.name, record.epoch)
        return self._bucket.create(name, list(encode(record, self._mac_key)))

    def _claim(self, lease: Lease, objects: "_StoredObjects") -> None:
        """Get the next epoch for a sequence that begins; delete what earlier ones have left."""
        while True:
            epoch = max(objects.highest, objects.ended) + 1
            expires = self._clock() + self._seconds
            if self._create(EpochRecord(lease.name, epoch, expires)):
                break
            objects = self._find(lease.name)
        lease.epoch, lease.expires = epoch, expires
        for older in objects.epochs:
            self._bucket.delete(_object(lease.name, older))

    def _is_fenced(self, lease: Lease, objects: "_StoredObjects") -> bool:
        """Whether another replica has the sequence, or the client has ended it elsewhere."""
        if lease.epoch is None:  # it has stored nothing; a mark is newer than its look at the store
            return lease.begun and objects.ended > 0
        if objects.ended >= lease.epoch or objects.highest > lease.epoch:
            return True
        return not objects.highest and lease.expires > self._clock()

    def _check_fence(self, lease: Lease, objects: "_StoredObjects") -> None:
        """Refuse to store a fenced sequence, and delete what was stored after its end.

        Raises:
            SnapshotError: FENCED.
        """
        if objects.ended:
            self._delete(objects, up_to=objects.ended)
        if self._is_fenced(lease, objects):
            raise SnapshotError(
                SnapshotReason.FENCED,
                "another server has restored the sequence, or it has ended there",
            )

    def _check_quota(self, size: int) -> None:
        if self._quota is None:
            return
        with self._lock:
            if (now := self._clock()) >= self._usage_until:
                self._usage = sum(entry.size for entry in self._bucket.list())
                self._usage_until = now + USAGE_SECONDS
            if self._usage + size > self._quota:
                raise SnapshotError(
                    SnapshotReason.QUOTA,
                    f"the store holds {self._usage} bytes of at most {self._quota}, and the"
                    f" snapshot has {size} more",
                )
            self._usage += size


@dataclass
class _StoredObjects:
    """What the store has of one sequence.

    Attributes:
        epochs: the object of each epoch.
        marks: that it has ended.
        unfinished: what is being written, or was left half written.
    """

    epochs: dict[int, Entry] = field(default_factory=dict)
    marks: list[Entry] = field(default_factory=list)
    unfinished: list[Entry] = field(default_factory=list)

    @property
    def highest(self) -> int:
        """The highest epoch of an object; 0 without one."""
        return max(self.epochs, default=0)

    @property
    def ended(self) -> int:
        """The epoch up to which the sequence has ended; 0 if it has not."""
        return max(map(_epoch_of, self.marks), default=0)

    def names(self, up_to: int | None = None) -> set[str]:
        """The names of objects, finished or not, of epochs up to this one; None for all."""
        objects = [*self.epochs.values(), *self.unfinished]
        return {each.name for each in objects if up_to is None or _epoch_of(each) <= up_to}


def _sequences_in(objects: list[Entry]) -> dict[str, _StoredObjects]:
    """What is in the store, by the name of the sequence."""
    sequences: dict[str, _StoredObjects] = {}
    for entry in objects:
        name = entry.name.partition(".")[0]
        if (match := _OBJECT.fullmatch(entry.name)) is not None:
            sequences.setdefault(name, _StoredObjects()).epochs[int(match["epoch"])] = entry
        elif _MARK.fullmatch(entry.name):
            sequences.setdefault(name, _StoredObjects()).marks.append(entry)
        elif _UNFINISHED.fullmatch(entry.name):
            sequences.setdefault(name, _StoredObjects()).unfinished.append(entry)
    return sequences


def _epoch_of(entry: Entry) -> int:
    return int(entry.name.split(".")[1])


def _object(name: str, epoch: int) -> str:
    return f"{name}.{epoch}"


def _missing() -> SnapshotError:
    return SnapshotError(
        SnapshotReason.MISSING, "the store has no snapshot of a sequence with this id and key"
    )


@contextmanager
def _store_errors() -> Iterator[None]:
    """Turn what a store raises into UNAVAILABLE."""
    try:
        yield
    except SnapshotError:
        raise
    except Exception as error:  # of any type: fsspec's file systems have errors of their own
        reason = str(error).partition("\n")[0]
        raise SnapshotError(
            SnapshotReason.UNAVAILABLE, f"the store failed ({type(error).__name__}: {reason})"
        ) from error
