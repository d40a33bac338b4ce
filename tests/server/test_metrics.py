"""The numbers in /metrics of a real tritonserver are what was done, and its log says what happened to whom."""

import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from inplace.client import Sequence
from inplace.dtypes import Dtype
from inplace.manifest import Manifest
from inplace.metrics import families
from inplace.operators import read, update
from inplace.specs import Role, StateSpec, TensorSpec, Update
from inplace_builder.build import BuildOptions, build_decoder, write_engine
from inplace_builder.capture import Capture, capture_module
from inplace_builder.capture.capture import control
from inplace_builder.server import Ports, TritonServer
from models import CAPACITY, CHUNK, Repository
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

SLOTS = 3
Found = dict[tuple[str, str], float]
SAMPLE = re.compile(r"^(inplace_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Table(torch.nn.Module):
    """Adds up entries of a table; a number that is none of them makes the engine itself fail."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(10.0))

    def forward(self, which: torch.Tensor, slots: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        sums = read(total, slots) + self.table[which]
        update(total, slots, sums)
        return sums * 1.0


def failing() -> Capture:
    return capture_module(
        Table(),
        inputs=[TensorSpec(name="which", role=Role.ROW, dtype=Dtype.INT64, shape=(1,)), control("slots", Role.SLOTS)],
        outputs=[TensorSpec(name="sum", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(1,))],
        states=[StateSpec(name="total", shape=(1,), dtype=Dtype.FLOAT32, update=Update.REPLACE)],
        max_rows=2,
    )


@dataclass
class Observed:
    """A server of its own, so that what is counted is what these tests did."""

    server: TritonServer
    client: InferenceServerClient
    repository: Path

    def page(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.ports.metrics}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def samples(self, model: str) -> Iterator[tuple[str, dict[str, str], float]]:
        for name, written, value in SAMPLE.findall(self.page()):
            labels = dict(LABEL.findall(written))
            if labels["model"] == model:
                yield name, labels, float(value)

    def numbers(self, model: str, instance: str = "_0_0") -> Found:
        own = {metric.name: metric.label for metric in families()}
        return {
            (name, labels.get(own[name], "")): value
            for name, labels, value in self.samples(model)
            if labels["instance"] == f"{model}{instance}"
        }

    def settled(self, model: str, expected: Found) -> Found:
        """The numbers, once they are as expected; they are handed over once a second."""
        deadline = time.monotonic() + 10.0
        while True:
            found = self.numbers(model)
            if all(found.get(key) == value for key, value in expected.items()) or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def log(self) -> str:
        assert self.server.log is not None
        return self.server.log.read_text()


@pytest.fixture(scope="module")
def observed(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    path = tmp_path_factory.mktemp("observed")
    options = BuildOptions(slots=SLOTS, max_rows=SLOTS, capacity=CAPACITY, chunk=CHUNK, idle_timeout=2.0)
    build_decoder(repository.llama_folder, path / "llama", options)
    write_engine(failing(), path / "table", BuildOptions(slots=2, max_rows=2, capacity=1))
    config = path / "table" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    log = tmp_path_factory.mktemp("server") / "tritonserver.log"
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with (
        TritonServer(path, Ports(0, 0, 0), log=log, arguments=arguments) as server,
        InferenceServerClient(server.grpc_url) as client,
    ):
        yield Observed(server, client, path)


def send(client: InferenceServerClient, sequence: int | str, ids: list[int], start: bool = False, end: bool = False) -> None:
    from tritonclient.grpc import InferInput

    tensor = InferInput("input_ids", [1, len(ids)], "INT64")
    tensor.set_data_from_numpy(np.array([ids]))
    client.infer("llama", [tensor], sequence_id=sequence, sequence_start=start, sequence_end=end, request_id="asked")


def test_before_any_request_every_number_is_there(observed: Observed) -> None:
    found = observed.numbers("llama")
    assert set(found) == {(metric.name, value) for metric in families() for value in metric.values}
    manifest = Manifest.load(observed.repository / "llama" / "1")
    assert {key: value for key, value in found.items() if value} == {
        ("inplace_slots", ""): SLOTS,
        ("inplace_slots_free", ""): SLOTS,
        ("inplace_state_bytes", ""): SLOTS * manifest.slot_bytes,
    }


def test_the_numbers_are_what_was_done(observed: Observed) -> None:
    client = observed.client
    prompt = list(range(2 * CHUNK + 3))
    send(client, 1, prompt, start=True)  # three steps
    for token in range(5):
        send(client, 1, [token])
    send(client, "two words", [1, 2], start=True)
    send(client, "two words", [1, 2], start=True)  # takes the place of the first
    send(client, 3, [4], start=True)
    with pytest.raises(InferenceServerException, match="NO_FREE_SLOT"):
        send(client, 4, [1], start=True)
    for _ in range(2):
        with pytest.raises(InferenceServerException, match="VALUE_RANGE"):
            send(client, 3, [-1])
    send(client, 3, [4], end=True)
    send(client, 1, [9], end=True)
    expected: Found = {
        ("inplace_sequences_started_total", ""): 4,
        ("inplace_sequences_ended_total", "end"): 2,
        ("inplace_sequences_ended_total", "start"): 1,
        ("inplace_sequences_ended_total", "idle"): 1,
        ("inplace_sequences_ended_total", "engine_failed"): 0,
        ("inplace_sequences_live", ""): 0,
        ("inplace_slots_free", ""): SLOTS,
        ("inplace_requests_refused_total", "NO_FREE_SLOT"): 1,
        ("inplace_requests_refused_total", "VALUE_RANGE"): 2,
        ("inplace_requests_refused_total", "CAPACITY"): 0,
        ("inplace_tokens_total", "prefill"): len(prompt) + 2 + 2 + 1,
        ("inplace_tokens_total", "decode"): 5 + 1 + 1,
        ("inplace_step_seconds_count", ""): 3 + 5 + 1 + 1 + 1 + 1 + 1,
        ("inplace_step_rows_sum", ""): 13,
        ("inplace_step_rows_count", ""): 13,
        ("inplace_step_rows_bucket", "1"): 13,
        ("inplace_step_rows_bucket", "+Inf"): 13,
        ("inplace_queue_seconds_count", ""): 11,
        ("inplace_queue_seconds_bucket", "+Inf"): 11,
    }
    found = observed.settled("llama", expected)
    assert {key: found[key] for key in expected} == expected
    seconds = [found["inplace_step_seconds_bucket", bound] for bound in _bounds(found, "inplace_step_seconds_bucket")]
    assert seconds == sorted(seconds)
    assert seconds[-1] == 13
    assert 0 < found["inplace_step_seconds_sum", ""] < 60


def test_the_log_says_what_happened_to_whom(observed: Observed) -> None:
    log = observed.log()
    assert re.search(r"^I.*inplace llama_0_0: ready: slots=3 slot_bytes=\d+ arena_bytes=\d+ device=cpu", log, re.MULTILINE)
    assert r"sequence ended: sequence=\"two words\" slot=1 length=2 reason=start" in log
    assert r"sequence ended: sequence=\"two words\" slot=1 length=2 reason=idle" in log
    assert "request refused: sequence=4 request=asked code=NO_FREE_SLOT retryable=1 because=" in log
    assert "reason=end" not in log  # at DEBUG


def test_a_failure_of_the_engine_is_counted_for_its_instance_and_is_one_error_line(observed: Observed) -> None:
    sequence = Sequence(observed.client, "table", id="doomed")
    assert sequence.step({"which": np.array([3])})["sum"] == [3.0]
    with pytest.raises(InferenceServerException, match="ENGINE_FAILED"):
        sequence.step({"which": np.array([10])})
    with suppress(InferenceServerException):
        sequence.close()
    ended = ("inplace_sequences_ended_total", "engine_failed")
    deadline = time.monotonic() + 10.0
    while sorted(counts := [observed.numbers("table", instance).get(ended, 0) for instance in ("_0_0", "_0_1")]) != [0, 1]:
        assert time.monotonic() < deadline, counts
        time.sleep(0.1)
    instance = f"_0_{counts.index(1)}"
    found = observed.numbers("table", instance)
    assert found["inplace_requests_refused_total", "ENGINE_FAILED"] == 1
    assert (found["inplace_step_seconds_count", ""], found["inplace_tokens_total", "prefill"]) == (2, 1)
    errors = [line for line in observed.log().splitlines() if line.startswith("E") and "inplace " in line]
    assert len(errors) == 1
    assert f"inplace table{instance}: engine failed: rows=1 sequences=" in errors[0]
    assert "doomed" in errors[0]
    assert "IndexError" in errors[0]


def test_series_have_the_model_its_version_its_instance_and_its_process(observed: Observed) -> None:
    labels = [labels for _, labels, _ in observed.samples("table")]
    assert {(each["version"], each["instance"]) for each in labels} == {("1", "table_0_0"), ("1", "table_0_1")}
    extra = {metric.label for metric in families()} - {""}
    assert all(set(each) - extra == {"model", "version", "instance", "process"} for each in labels)


def test_a_model_that_is_unloaded_takes_its_series_along(observed: Observed) -> None:
    observed.client.unload_model("table")
    deadline = time.monotonic() + 10.0
    while list(observed.samples("table")):
        assert time.monotonic() < deadline, "the series are still there"
        time.sleep(0.1)
    assert list(observed.samples("llama"))
    assert observed.log().count("unloaded: live=0") == 2


def _bounds(found: Found, name: str) -> list[str]:
    return sorted((value for key, value in found if key == name), key=float)
