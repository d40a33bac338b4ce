"""A real server whose metrics and log are read, and a model whose engine can fail."""

import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from inplace.operators import read, update
from inplace.runtime.observer import exported_metrics
from inplace.schema.specs import Dtype, Role, StateSpec, TensorSpec, Update
from inplace_builder import Capture, capture_module
from inplace_builder.capture.capture import control_input
from inplace_builder.tools.tritonserver import TritonServer
from tritonclient.grpc import InferenceServerClient

Found = dict[tuple[str, str], float]
SAMPLE = re.compile(r"^(inplace_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Table(torch.nn.Module):
    """Adds up entries of a table; a number that is none of them makes the engine itself fail."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(10.0))

    def forward(
        self, which: torch.Tensor, slots: torch.Tensor, total: torch.Tensor
    ) -> torch.Tensor:
        sums = read(total, slots) + self.table[which]
        update(total, slots, sums)
        return sums * 1.0


def failing() -> Capture:
    return capture_module(
        Table(),
        inputs=[
            TensorSpec(name="which", role=Role.ROW, dtype=Dtype.INT64, shape=(1,)),
            control_input("slots", Role.SLOTS),
        ],
        outputs=[TensorSpec(name="sum", role=Role.VALUE, dtype=Dtype.FLOAT32, shape=(1,))],
        states=[StateSpec(name="total", shape=(1,), dtype=Dtype.FLOAT32, update=Update.REPLACE)],
        max_rows=2,
    )


def samples(server: TritonServer) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each time series in a server's metrics."""
    url = f"http://127.0.0.1:{server.ports.metrics}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        page = answer.read().decode()
    for name, written, value in SAMPLE.findall(page):
        yield name, dict(LABEL.findall(written)), float(value)


def by_instance(server: TritonServer, model: str, metric: str) -> dict[str, float]:
    """A metric of a model, by the name of the instance; of several labels the sum."""
    sums: dict[str, float] = {}
    for name, labels, value in samples(server):
        if name == metric and labels.get("model") == model:
            sums[labels["instance"]] = sums.get(labels["instance"], 0.0) + value
    return sums


@dataclass
class Observed:
    """A server whose metrics and log are read; its models are these tests' own."""

    server: TritonServer
    client: InferenceServerClient
    repository: Path

    def samples(self, model: str) -> Iterator[tuple[str, dict[str, str], float]]:
        for name, labels, value in samples(self.server):
            if labels.get("model") == model:
                yield name, labels, value

    def numbers(self, model: str, instance: str = "_0_0") -> Found:
        own = {metric.name: metric.label for metric in exported_metrics()}
        return {
            (name, labels.get(own[name], "")): value
            for name, labels, value in self.samples(model)
            if labels["instance"] == f"{model}{instance}"
        }

    def settled(self, model: str, expected: Found, instance: str = "_0_0") -> Found:
        """The numbers, once they are as expected; they are handed over once a second."""
        deadline = time.monotonic() + 60.0
        while True:
            result = self.numbers(model, instance)
            if (
                all(result.get(key) == value for key, value in expected.items())
                or time.monotonic() > deadline
            ):
                return result
            time.sleep(0.1)

    def log(self, model: str) -> list[str]:
        """What the instances of a model have logged: ``<severity><instance>: <text>``."""
        assert self.server.log is not None
        written = re.compile(rf"([A-Z]).*\binplace {model}_0_(\d: .*)")
        lines = self.server.log.read_text(errors="replace").splitlines()
        return [match[1] + match[2] for line in lines if (match := written.fullmatch(line))]

    def lines(self, model: str, pattern: str, least: int) -> list[str]:
        """Lines of `log` that match, once there are so many, or after a minute.

        A thread of the backend writes them.
        """
        deadline = time.monotonic() + 60.0
        while True:
            result = [line for line in self.log(model) if re.fullmatch(pattern, line)]
            if len(result) >= least or time.monotonic() > deadline:
                return result
            time.sleep(0.1)

    def stub(self, model: str) -> psutil.Process:
        """The process in which the first instance of a model runs."""
        [number] = {labels["process"] for _, labels, _ in self.samples(model)}
        return psutil.Process(int(number))
