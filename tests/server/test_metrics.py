"""Metrics, log lines and liveness of a real tritonserver."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from inplace.alive import failures, is_alive
from inplace.client import Sequence
from inplace.errors import Code, RequestError
from inplace.runtime.observer import exported_metrics
from inplace.schema.served import Manifest
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from support import served
from support.dashboards import alerts, selected_metrics, shown_metrics
from support.generating import GrpcStream
from support.models import CAPACITY, CHUNK, Repository
from support.observed import Found, Observed, failing
from support.pool import Deployment, ServerPool
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server

SLOTS = 3


@pytest.fixture(scope="module")
def observed(
    repository: Repository, stream_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observed]:
    """On a server of its own: one of its models is killed."""
    path = tmp_path_factory.mktemp("observed")
    options = BuildOptions(
        slots=SLOTS, max_rows=SLOTS, capacity=CAPACITY, chunk=CHUNK, idle_timeout=2.5
    )
    build_decoder(repository.llama_folder, path / "observed", options)
    write_engine(failing(), path / "table", BuildOptions(slots=2, max_rows=2, capacity=1))

    def double(config: pb.ModelConfig) -> None:
        config.instance_group[0].count = 2

    talk = Deployment(stream_models / served.MODEL, "talk")
    models = Deployment(path / "observed"), talk
    with (
        ServerPool(tmp_path_factory.mktemp("server")) as pool,
        pool.serve(*models, Deployment(path / "table", change=double)) as server,
        InferenceServerClient(server.grpc_url) as client,
    ):
        yield Observed(server, client, pool.repository)


def send(
    client: InferenceServerClient,
    sequence: int | str,
    ids: list[int],
    start: bool = False,
    end: bool = False,
) -> None:
    tensor = InferInput("input_ids", [1, len(ids)], "INT64")
    tensor.set_data_from_numpy(np.array([ids]))
    client.infer(
        "observed",
        [tensor],
        sequence_id=sequence,
        sequence_start=start,
        sequence_end=end,
        request_id="asked",
    )


def test_every_metric_exists_before_the_first_request(observed: Observed) -> None:
    values = observed.numbers("observed")
    assert set(values) == {
        (metric.name, value) for metric in exported_metrics() for value in metric.label_values
    }
    manifest = Manifest.load(observed.repository / "observed" / "1")
    assert {key: value for key, value in values.items() if value} == {
        ("inplace_slots", ""): SLOTS,
        ("inplace_slots_free", ""): SLOTS,
        ("inplace_places", ""): 16384,  # max_candidate_sequences of config.pbtxt
        ("inplace_state_bytes", ""): SLOTS * manifest.slot_bytes,
    }


def test_metrics_count_what_was_done(observed: Observed) -> None:
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
    values = observed.settled("observed", expected)
    assert {key: values[key] for key in expected} == expected
    seconds = [
        values["inplace_step_seconds_bucket", bound]
        for bound in _bounds(values, "inplace_step_seconds_bucket")
    ]
    assert seconds == sorted(seconds)
    assert seconds[-1] == 13
    assert values["inplace_step_seconds_sum", ""] > 0


def test_the_log_names_the_sequences_and_requests(observed: Observed) -> None:
    assert observed.lines(
        "observed", r"I0: ready: slots=3 slot_bytes=\d+ arena_bytes=\d+ device=cpu.*", 1
    )
    assert observed.lines("observed", r".*sequence ended: .*reason=idle.*", 1)
    log = "\n".join(observed.log("observed"))
    assert r"sequence ended: sequence=\"two words\" slot=1 length=2 reason=start" in log
    assert r"sequence ended: sequence=\"two words\" slot=1 length=2 reason=idle" in log
    assert "request refused: sequence=4 request=asked code=NO_FREE_SLOT retryable=1 reason=" in log
    assert "reason=end" not in log  # at DEBUG


def test_generations_are_counted(observed: Observed) -> None:
    ids = InferInput("input_ids", [1, 4], "INT64")
    ids.set_data_from_numpy(np.array([[1, 2, 3, 4]]))
    answers: SimpleQueue[InferenceServerException | None] = SimpleQueue()
    with InferenceServerClient(observed.server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error))
        client.async_stream_infer(
            "talk",
            [ids],
            sequence_id=7,
            sequence_start=True,
            sequence_end=True,
            enable_empty_final_response=True,
            parameters={"max_tokens": 5, "stream_interval": 5},
        )
        assert answers.get(timeout=60) is None
        client.stop_stream()
    expected: Found = {
        ("inplace_generations_total", "length"): 1,
        ("inplace_requests_waiting", ""): 0,
        ("inplace_first_token_seconds_count", ""): 1,
        ("inplace_tokens_total", "prefill"): 4,
        ("inplace_tokens_total", "decode"): 4,
        ("inplace_sequences_ended_total", "end"): 1,
        ("inplace_slots_free", ""): served.SLOTS,
    }
    values = observed.settled("talk", expected)
    assert {key: values[key] for key in expected} == expected


def test_a_failure_of_the_engine_is_counted_for_its_instance_and_is_one_error_line(
    observed: Observed,
) -> None:
    sequence = Sequence(observed.client, "table", id="doomed")
    assert sequence.step({"which": np.array([3])})["sum"] == [3.0]
    with pytest.raises(InferenceServerException, match="ENGINE_FAILED"):
        sequence.step({"which": np.array([10])})
    with suppress(InferenceServerException):
        sequence.close()
    ended = ("inplace_sequences_ended_total", "engine_failed")
    deadline = time.monotonic() + 60.0
    while sorted(
        counts := [
            observed.numbers("table", instance).get(ended, 0) for instance in ("_0_0", "_0_1")
        ]
    ) != [0, 1]:
        assert time.monotonic() < deadline, counts
        time.sleep(0.1)
    instance = f"_0_{counts.index(1)}"
    expected: Found = {
        ("inplace_requests_refused_total", "ENGINE_FAILED"): 1,
        ("inplace_step_seconds_count", ""): 2,
        ("inplace_tokens_total", "prefill"): 1,
    }
    values = observed.settled("table", expected, instance)
    assert {key: values[key] for key in expected} == expected
    errors = observed.lines("table", r"E.*", 1)
    assert len(errors) == 1
    assert errors[0].startswith(f"E{counts.index(1)}: engine failed: rows=1 sequences=")
    assert "doomed" in errors[0]
    assert "IndexError" in errors[0]


def test_series_have_the_model_its_version_its_instance_and_its_process(observed: Observed) -> None:
    labels = [labels for _, labels, _ in observed.samples("table")]
    assert {(each["version"], each["instance"]) for each in labels} == {
        ("1", "table_0_0"),
        ("1", "table_0_1"),
    }
    extra = {metric.label for metric in exported_metrics()} - {""}
    assert all(
        set(each) - extra == {"model", "version", "instance", "gpu", "process"} for each in labels
    )


def test_the_series_of_an_unloaded_model_are_removed(observed: Observed) -> None:
    observed.client.unload_model("table")
    deadline = time.monotonic() + 60.0
    while list(observed.samples("table")):
        assert time.monotonic() < deadline, "the series are still there"
        time.sleep(0.1)
    assert list(observed.samples("observed"))
    assert len(observed.lines("table", r"I\d: unloaded: live=0.*", 2)) == 2


def test_the_dashboard_shows_exactly_these_metrics(observed: Observed) -> None:
    served = {name for name, _, _ in observed.samples("observed")}
    assert served == {metric.name for metric in exported_metrics()}
    assert shown_metrics("inplace") == served


def test_alerts_are_of_metrics_and_label_values_that_exist(observed: Observed) -> None:
    served = {name for name, _, _ in observed.samples("observed")}
    reasons = {
        labels["reason"]
        for name, labels, _ in observed.samples("observed")
        if name == "inplace_sequences_ended_total"
    }
    for expression in alerts("inplace"):
        assert selected_metrics(expression) <= served
        assert set(re.findall(r'reason="(\w+)"', expression)) <= reasons


def test_a_server_whose_models_answer_is_alive(observed: Observed) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "inplace.alive", observed.server.grpc_url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    idle: Found = {("inplace_sequences_live", ""): 0, ("inplace_slots_free", ""): SLOTS}
    assert observed.settled("observed", idle).items() >= idle.items()


def test_a_model_whose_slots_are_all_taken_is_alive(observed: Observed) -> None:
    for sequence in range(SLOTS):
        send(observed.client, 1 + sequence, [1], start=True)
    assert failures(observed.server.grpc_url) == {}
    for sequence in range(SLOTS):
        send(observed.client, 1 + sequence, [1], end=True)


def test_a_model_whose_slots_others_wait_for_is_alive(observed: Observed) -> None:
    """The step of the check waits behind them."""
    with GrpcStream(observed.server.grpc_url, "talk") as idle:
        for number in range(served.SLOTS):
            assert not idle.request(f"idle-{number}", [1], start=True).error
        with GrpcStream(observed.server.grpc_url, "talk") as waiting:
            waiting.send("waiting", [1], 5, start=True, end=True)
            waits: Found = {("inplace_requests_waiting", ""): 1}
            assert observed.settled("talk", waits).items() >= waits.items()
            assert failures(observed.server.grpc_url) == {}
            idle.request("idle-0", [1], end=True)
            assert waiting.collect().reason == "length"
        for number in range(1, served.SLOTS):
            idle.request(f"idle-{number}", [1], end=True)


def test_a_model_whose_process_hangs_is_not_alive_though_the_server_reports_it_ready(
    observed: Observed,
) -> None:
    stub = observed.stub("talk")
    stub.send_signal(signal.SIGSTOP)
    try:
        assert set(failures(observed.server.grpc_url, timeout=6.0)) == {"talk"}
        assert observed.client.is_model_ready("talk")
        result = subprocess.run(
            [sys.executable, "-m", "inplace.alive", observed.server.grpc_url, "--timeout", "6"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1
        assert re.fullmatch(
            r"talk: (no answer within 6 s|Stub process 'talk_0_0' is not healthy\.)\n",
            result.stderr,
        )
    finally:
        stub.kill()


@pytest.mark.parametrize("code", Code)
def test_every_error_of_the_backend_but_a_failed_engine_counts_as_alive(code: Code) -> None:
    assert is_alive(RequestError(code, "why").wire(7, "")) is (code is not Code.ENGINE_FAILED)
    assert not is_alive("Stub process 'talk_0_0' is not healthy.")


def test_no_server_is_not_alive() -> None:
    assert set(failures("127.0.0.1:1", timeout=0.5)) == {"server"}


def _bounds(values: Found, name: str) -> list[str]:
    return sorted((value for key, value in values if key == name), key=float)
