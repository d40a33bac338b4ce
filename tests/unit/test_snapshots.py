"""Snapshots of sequences in a store: what is written, who may restore it, and what is refused."""

import itertools
import os
import stat
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from inplace.engines.arena import Arena
from inplace.errors import Code, LoadError
from inplace.schema.specs import Dtype, StateSpec, Update
from inplace.snapshots import (
    Bucket,
    Lease,
    Snapshot,
    SnapshotError,
    SnapshotReason,
    SnapshotStore,
    content,
    model_folder,
    open_bucket,
    read_secret,
    state_contract,
)
from inplace.snapshots.contract import WEIGHTS_NOTE
from support.models import LOADABLE

SECRET, KEY, OTHER_KEY = b"s" * 32, b"k" * 32, b"o" * 32
SECONDS = 100.0
_numbers = itertools.count()


class Clock:
    """Seconds since 1970 that a test sets."""

    seconds = 1e9

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(params=["file", "memory"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    if request.param == "file":
        return open_bucket((tmp_path / "store").as_uri())
    return open_bucket(f"memory://store{next(_numbers)}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store(bucket: Bucket, clock: Clock, **options: object) -> SnapshotStore:
    given: dict[str, object] = {"slot_bytes": 1 << 20, "seconds": SECONDS, "clock": clock}
    given |= {"secret": SECRET, "model": "m", "contract": "contract"} | options
    return SnapshotStore(bucket, **given)  # type: ignore[arg-type]


def snapshot(length: int = 3, seed: int = 0, key_digest: bytes = KEY) -> Snapshot:
    generator = torch.Generator().manual_seed(seed)
    return Snapshot(
        contract="contract",
        key_digest=key_digest,
        capacity=16,
        length=length,
        token_ids=array("i", range(length)),
        num_prompt_tokens=2,
        pending_token=7,
        group="group",
        salt=b"salt",
        positions={"decode": 4},
        context=(1, 2),
        audio=torch.randn(5, generator=generator),
        states={
            "keys": torch.randn(2, length, 4, generator=generator).bfloat16(),
            "flag": torch.tensor([True, False, True]),
            "ring": torch.randn(3, generator=generator),
            "spectrum": torch.randn(2, dtype=torch.complex64, generator=generator),
        },
    )


def reason(error: pytest.ExceptionInfo[SnapshotError]) -> SnapshotReason:
    return error.value.reason


def written(target: SnapshotStore, sequence: str = "a") -> Lease:
    lease = Lease(target.name(sequence, KEY))
    target.write(lease, snapshot())
    return lease


def object_of(bucket: Bucket) -> str:
    [entry] = bucket.list()
    return entry.name


def test_what_is_restored_is_what_was_written(bucket: Bucket, clock: Clock) -> None:
    target = store(bucket, clock)
    lease = written(target)
    restored, taken = target.claim(lease.name, KEY)
    expected = snapshot()
    for name, tensor in expected.states.items():
        assert torch.equal(restored.states[name], tensor)
        assert restored.states[name].dtype == tensor.dtype
    assert restored.audio is not None
    assert expected.audio is not None
    assert torch.equal(restored.audio, expected.audio)
    for name in ("contract", "key_digest", "capacity", "length", "token_ids", "pending_token",
                 "group", "salt", "positions", "context", "num_prompt_tokens"):  # fmt: skip
        assert getattr(restored, name) == getattr(expected, name)
    assert (restored.position, taken.stored_at, taken.epoch) == (4, 4, 2)
    target.write(taken, snapshot(length=5))
    assert len(bucket.list()) == 1  # of the last epoch alone
    assert target.claim(lease.name, KEY)[0].length == 5
    target.end(Lease(lease.name, 3))
    assert bucket.list() == []


def test_a_sequence_without_a_snapshot_is_missing(bucket: Bucket, clock: Clock) -> None:
    target = store(bucket, clock)
    lease = written(target)
    names = target.name("b", KEY), target.name("a", OTHER_KEY), target.name(12, KEY)
    assert len({*names, lease.name, target.name("12", KEY)}) == 5
    other_model = store(bucket, clock, model="n")
    for where, name in ((target, names[0]), (other_model, other_model.name("a", KEY))):
        with pytest.raises(SnapshotError, match="no snapshot") as error:
            where.claim(name, KEY)
        assert reason(error) is SnapshotReason.MISSING
    with pytest.raises(SnapshotError) as error:
        target.claim(lease.name, OTHER_KEY)  # its name alone is not enough
    assert reason(error) is SnapshotReason.MISSING
    assert error.value.as_refusal().code is Code.NO_SNAPSHOT
    target.end(lease)
    with pytest.raises(SnapshotError):
        target.claim(lease.name, KEY)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_a_truncated_snapshot_is_refused(bucket: Bucket, clock: Clock, part: float) -> None:
    target = store(bucket, clock)
    lease = written(target)
    name = object_of(bucket)
    content = bucket.read(name)
    bucket.write(name, [bytes(content[: int(len(content) * part)])])
    with pytest.raises(SnapshotError) as error:
        target.claim(lease.name, KEY)
    # of half a header nothing can be told but that its MAC is wrong
    assert reason(error) in (SnapshotReason.TRUNCATED, SnapshotReason.TAMPERED)
    assert part < 0.9 or reason(error) is SnapshotReason.TRUNCATED
    assert error.value.as_refusal().code is Code.BAD_SNAPSHOT


def test_a_changed_bit_anywhere_is_refused(bucket: Bucket, clock: Clock) -> None:
    target = store(bucket, clock)
    lease = written(target)
    name = object_of(bucket)
    content = bytes(bucket.read(name))
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        bucket.write(name, [bytes(changed)])
        with pytest.raises(SnapshotError) as error:
            target.claim(lease.name, KEY)
        assert reason(error) in (SnapshotReason.TAMPERED, SnapshotReason.TRUNCATED)
    bucket.write(name, [content])
    target.claim(lease.name, KEY)
    forged = store(bucket, clock, secret=b"f" * 32)
    bucket.write(f"{lease.name}.9", [content])
    with pytest.raises(SnapshotError) as error:
        forged.claim(lease.name, KEY)  # whoever has another secret can neither read nor write
    assert reason(error) is SnapshotReason.TAMPERED


def test_a_changed_bit_in_any_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also blocks that are exchanged, and ones that are left out."""
    monkeypatch.setattr(content, "BLOCK_BYTES", 64)
    states = {"a": torch.arange(40.0), "b": torch.arange(96.0)}
    snapshot = Snapshot("contract", KEY, 8, 4, states=states)
    whole = bytearray(b"".join(content.encode(content.EpochRecord("n", 1, 1.0, snapshot), KEY)))
    read = content.decode(bytes(whole), "n", 1, KEY).snapshot
    assert read is not None
    assert all(torch.equal(read.states[name], each) for name, each in states.items())
    for place in range(len(content.MAGIC), len(whole), 31):
        changed = whole.copy()
        changed[place] ^= 1
        with pytest.raises(SnapshotError):
            content.decode(changed, "n", 1, KEY)
    for changed in (
        whole[:-96] + whole[-32:],
        whole[:-160] + whole[-96:-32] + whole[-160:-96] + whole[-32:],
    ):
        with pytest.raises(SnapshotError):
            content.decode(changed, "n", 1, KEY)


def test_a_copied_snapshot_is_refused(bucket: Bucket, clock: Clock) -> None:
    target = store(bucket, clock)
    lease = written(target)
    old = bytes(bucket.read(object_of(bucket)))
    other = target.name("b", KEY)
    bucket.write(f"{other}.1", [old])  # under the name of another sequence
    with pytest.raises(SnapshotError, match="another sequence") as error:
        target.claim(other, KEY)
    assert reason(error) is SnapshotReason.REPLAYED
    _, taken = target.claim(lease.name, KEY)
    target.write(taken, snapshot(length=9))
    bucket.write(f"{lease.name}.1", [old])  # put back below the epoch that counts
    assert target.claim(lease.name, KEY)[0].length == 9
    bucket.write(f"{lease.name}.7", [old])  # and above it
    with pytest.raises(SnapshotError, match="written for epoch 1") as error:
        target.claim(lease.name, KEY)
    assert reason(error) is SnapshotReason.REPLAYED
    assert error.value.as_refusal().code is Code.BAD_SNAPSHOT


def test_an_expired_snapshot_is_refused_and_swept(bucket: Bucket, clock: Clock) -> None:
    target = store(bucket, clock)
    lease = written(target)
    clock.seconds += SECONDS
    with pytest.raises(SnapshotError, match="expired") as error:
        target.claim(lease.name, KEY)
    assert reason(error) is SnapshotReason.EXPIRED
    assert error.value.as_refusal().code is Code.NO_SNAPSHOT
    clock.seconds = max(entry.modified for entry in bucket.list()) + SECONDS - 1
    assert target.sweep() == 0
    clock.seconds += 1
    assert target.sweep() == 1
    assert bucket.list() == []


def test_a_foreign_snapshot_is_refused(bucket: Bucket, clock: Clock) -> None:
    lease = written(store(bucket, clock))
    with pytest.raises(SnapshotError, match="state contract") as error:
        store(bucket, clock, contract="another").claim(lease.name, KEY)
    assert reason(error) is SnapshotReason.FOREIGN
    small = store(bucket, clock, slot_bytes=1)
    small.write(large := Lease(small.name("b", KEY)), _large())
    with pytest.raises(SnapshotError, match="at most"):
        small.claim(large.name, KEY)


def _large() -> Snapshot:
    return Snapshot("contract", KEY, None, 1, states={"keys": torch.zeros(1 << 19)})


def test_one_of_many_claims_wins(bucket: Bucket, clock: Clock) -> None:
    lease = written(store(bucket, clock))
    stores = [store(bucket, clock) for _ in range(8)]
    found = stores[0]._find(lease.name)
    for one in stores:  # all have read the same objects
        one._find = lambda name: found  # type: ignore[method-assign]

    def claim(one: SnapshotStore) -> SnapshotReason | Lease:
        try:
            return one.claim(lease.name, KEY)[1]
        except SnapshotError as error:
            return error.reason

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(claim, stores))
    assert results.count(SnapshotReason.CLAIMED) == 7
    assert sum(isinstance(each, Lease) for each in results) == 1


def test_who_was_restored_elsewhere_is_fenced(bucket: Bucket, clock: Clock) -> None:
    first, second, third = (store(bucket, clock) for _ in range(3))
    lease = written(first)
    _, taken = second.claim(lease.name, KEY)
    assert first.fenced([lease]) == [lease]
    assert second.fenced([taken, Lease("0" * 64)]) == []
    with pytest.raises(SnapshotError) as error:
        first.write(lease, snapshot(length=8))
    assert reason(error) is SnapshotReason.FENCED
    assert error.value.as_refusal().code is Code.FENCED
    second.write(taken, snapshot(length=6))
    assert third.claim(lease.name, KEY)[0].length == 6


def test_a_claim_without_a_snapshot_goes_on_from_the_last_one(bucket: Bucket, clock: Clock) -> None:
    target = store(bucket, clock)
    lease = written(target)
    target.claim(lease.name, KEY)  # and the server dies
    restored, taken = target.claim(lease.name, KEY)
    assert (restored.length, taken.epoch) == (3, 3)


def test_a_sequence_that_begins_anew_leaves_nothing_to_restore(
    bucket: Bucket, clock: Clock
) -> None:
    first, second = store(bucket, clock), store(bucket, clock)
    lease = written(first)
    fresh = Lease(lease.name)
    second.begin(fresh)
    with pytest.raises(SnapshotError) as error:
        second.claim(lease.name, KEY)
    assert reason(error) is SnapshotReason.MISSING
    assert first.fenced([lease]) == [lease]
    second.write(fresh, snapshot(length=2))
    assert second.claim(lease.name, KEY)[0].length == 2
    nothing = Lease(first.name("new", KEY))
    first.begin(nothing)
    assert nothing.epoch is None  # nothing is written for a sequence that nobody has stored


def test_a_full_store_takes_no_more(bucket: Bucket, clock: Clock) -> None:
    first = written(store(bucket, clock))
    size = sum(entry.size for entry in bucket.list())
    target = store(bucket, clock, quota_bytes=size * 7 // 2)
    second = written(target, "b")
    with pytest.raises(SnapshotError, match="of at most") as error:
        written(target, "c")
    assert reason(error) is SnapshotReason.QUOTA
    target.write(second, snapshot())  # in the place of its own
    target.forget(first.name)
    clock.seconds += 10
    written(target, "c")


def test_files_are_their_owners_alone(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "new" / "store"
    umask = os.umask(0)
    try:
        target = store(open_bucket(folder.as_uri()), clock)
        lease = written(target)
        target.claim(lease.name, KEY)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert modes == {0o600}
    assert all(part != "a" for file in folder.iterdir() for part in file.name.split("."))


def test_a_file_that_is_half_written_is_no_snapshot(tmp_path: Path, clock: Clock) -> None:
    bucket = open_bucket(tmp_path.as_uri())

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise OSError("no space left")

    target = store(bucket, clock)
    lease = written(target)
    before = bucket.read(object_of(bucket))
    with pytest.raises(OSError, match="no space"):
        bucket.write(object_of(bucket), parts())
    assert bucket.read(object_of(bucket)) == before
    (tmp_path / f"{lease.name}.2.0123.part").write_bytes(b"half")
    _, mine = target.claim(lease.name, KEY)
    assert mine.epoch == 2
    (tmp_path / f"{lease.name}.3.4567.part").write_bytes(b"of a later holder")
    target.end(mine)  # and with it goes what servers that were killed have left
    assert [entry.name for entry in bucket.list()] == [f"{lease.name}.1002.ended"]


def test_models_of_one_store_do_not_delete_each_others_snapshots(
    tmp_path: Path, clock: Clock
) -> None:
    url = tmp_path.as_uri()
    names = [model_folder(SECRET, name) for name in ("short", "long")]
    assert len({*names, model_folder(KEY, "short")}) == 3
    clock.seconds = time.time()
    lasting = store(open_bucket(url, names[1]), clock)
    lease = written(lasting)
    clock.seconds += 60
    assert store(open_bucket(url, names[0]), clock, seconds=30).sweep() == 0
    assert lasting.claim(lease.name, KEY)[1].epoch == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_store_that_fails_is_unavailable(tmp_path: Path, clock: Clock) -> None:
    target = store(open_bucket(tmp_path.as_uri()), clock)
    lease = written(target)
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    with pytest.raises(SnapshotError, match="the store failed") as error:
        target.claim(lease.name, KEY)
    assert reason(error) is SnapshotReason.UNAVAILABLE
    assert error.value.as_refusal().retryable


def test_the_contract_is_that_of_the_states_and_not_of_the_plan() -> None:
    manifest = LOADABLE
    contract = state_contract(manifest)
    noted = manifest.model_copy(update={"built_with": {WEIGHTS_NOTE: "w"}})
    assert state_contract(noted) != contract
    files = tuple(each.model_copy(update={"sha256": "1" * 64}) for each in manifest.files)
    rebuilt = noted.model_copy(update={"files": files, "slots": 99})
    assert state_contract(rebuilt) == state_contract(noted)
    assert state_contract(manifest.model_copy(update={"files": files})) != contract
    state = StateSpec(name="keys", shape=(2, 8), dtype=Dtype.FLOAT32, update=Update.APPEND, axis=1)
    contracts = {
        state_contract(manifest.model_copy(update={"states": (state.model_copy(update=change),)}))
        for change in (
            {}, {"dtype": Dtype.FLOAT16}, {"name": "other"}, {"shape": (3, 8)}, {"axis": 0},
            {"update": Update.RING}, {"scale": "scales"}, {"fill": 1.0}, {"shape": (2, 9)},
        )
    }  # fmt: skip
    assert len(contracts) == 8  # a longer capacity is the same contract


def test_a_secret_has_32_bytes(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(LoadError, match="cannot be read"):
        read_secret(file)
    file.write_bytes(b"short\n")
    with pytest.raises(LoadError, match="has 5 bytes; expected 32"):
        read_secret(file)
    file.write_bytes(SECRET + b"\n")
    assert read_secret(file) == SECRET


def test_a_store_must_be_one_that_can_be_opened() -> None:
    with pytest.raises(LoadError, match=r"'nothing://x' cannot be opened"):
        open_bucket("nothing://x")


def test_of_a_state_with_two_buffers_the_one_that_counts_is_stored() -> None:
    spec = StateSpec(name="cell", shape=(2,), dtype=Dtype.FLOAT32, update=Update.REPLACE)
    arena = Arena((spec,), 3, torch.device("cpu"))
    before = arena.tensors["cell"]
    arena.rebind("cell", torch.arange(6.0).view(3, 2))  # as a step of the kind `copy` does
    saved = arena.save_used(1, 7)
    assert saved["cell"].tolist() == [2.0, 3.0]
    arena.restore_used(2, saved, 7)
    assert arena.tensors["cell"][2].tolist() == [2.0, 3.0]
    assert before.tolist() == [[0.0, 0.0]] * 3
    arena.tensors["cell"][1] = 9.0
    assert saved["cell"].tolist() == [2.0, 3.0]
