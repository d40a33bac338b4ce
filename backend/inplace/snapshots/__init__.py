"""Sequences in a store outside of the server: what a snapshot is, and who may go on from it.

A snapshot is one object, named by an HMAC of the sequence's id and key, with a MAC over all of its
bytes. Which replica has a sequence is an *epoch*, a number that only grows: the replica that
creates the object of the next one has it from then on, and the one before is fenced
(docs/adr/0047-snapshots.md).
"""

from inplace.snapshots.buckets import Bucket, open_bucket
from inplace.snapshots.content import Snapshot
from inplace.snapshots.contract import state_contract
from inplace.snapshots.errors import SnapshotError, SnapshotReason
from inplace.snapshots.secret import read_secret
from inplace.snapshots.store import Lease, Restored, SnapshotStore, model_folder

__all__ = [
    "Bucket",
    "Lease",
    "Restored",
    "Snapshot",
    "SnapshotError",
    "SnapshotReason",
    "SnapshotStore",
    "model_folder",
    "open_bucket",
    "read_secret",
    "state_contract",
]
