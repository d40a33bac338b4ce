"""What copies and snapshots of a sequence cost, by the sizes of published models.

    python -m benchmarks.gpu.sequences --out build/gpu/gpu_sequences.json --limit 120 \
        --stores /dev/shm,/tmp

Only the states exist, no weights: a copy costs the same whatever the engine computes. For each
shape it measures a fork (`Arena.copy`, by events of the device and on the clock of the host, whose
steps wait for it), what a snapshot keeps the thread of steps from doing (`Arena.save_used`), and
each part of a snapshot and of a restore. Beside them are the limits of the machine: a copy on the
device, between device and host (pinned memory), of the MAC, and of the store. ``--device cpu`` is
to try it; its numbers say nothing.
"""

import argparse
import hmac
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inplace.engines.arena import Arena
from inplace.runtime.slots import SequenceState
from inplace.runtime.snapshots import NUM_WRITERS, Captured
from inplace.schema.specs import Dtype, StateSpec, Update
from inplace.snapshots import Lease, Snapshot, SnapshotStore, open_bucket

from benchmarks.gpu.bandwidth import bandwidth
from benchmarks.record import facts

GB = 1e9
KEY = b"k" * 32


@dataclass(frozen=True)
class Shape:
    """A decoder's states in bfloat16: keys and values of each layer.

    Attributes:
        layers, heads, dim: of keys and values.
        length: positions that the sequence holds.
        capacity: positions of a slot.
    """

    layers: int
    heads: int
    dim: int
    length: int
    capacity: int

    def states(self) -> tuple[StateSpec, ...]:
        """As the builder describes them."""
        return tuple(
            StateSpec(
                name=f"{part}_states_{layer}",
                shape=(self.heads, self.capacity, self.dim),
                dtype=Dtype.BFLOAT16,
                update=Update.APPEND,
                axis=1,
                reset=False,
            )
            for part in ("key", "value")
            for layer in range(self.layers)
        )

    @property
    def bytes(self) -> int:
        """Bytes that the sequence uses."""
        return 2 * self.layers * self.heads * self.dim * self.length * 2


SHAPES = {
    "8b": Shape(32, 8, 128, 4096, 4096),
    "8b in 8k": Shape(32, 8, 128, 4096, 8192),
    "1b": Shape(16, 8, 64, 4096, 4096),
    "135m": Shape(30, 3, 64, 2048, 2048),
    "tiny": Shape(2, 2, 8, 20, 32),
}
"""Llama-3.1-8B, the same in a slot with room for more, Llama-3.2-1B, SmolLM2-135M; and one to try
this script."""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="8b,8b in 8k,1b,135m", help="separated by commas")
    parser.add_argument("--stores", default="/dev/shm,/tmp", help="folders, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="of snapshots and restores")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    until = time.monotonic() + given.limit
    what = "copies, snapshots and restores of one sequence; GB are 1e9 bytes; medians"
    document = facts(what, "python -m benchmarks.gpu.sequences") | {"limits": {}, "cases": []}
    for name, limit in limits(given):
        document["limits"][name] = limit
        report({name: limit}, given.out, document)
    for name in given.shapes.split(","):
        case: dict[str, Any] = {"shape": name}
        document["cases"].append(case)
        for part, result in measured(SHAPES[name], given, until):
            case[part] = result
            report({"shape": name, part: result}, given.out, document)
            if time.monotonic() > until:
                break


def report(line: dict[str, Any], out: Path | None, document: dict[str, Any]) -> None:
    """Print what is new, and write all."""
    print(json.dumps(line), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")


def limits(given: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What this machine does at best."""
    if given.device == "cuda":
        yield "device_copy_gb_per_s", bandwidth() / GB  # reads and writes counted
    size = (1 << 30) if given.device == "cuda" else 1 << 24
    host = torch.empty(size, dtype=torch.uint8, pin_memory=given.device == "cuda").zero_()
    device = torch.empty(size, dtype=torch.uint8, device=given.device)
    down = clocked(given, lambda: host.copy_(device, non_blocking=True))
    up = clocked(given, lambda: device.copy_(host, non_blocking=True))
    yield "device_to_host_gb_per_s", size / down / GB
    yield "host_to_device_gb_per_s", size / up / GB
    begin = time.perf_counter()
    hmac.digest(KEY, host.numpy().data, "sha256")
    yield "hmac_sha256_gb_per_s", size / (time.perf_counter() - begin) / GB
    for folder in given.stores.split(","):
        yield f"write {folder} gb_per_s", _raw_store(folder, host)


def _raw_store(folder: str, data: torch.Tensor) -> float:
    """GB a second of one thread that writes a file in large blocks, without fsync."""
    view = data.numpy().data
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        begin = time.perf_counter()
        with (Path(scratch) / "file").open("wb", buffering=0) as file:
            for at in range(0, len(view), 8 << 20):
                file.write(view[at : at + (8 << 20)])
        return float(len(view) / (time.perf_counter() - begin) / GB)


def clocked(given: argparse.Namespace, run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the host from the call until the device is done; the median."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(given)
        begin = time.perf_counter()
        run()
        _wait(given)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _wait(given: argparse.Namespace) -> None:
    if given.device == "cuda":
        torch.cuda.synchronize()


def measured(
    shape: Shape, given: argparse.Namespace, until: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts of one shape."""
    arena = Arena(shape.states(), 4, torch.device(given.device))
    for tensor in arena.tensors.values():
        tensor.normal_()
    yield "sequence", {"bytes": shape.bytes, "length": shape.length, "capacity": shape.capacity}
    yield "fork", forked(arena, shape, given)
    yield "capture", captured(arena, shape, given)
    for folder in given.stores.split(","):
        if time.monotonic() < until:
            yield f"snapshot in {folder}", stored(arena, shape, given, folder, until)


def forked(arena: Arena, shape: Shape, given: argparse.Namespace) -> dict[str, Any]:
    """`Arena.copy`, and as a copy of PyTorch for each state."""

    def one_by_one() -> None:
        for tensor in arena.tensors.values():
            tensor[2].narrow(1, 0, shape.length).copy_(tensor[0].narrow(1, 0, shape.length))

    def fork() -> None:
        arena.copy(0, 1, shape.length)

    result: dict[str, Any] = {}
    for name, run in (("fork", fork), ("copy of each state", one_by_one)):
        seconds = clocked(given, run, 50)
        result[name] = {"us": seconds * 1e6, "gb_per_s": 2 * shape.bytes / seconds / GB}
        if given.device == "cuda":
            result[name] |= by_events(run)
    for tensor in arena.tensors.values():
        used = tensor.narrow(2, 0, shape.length)
        if not torch.equal(used[0], used[1]):
            raise RuntimeError("the copy differs")
    return result


def by_events(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds on the device, and those of the host until the call returns; medians."""
    device, host = [], []
    for _ in range(50):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # about 1 ms: all launches are queued before the first runs
        begin.record()
        clock = time.perf_counter()
        run()
        host.append(time.perf_counter() - clock)
        end.record()
        end.synchronize()
        device.append(begin.elapsed_time(end) * 1000)
    return {
        "device_us": statistics.median(device),
        "device_us_min": min(device),
        "host_us": statistics.median(host) * 1e6,
    }


def captured(arena: Arena, shape: Shape, given: argparse.Namespace) -> dict[str, Any]:
    """What a snapshot costs between two steps: the used positions are copied on the device."""

    def capture() -> None:
        arena.save_used(0, shape.length)

    seconds = clocked(given, capture, 20)
    result: dict[str, Any] = {"us": seconds * 1e6}
    if given.device == "cuda":
        result |= by_events(capture)
    return result


def stored(
    arena: Arena, shape: Shape, given: argparse.Namespace, folder: str, until: float
) -> dict[str, Any]:
    """A snapshot and a restore by one thread, and as many sequences at once as a server writes."""
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        sequences = [_Stored(scratch, arena, shape, number) for number in range(NUM_WRITERS)]
        sequences[0].write()  # what is lazy
        parts: list[dict[str, float]] = []
        while len(parts) < given.repeats and (not parts or time.monotonic() < until):
            parts.append(sequences[0].write() | sequences[0].read())
        result: dict[str, Any] = {
            name: _rate(statistics.median(each[name] for each in parts), shape.bytes)
            for name in parts[0]
        }
        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            for name in ("write", "read"):
                if time.monotonic() > until:
                    break
                begin = time.perf_counter()
                list(pool.map(lambda each, name=name: getattr(each, name)(), sequences))
                result[f"{name} {NUM_WRITERS} at once"] = _rate(
                    time.perf_counter() - begin, NUM_WRITERS * shape.bytes
                )
        result["object_bytes"] = max(file.stat().st_size for file in scratch.iterdir())
        return result
    finally:
        shutil.rmtree(scratch)


def _rate(seconds: float, size: int) -> dict[str, float]:
    return {"ms": seconds * 1e3, "gb_per_s": size / seconds / GB}


class _Stored:
    """A sequence that is stored and restored, with the time of each part."""

    def __init__(self, folder: Path, arena: Arena, shape: Shape, number: int) -> None:
        self._arena, self._shape, self._number = arena, shape, number
        self._store = SnapshotStore(
            open_bucket(folder.as_uri()), KEY, "model", "contract", slot_bytes=2 * shape.bytes
        )
        self._name = self._store.name(f"sequence {number}", KEY)
        self._lease = Lease(self._name)

    def write(self) -> dict[str, float]:
        """Copy the states between two steps, bring them to the host, and store them."""
        begin = time.perf_counter()
        states = self._arena.save_used(self._number % self._arena.slots, self._shape.length)
        snapshot = Snapshot("contract", KEY, self._shape.capacity, self._shape.length)
        captured = Captured(
            SequenceState("", 0), _with_states(snapshot, states), self._synchronize
        ).on_host()
        on_host = time.perf_counter()
        self._store.write(self._lease, captured)
        end = time.perf_counter()
        return {"snapshot": end - begin, "to_host": on_host - begin, "store": end - on_host}

    def read(self) -> dict[str, float]:
        """Read, check and claim a snapshot, and bring its states into a slot."""
        begin = time.perf_counter()
        snapshot, self._lease = self._store.claim(self._name, KEY)
        claimed = time.perf_counter()
        states = {name: each.to(self._arena.device) for name, each in snapshot.states.items()}
        self._synchronize()
        on_device = time.perf_counter()
        self._arena.restore_used(self._number % self._arena.slots, states, self._shape.length)
        self._synchronize()
        end = time.perf_counter()
        return {
            "restore": end - begin,
            "claim": claimed - begin,
            "to_device": on_device - claimed,
            "into_slot": end - on_device,
        }

    def _synchronize(self) -> None:
        if self._arena.device.type == "cuda":
            torch.cuda.synchronize()


def _with_states(snapshot: Snapshot, states: dict[str, torch.Tensor]) -> Snapshot:
    return Snapshot(
        snapshot.contract, snapshot.key_digest, snapshot.capacity, snapshot.length, states=states
    )


if __name__ == "__main__":
    main()
