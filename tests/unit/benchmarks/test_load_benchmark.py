"""The load benchmark without a server: inputs, percentiles, perf_analyzer, plots."""

import json
from pathlib import Path

import pytest

from benchmarks.perf import analyzer
from benchmarks.perf.clients import Load, Measured
from benchmarks.perf.generator import described, percentiles
from benchmarks.perf.nothing import write_nothing
from benchmarks.perf.plots import draw, points
from benchmarks.perf.server import Counters

PERF = Path(analyzer.__file__).parent


@pytest.mark.parametrize(("name", "sequences", "requests"), [("steps", 4, 128), ("generate", 8, 1)])
def test_an_inner_list_of_an_input_file_is_a_sequence(
    name: str, sequences: int, requests: int
) -> None:
    data = json.loads((PERF / f"{name}.json").read_text())["data"]
    assert [len(sequence) for sequence in data] == [requests] * sequences
    for item in (item for sequence in data for item in sequence):
        assert set(item) == {"input_ids"}
        assert item["input_ids"]["shape"] == [len(item["input_ids"]["content"])]


def test_a_percentile_is_a_value_that_was_measured() -> None:
    result = percentiles([number / 1e6 for number in range(1, 101)])
    assert {name: round(value, 6) for name, value in result.items()} == {
        "mean": 50.5,
        "p50": 50,
        "p90": 90,
        "p99": 99,
    }
    assert percentiles([3e-6])["p99"] == pytest.approx(3)
    assert percentiles([]) == {}


def test_the_clients_together_are_one_measurement() -> None:
    parts = [
        Measured([1.0, 3.0], [0.5], [0.1, 0.1], 3),
        Measured([2.0], [0.7], [0.3], 2, refused=1, error="INPLACE-CAPACITY …"),
    ]
    result = described(parts, seconds=2.0)
    assert result["requests_per_second"] == 1.5
    assert result["tokens_per_second"] == 2.5
    assert result["latency_us"]["p50"] == pytest.approx(2e6)
    assert result["first_token_us"]["p99"] == pytest.approx(0.7e6)
    assert result["inter_token_us"]["p50"] == pytest.approx(0.1e6)
    assert (result["refused"], result["first_error"]) == (1, "INPLACE-CAPACITY …")


def test_perf_analyzer_is_asked_for_the_same_load() -> None:
    load = Load("host:8001", "m", "unary", 8, 0.0, 5.0, "steps.json")
    assert " ".join(analyzer.command(load)).startswith(
        "perf_analyzer -m m -u host:8001 -i grpc --input-data=steps.json"
    )
    assert analyzer.command(load)[-2:] == ["--concurrency-range", "8"]
    rate = analyzer.command(Load("host:8001", "m", "unary", 8, 0.0, 5.0, "steps.json", rate=40.0))
    assert rate[-4:] == ["--request-rate-range", "40.0", "--num-of-sequences", "8"]
    generate = analyzer.command(
        Load("host:8001", "m", "generate", 2, 0.0, 5.0, "generate.json", max_tokens=7)
    )
    assert "--streaming" in generate
    assert "max_tokens:7:int" in generate


def test_an_export_of_perf_analyzer_is_read_within_its_windows() -> None:
    second = 10**9
    export = {
        "window_boundaries": [second, 3 * second],
        "requests": [
            {
                "timestamp": second,
                "response_timestamps": [second + 200, second + 300, second + 500],
            },
            {"timestamp": 2 * second, "response_timestamps": [4 * second]},  # answered too late
            {"timestamp": 2 * second, "response_timestamps": []},
        ],
    }
    [result], seconds = analyzer.measured(export)
    assert seconds == 2.0
    assert result.latencies == [5e-7]
    assert result.first == [2e-7]
    assert result.gaps == [1e-7, 2e-7]
    assert result.tokens == 3


def test_what_a_request_costs_beyond_the_engine() -> None:
    spent = Counters(
        requests=100,
        executions=50,
        queue_ns=100_000,
        execute_ns=10_000_000,
        steps=50,
        engine_s=0.002,
    )
    result = spent.breakdown(seconds=0.01)
    assert result["wall_us_per_request"] == pytest.approx(100)
    assert result["beyond_engine_us_per_request"] == pytest.approx(80)
    assert result["engine_busy"] == pytest.approx(0.2)
    assert result["requests_per_step"] == 2
    twice = spent.breakdown(seconds=0.01, instances=2)  # side by side, each 1 ms in its engine
    assert twice["engine_busy"] == pytest.approx(0.1)
    assert twice["beyond_engine_us_per_request"] == pytest.approx(90)
    parts = spent.latency(150.0)
    assert sum(parts.values()) == pytest.approx(150)
    assert parts["engine"] == pytest.approx(40)
    assert parts["backend_beyond_engine"] == pytest.approx(60)


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_model_that_computes_nothing_has_the_configuration_of_the_other(
    tmp_path: Path, decoupled: bool
) -> None:
    write_nothing(
        tmp_path / "model", 'name: "model"\nbackend: "inplace"\n', "next_token", decoupled=decoupled
    )
    assert (tmp_path / "model" / "config.pbtxt").read_text() == 'name: "model"\nbackend: "python"\n'
    source = (tmp_path / "model" / "1" / "model.py").read_text()
    compile(source, "model.py", "exec")
    assert f"if {decoupled}:" in source and 'Tensor("next_token"' in source


def test_a_level_that_failed_is_not_drawn(tmp_path: Path) -> None:
    model = {"engine": "torch", "dtype": "float32", "device": "cpu"}
    good = {
        "mode": "unary",
        "level": 2.0,
        "tool": "tritonclient",
        "model": model,
        "requests_per_second": 5.0,
        "latency_us": {"p50": 7000.0},
    }
    others = [good | {"level": 2.0, "instances": 2}, good | {"level": 2.0, "computes": "nothing"}]
    levels = [
        good,
        good | {"level": 1.0},
        {"mode": "rate", "level": 3.0, "tool": "perf_analyzer", "model": model, "failed": "why"},
    ]
    assert points(levels, "tritonclient", ("latency_us", "p50"), 1000.0) == [(1.0, 7.0), (2.0, 7.0)]
    [path] = draw({"levels": levels + others, "machine": {"processor": "a CPU"}}, tmp_path)
    assert path.name == "perf_unary.png"
    assert path.read_bytes().startswith(b"\x89PNG")
