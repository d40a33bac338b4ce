"""The store of snapshots in S3, which moto's server plays: conditional writes decide who claims."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pytest
import torch
from inplace.snapshots import Lease, Snapshot, SnapshotError, SnapshotReason, SnapshotStore
from inplace.snapshots.buckets import ObjectBucket
from inplace.snapshots.store import MARK_SECONDS
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

KEY = b"k" * 32


def _one_write_at_a_time(patch: pytest.MonkeyPatch) -> None:
    """Moto looks for an object and writes it in two steps; a store does both at once."""
    lock, put = threading.Lock(), S3Response.put_object

    def locked(self: S3Response) -> Any:
        with lock:
            return put(self)

    patch.setattr(S3Response, "put_object", locked)


@pytest.fixture(scope="module")
def system() -> Iterator[fsspec.AbstractFileSystem]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        _one_write_at_a_time(patch)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        system = fsspec.filesystem(
            "s3", endpoint_url=f"http://{host}:{port}", skip_instance_cache=True
        )
        system.mkdir("snapshots")
        yield system
        server.stop()
        os.environ.pop("MOTO_S3", None)


def test_one_of_many_claims_wins_and_nothing_is_left(system: fsspec.AbstractFileSystem) -> None:
    bucket = ObjectBucket(system, "snapshots/models")
    stores = [SnapshotStore(bucket, b"s" * 32, "m", "c", slot_bytes=1 << 20) for _ in range(4)]
    lease = Lease(stores[0].name("a", KEY))
    states = {"keys": torch.randn(300)}
    stores[0].write(lease, Snapshot("c", KEY, 16, 3, states=states))
    found = stores[0]._find(lease.name)
    for one in stores:  # all have read the same objects
        one._find = lambda name: found  # type: ignore[method-assign]

    def claim(one: SnapshotStore) -> Lease | SnapshotReason:
        try:
            snapshot, taken = one.claim(lease.name, KEY)
        except SnapshotError as error:
            return error.reason
        assert torch.equal(snapshot.states["keys"], states["keys"])
        return taken

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(claim, stores))
    assert results.count(SnapshotReason.CLAIMED) == 3
    [taken] = [each for each in results if isinstance(each, Lease)]
    fresh = SnapshotStore(bucket, b"s" * 32, "m", "c", slot_bytes=1 << 20)
    assert fresh.fenced([lease, taken]) == [lease]
    with pytest.raises(SnapshotError) as error:
        fresh.write(lease, Snapshot("c", KEY, 16, 3, states=states))
    assert error.value.reason is SnapshotReason.FENCED
    fresh.write(taken, Snapshot("c", KEY, 16, 5, states=states))
    assert [entry.name for entry in bucket.list()] == [f"{lease.name}.{taken.epoch}"]
    assert fresh.sweep() == 0
    fresh.end(taken)
    assert [entry.name for entry in bucket.list()] == [f"{lease.name}.1002.ended"]
    with pytest.raises(SnapshotError, match="no snapshot"):
        fresh.claim(lease.name, KEY)
    later = SnapshotStore(
        bucket, b"s" * 32, "m", "c", slot_bytes=1, clock=lambda: time.time() + MARK_SECONDS + 2
    )
    assert later.sweep() == 1
    assert bucket.list() == []
