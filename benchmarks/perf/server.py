"""The server under load: where the time of its requests goes, by its own statistics and metrics."""

import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from inplace_builder.tools.tritonserver import TritonServer
from tritonclient.grpc import InferenceServerClient

FLUSH = 1.2
"""Seconds after which the backend's metrics hold all that has happened; it hands them over once a second."""


@dataclass(frozen=True)
class Counters:
    """What has happened to a model so far, or between two moments; nanoseconds are Triton's own, added up over requests.

    Attributes:
        requests, executions: answered, and calls of the backend.
        queue_ns, input_ns, execute_ns, output_ns: in the server's queue, on the way into the backend's process, in the backend, and back.
        steps, engine_s: of the engine, and seconds in them.
    """

    requests: int = 0
    executions: int = 0
    queue_ns: int = 0
    input_ns: int = 0
    execute_ns: int = 0
    output_ns: int = 0
    steps: int = 0
    engine_s: float = 0.0

    @classmethod
    def of(cls, server: TritonServer, model: str) -> "Counters":
        """As they are when the backend has handed over its metrics."""
        time.sleep(FLUSH)
        with InferenceServerClient(server.grpc_url) as client:
            found = client.get_inference_statistics(model).model_stats[0]
        with urllib.request.urlopen(
            f"http://{server.host}:{server.ports.metrics}/metrics", timeout=10
        ) as page:
            metrics = page.read().decode()
        times = found.inference_stats
        return cls(
            found.inference_count,
            found.execution_count,
            times.queue.ns,
            times.compute_input.ns,
            times.compute_infer.ns,
            times.compute_output.ns,
            int(_metric(metrics, "inplace_step_seconds_count", model)),
            _metric(metrics, "inplace_step_seconds_sum", model),
        )

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(
            *(getattr(self, name) - getattr(other, name) for name in Counters.__dataclass_fields__)
        )

    def breakdown(self, seconds: float, instances: int = 1) -> dict[str, float]:
        """What these counters, counted over so many seconds of wall clock, say of a request.

        Args:
            seconds: of wall clock.
            instances: of the model; they work side by side, each in an engine of its own for its share of ``engine_s``.

        Returns:
            Microseconds of wall clock per request, and of it beyond the engine: (wall - time in an engine) / requests; the share of the
            wall clock in which an engine was busy; requests of one step.
        """
        requests, engine_s = max(1, self.requests), self.engine_s / instances
        return {
            "wall_us_per_request": seconds / requests * 1e6,
            "beyond_engine_us_per_request": (seconds - engine_s) / requests * 1e6,
            "engine_busy": engine_s / seconds,
            "requests_per_step": self.requests / max(1, self.steps),
        }

    def latency(self, mean_us: float) -> dict[str, float]:
        """The parts that a request's mean latency is made of, in microseconds; for models that answer within the server's call.

        What the server does not know of it is the client's, gRPC's and the network's.
        """
        requests = max(1, self.requests)
        engine = self.engine_s / max(1, self.steps) * 1e6
        parts = {
            "queue": self.queue_ns / requests / 1e3,
            "into_backend": self.input_ns / requests / 1e3,
            "backend_beyond_engine": self.execute_ns / requests / 1e3 - engine,
            "engine": engine,
            "out_of_backend": self.output_ns / requests / 1e3,
        }
        return {"client_and_grpc": mean_us - sum(parts.values())} | parts


def _metric(page: str, name: str, model: str) -> float:
    """A metric of one model, of all its instances."""
    found = re.findall(
        rf'^{name}{{[^}}]*model="{re.escape(model)}"[^}}]*}} (\S+)$', page, re.MULTILINE
    )
    return sum(map(float, found))


def engine_steps(folder: Path, rows: list[int], steps: int = 300) -> list[float]:
    """Microseconds of steps of so many rows in the engine alone, the median of each; in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.perf.engine",
        str(folder),
        ",".join(map(str, rows)),
        str(steps),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [
        float(line.removeprefix("median "))
        for line in said.splitlines()
        if line.startswith("median ")
    ]
