"""Sequences that are stored by one model instance and go on in another, or in the same one."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.slots import EndReason
from inplace.schema.snapshots import SnapshotOptions
from inplace.snapshots import Bucket, SnapshotStore, open_bucket, state_contract

from support.copying import KEY, feed, poison
from support.decoding import random_prompt

SECRET = b"s" * 32
ENDED = ".ended"
_numbers = itertools.count()


def memory_bucket() -> Bucket:
    """A bucket that nothing else has."""
    return open_bucket(f"memory://stored{next(_numbers)}")


def left_in(bucket: Bucket) -> list[str]:
    """What a bucket has of sequences, but for marks that they have ended, which go in a minute."""
    return [entry.name for entry in bucket.list() if not entry.name.endswith(ENDED)]


def left_in_folder(store: Path) -> list[Path]:
    """The same of the folder that is a store."""
    files = store.rglob("*")
    return sorted(file for file in files if file.is_file() and not file.name.endswith(ENDED))


def store_in(
    instance: ModelInstance, bucket: Bucket, every: int | None = None, **options: Any
) -> None:
    """Let an instance store its sequences in a bucket."""
    store = SnapshotStore(
        bucket,
        SECRET,
        "model",
        state_contract(instance.manifest),
        slot_bytes=instance.manifest.slot_bytes,
        **options,
    )
    instance.store_sequences(SnapshotOptions("memory://", "", every), store)


@contextlib.contextmanager
def storing(instance: ModelInstance, every: int | None = None) -> Iterator[Bucket]:
    """Inside the block an instance, which others use too, stores its sequences."""
    bucket, counted = memory_bucket(), instance._counted_input
    store_in(instance, bucket, every)
    keeper = instance.snapshots
    assert keeper is not None
    try:
        yield bucket
    finally:
        poison(instance)
        keeper.close()
        instance.observer._slot_observers.remove(keeper)
        instance.snapshots, instance._counted_input = None, counted


def check_snapshot(instance: ModelInstance, seed: int, length: int) -> None:
    """A sequence that was stored, and restored into an arena of NaN, gives the bits of one alone.

    Args:
        instance: a decoder.
        seed: of the tokens.
        length: tokens of the sequence when it is stored.
    """
    parts = [random_prompt(seed + part, size) for part, size in enumerate((length, 1, 4))]
    poison(instance)
    with storing(instance) as bucket:
        expected = [feed(instance, "alone", parts[0], position=0)]
        expected += [feed(instance, "alone", ids) for ids in parts[1:]]
        instance.table.end(instance.table.find("alone"))
        given = [feed(instance, "first", parts[0], position=0)]
        sequence, keeper = instance.table.find("first"), instance.snapshots
        assert keeper is not None
        assert sequence.key_digest is not None
        result = keeper.write(sequence, sequence.pending_token, wait=True)
        assert result is not None
        assert result.result()
        instance.table.end(sequence, EndReason.SHUTDOWN)
        poison(instance)
        restored = keeper.fetch("first", sequence.key_digest).result()
        given += [
            feed(instance, "first", parts[1], restored=restored, position=length),
            feed(instance, "first", parts[2]),
        ]
        assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
        instance.table.end(instance.table.find("first"))
    assert left_in(bucket) == []


__all__ = [
    "KEY",
    "check_snapshot",
    "left_in",
    "left_in_folder",
    "memory_bucket",
    "store_in",
    "storing",
]
