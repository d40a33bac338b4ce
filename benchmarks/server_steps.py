"""What the server adds to a step: closed-loop sequences of one token a request against a real tritonserver.

    python benchmarks/server_steps.py --model model_repository/my-model [--sequences 8] [--seconds 10] [--out result.json]

The engine's own step is timed first, in a process of its own. Then the server runs, perf_analyzer drives it where it can run (it needs
glibc 2.38), and a load generator on tritonclient does everywhere. The server's statistics say where the time of a request goes: waiting in
its queue, in the backend's execute() of which the engine's step is a part, and the rest: gRPC, the client, shared memory.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inplace.client import Sequence
from inplace.manifest import Manifest
from inplace_builder.server import Ports, TritonServer
from tritonclient.grpc import InferenceServerClient

TOKEN = 5
PROMPT = 16


@dataclass(frozen=True)
class Counters:
    """The server's statistics of a model: requests, executions, nanoseconds in the queue and in execute()."""

    requests: int
    executions: int
    queue_ns: int
    execute_ns: int

    @classmethod
    def of(cls, client: InferenceServerClient, model: str) -> "Counters":
        """As they are now."""
        found = client.get_inference_statistics(model).model_stats[0]
        return cls(found.inference_count, found.execution_count, found.inference_stats.queue.ns, found.inference_stats.compute_infer.ns)

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(
            self.requests - other.requests,
            self.executions - other.executions,
            self.queue_ns - other.queue_ns,
            self.execute_ns - other.execute_ns,
        )


def engine_step(folder: Path, rows: int, steps: int) -> float:
    """Microseconds of ``ModelInstance.step`` with these rows and nothing else, the median of ``steps``."""
    import torch
    from inplace.arena import Arena
    from inplace.engines import load_engine
    from inplace.instance import ModelInstance
    from inplace.requests import Request

    manifest = Manifest.load(folder)
    arena = Arena(manifest.states, manifest.slots, torch.device(manifest.engine.device))
    instance = ModelInstance(manifest, arena, load_engine(folder, manifest, arena), idle_timeout=float("inf"))
    times = []
    for step in range(min(steps, (manifest.capacity or steps + 1) - PROMPT)):
        ids = torch.full((1, PROMPT if step == 0 else 1), TOKEN)
        works = [instance.admit(Request(row + 1, step == 0, False, {"input_ids": ids})) for row in range(rows)]
        begin = time.perf_counter()
        while pending := [work for work in works if not work.finished]:
            instance.step(pending)
        times.append(time.perf_counter() - begin)
        for work in works:
            instance.finish(work)
    return statistics.median(times[1:]) * 1e6


def drive(url: str, model: str, capacity: int, seconds: float, latencies: list[float]) -> None:
    """One client: sequences one after another, one token a request, until the time is over."""
    deadline = time.monotonic() + seconds
    with InferenceServerClient(url) as client:
        while time.monotonic() < deadline:
            with Sequence(client, model) as sequence:
                sequence.tokens([TOKEN] * PROMPT)
                while sequence.length < capacity and time.monotonic() < deadline:
                    begin = time.perf_counter()
                    sequence.tokens([TOKEN])
                    latencies.append(time.perf_counter() - begin)


def closed_loop(url: str, model: str, capacity: int, sequences: int, seconds: float) -> dict[str, float]:
    """Requests a second and latencies in microseconds of so many clients, a thread each."""
    latencies: list[list[float]] = [[] for _ in range(sequences)]
    threads = [threading.Thread(target=drive, args=(url, model, capacity, seconds, found)) for found in latencies]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - begin
    found = sorted(latency for client in latencies for latency in client)
    return {
        "requests_per_second": len(found) / wall,
        "latency_us_p50": statistics.median(found) * 1e6,
        "latency_us_p99": found[int(len(found) * 0.99)] * 1e6,
    }


def perf_analyzer(url: str, model: str, sequences: int, seconds: float, length: int) -> dict[str, float] | str:
    """The same with perf_analyzer; its reason where it cannot run."""
    binary = shutil.which("perf_analyzer")
    if binary is None:
        return "perf_analyzer is not installed"
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "data.json", Path(folder) / "report.csv"
        data.write_text(json.dumps({"data": [[{"input_ids": {"content": [TOKEN], "shape": [1]}}] * length]}))
        command = [binary, "-m", model, "-u", url, "-i", "grpc", f"--input-data={data}", "--concurrency-range", str(sequences)]
        command += ["--measurement-interval", str(int(seconds * 1000)), "--max-trials", "3", "-f", str(report), "--shape", "input_ids:1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not report.is_file():
            return f"perf_analyzer failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}"
        row = next(csv.DictReader(report.open()))
    return {name: float(value) for name, value in row.items() if value and value.replace(".", "", 1).isdigit()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="a decoder in a model repository")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine-step", action="store_true", help="only time the engine's step, in this process")
    arguments = parser.parse_args()
    folder = arguments.model / "1"
    if arguments.engine_step:
        print(engine_step(folder, arguments.sequences, 300))
        return
    command = [sys.executable, __file__, "--model", str(arguments.model), "--sequences", str(arguments.sequences), "--engine-step"]
    step = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    manifest = Manifest.load(folder)
    capacity, model = manifest.capacity or 1 << 20, arguments.model.name
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch) / "repository"
        repository.mkdir()
        (repository / model).symlink_to(arguments.model.resolve())
        with (
            TritonServer(repository, Ports(0, 0, 0), log=Path(scratch) / "log") as server,
            InferenceServerClient(server.grpc_url) as client,
        ):
            closed_loop(server.grpc_url, model, capacity, arguments.sequences, 1.0)
            before = Counters.of(client, model)
            ours = closed_loop(server.grpc_url, model, capacity, arguments.sequences, arguments.seconds)
            spent = Counters.of(client, model) - before
            analyzer = perf_analyzer(server.grpc_url, model, arguments.sequences, arguments.seconds, capacity - PROMPT)
    wall = 1e6 / ours["requests_per_second"]
    result: dict[str, Any] = {
        "what": "sequences of one token a request, closed loop, unary gRPC",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/server_steps.py " + " ".join(sys.argv[1:]),
        "model": {"name": model, "engine": manifest.engine.kind, "device": manifest.engine.device, "dtype": str(manifest.engine.dtype)},
        "sequences": arguments.sequences,
        "engine_step_us": step,
        "tritonclient": ours,
        "perf_analyzer": analyzer,
        "batch_size": spent.requests / max(1, spent.executions),
        "wall_us_per_request": wall,
        "execute_us_per_batch": spent.execute_ns / 1e3 / max(1, spent.requests),
        "queue_us_per_request": spent.queue_ns / 1e3 / max(1, spent.requests),
        "beyond_engine_us_per_request": wall - step * spent.executions / max(1, spent.requests),
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
