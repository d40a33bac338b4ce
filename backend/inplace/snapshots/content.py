"""The bytes of an object in the store: a header, tensors, and a MAC over all of it.

::

    8 bytes     the magic number, with the version
    8 bytes     the length of the header, little-endian
    header      JSON
    tensors     their bytes one after the other, in the order of the header
    32 bytes    HMAC-SHA256 over the length of everything before and the SHA-256 of each block of it

The MAC is compared before anything of the header is read. Nothing is unpickled or evaluated.
Threads hash the blocks: one of them does a gigabyte a second, and a sequence may have half of one.
"""

import hmac
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from math import prod
from typing import Any

import torch
from torch import Tensor

from inplace.parameters import Parameter
from inplace.schema.specs import Dtype
from inplace.schema.tensor_file import as_bytes, flat_bytes
from inplace.snapshots.errors import SnapshotError, SnapshotReason

MAGIC = b"INPSNAP2"
"""Begins every object; its last byte is the version of the format."""

MAC_BYTES = 32
LENGTH_BYTES = 8

BLOCK_BYTES = 8 << 20
"""Bytes of a block, but for the last one."""

OVERHEAD = 1 << 20
"""Bytes that an object may have beside its states, tokens and audio."""


@dataclass(frozen=True)
class Snapshot:
    """All of a sequence that another slot needs to go on with it.

    Attributes:
        contract: of the engine that wrote it (`inplace.snapshots.contract.state_contract`).
        key_digest: digest of the sequence's key.
        capacity: positions of a slot of that engine; None if no state grows.
        length: positions that the states hold.
        token_ids: the tokens at these positions, where the engine knows them; else empty.
        num_prompt_tokens: how many tokens are before the first one of the last generation.
        pending_token: the last generated token, which no step has consumed; None without one.
        group: the parameter ``group`` of its START.
        salt: what it shares prefixes by; None if it shares none.
        positions: by program of a schedule, how many positions its calls have taken.
        context: the last tokens of the text that it has been answered with.
        audio: samples that are not a whole chunk yet; None without any.
        states: by name: of those that append, the positions that are used; others whole.
    """

    contract: str
    key_digest: bytes
    capacity: int | None
    length: int
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    num_prompt_tokens: int = 0
    pending_token: int | None = None
    group: Parameter | None = None
    salt: bytes | None = None
    positions: Mapping[str, int] = field(default_factory=dict)
    context: tuple[int, ...] = ()
    audio: Tensor | None = None
    states: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def position(self) -> int:
        """How many tokens (or entries) the sequence has, with the pending token."""
        return self.length + (self.pending_token is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors and tokens, which are nearly all that is stored."""
        tensors = [*self.states.values(), *(() if self.audio is None else (self.audio,))]
        bytes_of_tensors: int = sum(tensor.nbytes for tensor in tensors)
        return bytes_of_tensors + 4 * len(self.token_ids)


@dataclass(frozen=True)
class EpochRecord:
    """What lies at one epoch of a sequence.

    Attributes:
        name: of the sequence in the store.
        epoch: of the replica that wrote it.
        expires: until when it may be restored, in seconds since 1970.
        snapshot: the sequence; None of a claim.
        continues: of a claim, the epoch with the snapshot that it goes on from; None of a sequence
            that has begun and was not stored yet.
    """

    name: str
    epoch: int
    expires: float
    snapshot: Snapshot | None = None
    continues: int | None = None


def encode(record: EpochRecord, key: bytes) -> Iterator[memoryview | bytes]:
    """The bytes of a record, in parts; tensors are not copied.

    Args:
        record: its tensors are on the host.
        key: of the MAC.
    """
    header, tensors = _header(record)
    text = json.dumps(header, separators=(",", ":")).encode()
    parts: list[memoryview | bytes] = [MAGIC + len(text).to_bytes(LENGTH_BYTES, "little") + text]
    parts += [_bytes_of(tensor) for tensor in tensors]
    yield from parts
    yield _mac(key, parts)


def _mac(key: bytes, parts: Iterable[memoryview | bytes]) -> bytes:
    """The MAC of the bytes of all parts; how they are divided makes no difference."""
    blocks: list[list[memoryview]] = [[]]
    size = 0
    for part in parts:
        view, begin = memoryview(part), 0
        while begin < len(view):
            room = BLOCK_BYTES - size % BLOCK_BYTES
            piece = view[begin : begin + room]
            blocks[-1].append(piece)
            begin, size = begin + len(piece), size + len(piece)
            if not size % BLOCK_BYTES:
                blocks.append([])
    digests = map(_hashed, blocks) if len(blocks) == 1 else _hashers().map(_hashed, blocks)
    return hmac.digest(key, size.to_bytes(LENGTH_BYTES, "little") + b"".join(digests), "sha256")


def _hashed(pieces: list[memoryview]) -> bytes:
    hashed = sha256()
    for piece in pieces:
        hashed.update(piece)  # without the GIL
    return hashed.digest()


@cache
def _hashers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "inplace-hash")


def _header(record: EpochRecord) -> tuple[dict[str, Any], list[Tensor]]:
    header: dict[str, Any] = {
        "name": record.name,
        "epoch": record.epoch,
        "expires": record.expires,
        "continues": record.continues,
    }
    snapshot = record.snapshot
    if snapshot is None:
        return header, []
    tensors = dict(snapshot.states)
    named: list[tuple[str, str, Tensor]] = [("state", *each) for each in tensors.items()]
    if snapshot.audio is not None:
        named.append(("audio", "", snapshot.audio))
    named.append(("tokens", "", torch.tensor(snapshot.token_ids, dtype=torch.int32)))
    header["sequence"] = {
        "contract": snapshot.contract,
        "key_digest": snapshot.key_digest.hex(),
        "capacity": snapshot.capacity,
        "length": snapshot.length,
        "num_prompt_tokens": snapshot.num_prompt_tokens,
        "pending_token": snapshot.pending_token,
        "group": snapshot.group,
        "salt": None if snapshot.salt is None else snapshot.salt.hex(),
        "positions": dict(snapshot.positions),
        "context": list(snapshot.context),
        "tensors": [
            [kind, name, str(Dtype.of(tensor.dtype)), list(tensor.shape)]
            for kind, name, tensor in named
        ],
    }
    return header, [tensor for _, _, tensor in named]


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return flat_bytes(tensor).numpy().data.cast("B")


def decode(
    content: bytes | bytearray | memoryview, name: str, epoch: int, key: bytes
) -> EpochRecord:
    """Read a record whose MAC is right and that belongs where it lies.

    Args:
        content: the whole object; the tensors are views of it, so it must not be changed.
        name: where it lies.
        epoch: where it lies.
        key: of the MAC.

    Raises:
        SnapshotError: TRUNCATED, TAMPERED or REPLAYED.
    """
    view = memoryview(content).cast("B")
    least = len(MAGIC) + LENGTH_BYTES + MAC_BYTES
    if len(view) < least or bytes(view[: len(MAGIC)]) != MAGIC:
        raise SnapshotError(
            SnapshotReason.TRUNCATED if len(view) < least else SnapshotReason.TAMPERED,
            f"the snapshot has {len(view)} bytes and begins with {bytes(view[:8])!r}, not with"
            f" {MAGIC!r}: it is damaged, or of another version",
        )
    body, mac = view[:-MAC_BYTES], bytes(view[-MAC_BYTES:])
    if not hmac.compare_digest(_mac(key, [body]), mac):
        _refuse_truncated(body)
        raise SnapshotError(
            SnapshotReason.TAMPERED,
            "the MAC of the snapshot is wrong: it was changed, or written with another secret",
        )
    start = len(MAGIC) + LENGTH_BYTES
    size = int.from_bytes(body[len(MAGIC) : start], "little")
    header = json.loads(bytes(body[start : start + size]))
    if header["name"] != name or header["epoch"] != epoch:
        raise SnapshotError(
            SnapshotReason.REPLAYED,
            f"the snapshot was written for epoch {header['epoch']} of"
            f" {'this' if header['name'] == name else 'another'} sequence and lies at epoch"
            f" {epoch} of this one: it was copied",
        )
    snapshot = None
    if "sequence" in header:
        snapshot = _snapshot(header["sequence"], body[start + size :])
    return EpochRecord(name, epoch, header["expires"], snapshot, header["continues"])


def _refuse_truncated(body: memoryview) -> None:
    """Say so where the header of what is not a whole object can still be read.

    It is read for this error alone.
    """
    start = len(MAGIC) + LENGTH_BYTES
    size = int.from_bytes(body[len(MAGIC) : start], "little")
    expected = start + size
    try:
        header = json.loads(bytes(body[start : start + size])) if size <= OVERHEAD else {}
        for _, _, dtype, shape in header.get("sequence", {}).get("tensors", ()):
            expected += prod(shape) * Dtype(dtype).as_torch.itemsize
    except (ValueError, TypeError, AttributeError, RecursionError):
        return
    if len(body) < expected:
        raise SnapshotError(
            SnapshotReason.TRUNCATED,
            f"the snapshot has {len(body)} bytes before its MAC, {expected} were written",
        )


def _snapshot(fields: Mapping[str, Any], payload: memoryview) -> Snapshot:
    data, begin = as_bytes(payload), 0
    tensors: dict[tuple[str, str], Tensor] = {}
    for kind, name, dtype, shape in fields["tensors"]:
        element = Dtype(dtype).as_torch
        end = begin + prod(shape) * element.itemsize
        part = data[begin:end]
        if part.storage_offset() % element.itemsize:
            part = part.clone()
        tensors[kind, name] = part.view(element).view(shape)
        begin = end
    tokens = array("i")
    tokens.frombytes(tensors.pop(("tokens", "")).numpy().tobytes())
    return Snapshot(
        contract=fields["contract"],
        key_digest=bytes.fromhex(fields["key_digest"]),
        capacity=fields["capacity"],
        length=fields["length"],
        token_ids=tokens,
        num_prompt_tokens=fields["num_prompt_tokens"],
        pending_token=fields["pending_token"],
        group=fields["group"],
        salt=None if fields["salt"] is None else bytes.fromhex(fields["salt"]),
        positions=fields["positions"],
        context=tuple(fields["context"]),
        audio=tensors.pop(("audio", ""), None),
        states={name: tensor for (_, name), tensor in tensors.items()},
    )
