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
"""Seconds after which the backend's metrics are complete; it exports them once a second."""


@dataclass(frozen=True)
class Counters:
    """Counters of a model up to now, or between two moments.

    Attributes:
        requests, executions: answered requests, and calls of the backend.
        queue_ns, input_ns, execute_ns, output_ns: Triton's own, summed over requests: in the
            server's queue, on the way into the backend's process, in the backend, and back.
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
            statistics = client.get_inference_statistics(model).model_stats[0]
        with urllib.request.urlopen(
            f"http://{server.host}:{server.ports.metrics}/metrics", timeout=10
        ) as page:
            metrics = page.read().decode()
        times = statistics.inference_stats
        return cls(
            statistics.inference_count,
            statistics.execution_count,
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
        """What these counters mean for one request.

        Args:
            seconds: wall clock during which they were counted.
            instances: of the model; they work side by side, each with an engine for its share of
                ``engine_s``.

        Returns:
            Microseconds of wall clock per request, and of it outside the engine: (wall - time in an
            engine) / requests; the share of the wall clock in which an engine was busy; requests of
            one step.
        """
        requests, engine_s = max(1, self.requests), self.engine_s / instances
        return {
            "wall_us_per_request": seconds / requests * 1e6,
            "beyond_engine_us_per_request": (seconds - engine_s) / requests * 1e6,
            "engine_busy": engine_s / seconds,
            "requests_per_step": self.requests / max(1, self.steps),
        }

    def latency(self, mean_us: float) -> dict[str, float]:
        """The parts of a request's mean latency, in microseconds.

        For models that answer within the server's call. The rest is spent in the client, gRPC and
        the network.
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


def engine_part(spent: Counters, seconds: float) -> dict[str, float]:
    """What the engine did in so many seconds of a load: its share, a step's time, its steps."""
    return {
        "engine_busy": spent.engine_s / seconds,
        "engine_step_us": spent.engine_s / max(1, spent.steps) * 1e6,
        "steps": spent.steps,
    }


def _metric(page: str, name: str, model: str) -> float:
    """A metric of one model, of all its instances."""
    values = re.findall(
        rf'^{name}{{[^}}]*model="{re.escape(model)}"[^}}]*}} (\S+)$', page, re.MULTILINE
    )
    return sum(map(float, values))


def engine_steps(folder: Path, rows: list[int], steps: int = 300) -> list[float]:
    """Median microseconds of steps with so many rows in the engine alone, in its own process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.perf.engine",
        str(folder),
        ",".join(map(str, rows)),
        str(steps),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [
        float(line.removeprefix("median "))
        for line in output.splitlines()
        if line.startswith("median ")
    ]
