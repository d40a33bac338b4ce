"""The GPU benchmark's records: output of its processes, their failures, and the report."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.baseline import Decoder, Prefill, described
from benchmarks.gpu.measurement import LEFT_OUT, Measurement, measurements_in
from benchmarks.gpu.plan import Child, plan
from benchmarks.gpu.plots import AXES, draw, panels
from benchmarks.gpu.report import Results, aim, must, report
from benchmarks.gpu.run import kept, run, run_child, unmeasured
from benchmarks.gpu.shapes import (
    CASES,
    LENGTHS,
    SHAPES,
    Case,
    cache_bytes,
    floor_us,
    random_weights,
    weight_bytes,
)

BANDWIDTH = 3.02e12


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return random_weights(config, torch.float32, "cpu")


def measured(case: Case, engine: str, us: float) -> Measurement:
    return Measurement(
        engine,
        case.shape,
        case.rows,
        case.capacity,
        case.length,
        case.rows,
        "decode",
        us=us,
        us_min=us,
        repeats=5,
    )


def record(measurements: list[Measurement]) -> dict[str, Any]:
    facts = {
        "what": "Steps.",
        "date": "today",
        "command": "run",
        "commit": "abc",
        "machine": {"GPU": "G"},
        "bandwidth": BANDWIDTH,
        "versions": {"torch": "2"},
    }
    return facts | {"measurements": [one.record() for one in measurements]}


def child(code: str, timeout: int = 60) -> Child:
    return Child(
        "child",
        (sys.executable, "-c", code),
        timeout,
        (described("1b", 8, 4096, 600, "torch_compile"),),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_bytes_are_those_of_the_model(shape: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPES[shape])
    read = [each.numel() for each in model.parameters()]
    if not SHAPES[shape].tie_word_embeddings:
        read.remove(model.model.embed_tokens.weight.numel())
    assert weight_bytes(shape) == 2 * sum(read)


def test_the_floor_counts_weights_once_and_each_cached_position() -> None:
    assert cache_bytes("135m", 10) == 10 * 30 * 3 * 64 * 2 * 2
    assert floor_us("1b", 0, BANDWIDTH) == pytest.approx(818, abs=1)
    assert floor_us("1b", 1000, BANDWIDTH) - floor_us("1b", 0, BANDWIDTH) == pytest.approx(
        cache_bytes("1b", 1000) / 3.02e6
    )


def test_random_weights_are_the_same_each_time_tied_and_run() -> None:
    one, other = tiny(), tiny()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert one.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(96**-0.5, rel=0.1)
    fresh = LlamaForCausalLM(one.config)
    fresh.load_state_dict(one.state_dict())
    ids = torch.arange(12).view(1, -1)
    assert torch.equal(
        fresh(ids).logits, one(ids).logits
    )  # the rotary frequencies, which no state dict holds, are right too


@torch.no_grad()
def test_the_peer_decodes_what_the_model_says_with_a_cache_of_another_kind() -> None:
    torch.manual_seed(0)
    model = tiny()
    peer = Decoder(model, rows=3, capacity=160, length=20)
    cache, token, expected = DynamicCache(config=model.config), peer.token.clone(), []
    for index, layer in enumerate(peer.cache.layers):
        cache.update(layer.keys[:, :, :20].clone(), layer.values[:, :, :20].clone(), index)
    for _ in range(6):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        expected.append(token.flatten().tolist())
    address = peer.token.data_ptr()
    step, generated = torch.compile(peer.step, backend="eager", fullgraph=True, dynamic=False), []
    for _ in range(6):
        step()
        generated.append(peer.token.flatten().tolist())
    assert generated == expected
    assert peer.token.data_ptr() == address
    assert [int(layer.cumulative_length) for layer in peer.cache.layers] == [26, 26]
    peer.rewind()
    assert [int(layer.cumulative_length) for layer in peer.cache.layers] == [20, 20]


@torch.no_grad()
def test_the_peer_prefills_causally_from_an_empty_cache_every_time() -> None:
    torch.manual_seed(1)
    model = tiny()
    model.set_attn_implementation("eager")
    prompt = torch.randint(0, 256, (1, 32))
    expected = model(input_ids=prompt).logits[:, -1:].argmax(-1)
    peer = Prefill(model, capacity=64, tokens=32)
    peer.prompt.copy_(prompt)
    step = torch.compile(peer.step, backend="eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        peer.token.fill_(-1)
        step()
        assert torch.equal(peer.token, expected)


def test_a_peer_without_room_for_its_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="100 steps from length 600 do not fit a capacity of 640"):
        Decoder(tiny(), rows=1, capacity=640, length=600)


def test_measurements_survive_json_between_other_output() -> None:
    one = measured(CASES[0], "inplace-plugin", 300.0)
    assert measurements_in(f'building\n{json.dumps(one.record())}\n{{"other": 1}}\n[1]\n') == [one]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"us": None}, "needs either 'us' or 'error'"),
        ({"error": "too"}, "needs either 'us' or 'error'"),
        ({"us": float("nan")}, "expected a time above 0"),
        ({"kind": "both"}, "expected one of decode, prefill"),
        ({"speed": 1}, "unknown fields speed"),
    ],
)
def test_what_is_no_measurement_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Measurement.of(measured(CASES[0], "inplace-plugin", 300.0).record() | change)


def test_every_case_is_planned_for_ours_and_the_peer_and_each_process_once() -> None:
    children = plan()
    expected = [(one.engine, one.step) for planned in children for one in planned.expected]
    for case in CASES:
        for engine in ("inplace-plugin", "inplace-copy", "torch.compile"):
            assert (engine, measured(case, engine, 1.0).step) in expected
    for case in LENGTHS:
        for engine in ("inplace-plugin", "torch.compile"):
            assert (engine, measured(case, engine, 1.0).step) in expected
    assert len(set(expected)) == len(expected)
    assert len({planned.name for planned in children}) == len(children)
    assert [one.engine for one in children[0].expected] == [
        "inplace-plugin"
    ] * 2  # ours first: the budget may end the rest


def test_a_process_that_measures_is_recorded(tmp_path: Path) -> None:
    done = replace(described("1b", 8, 4096, 600, "torch_compile"), us=2000.0, error=None)
    assert run_child(child(f"print({json.dumps(done.record())!r})"), tmp_path, 60) == [done]


@pytest.mark.parametrize(
    ("code", "limit", "error"),
    [
        ("raise RuntimeError('out of memory')", 60, "exit status 1: RuntimeError: out of memory"),
        ("import time; time.sleep(60)", 1, "ended after 1 s"),
        ("print('nothing')", 60, "it did not print this measurement"),
        ("print('{\"engine\": 1}')", 60, "its output is not a measurement"),
    ],
)
def test_a_process_that_fails_is_recorded_with_its_reason(
    tmp_path: Path, code: str, limit: float, error: str
) -> None:
    (result,) = run_child(child(code), tmp_path, limit)
    assert result.us is None
    assert error in str(result.error)


def test_a_process_that_is_ended_takes_along_what_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); "
        "sys.stdin.read(); import time; time.sleep(600)"
    )
    run_child(child(code), tmp_path, 2)
    pid = (tmp_path / "child.out").read_text().strip()
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True, check=False
    ).stdout.strip()
    assert state == "" or state.startswith("Z")


def test_a_failure_does_not_stop_the_run_and_what_has_no_time_is_named(tmp_path: Path) -> None:
    broken = child("raise RuntimeError('no')")
    later = replace(child("print()"), name="later")
    both = run([broken, later], tmp_path, 100, {})
    assert [process["name"] for process in both["processes"]] == ["child", "later"]
    none = run([broken, later], tmp_path, 0, {})
    assert none["left_out"] == ["child", "later"]
    assert [
        result["error"]
        for result in json.loads((tmp_path / "gpu_decode.json").read_text())["measurements"]
    ] == ["left out: no time left"] * 2


def test_a_run_is_resumed_only_where_commit_and_machine_are_the_same(tmp_path: Path) -> None:
    done = replace(described("1b", 8, 4096, 600, "torch_compile"), us=2000.0, error=None)
    other = replace(
        child("print()"), name="other", expected=(described("1b", 1, 1024, 600, "torch_compile"),)
    )
    both = [child(f"print({json.dumps(done.record())!r})"), other]
    facts = record([])
    run(both, tmp_path, 100, facts)
    before = kept(tmp_path / "gpu_decode.json", facts)
    assert before == [done]  # the failure of the other is tried again
    assert unmeasured(both, before) == [other]
    assert run([], tmp_path, 100, facts, before)["measurements"] == [done.record()]
    assert [
        result["engine"] for result in run([other], tmp_path, 100, facts, before)["measurements"]
    ] == ["torch.compile"] * 2
    with pytest.raises(ValueError, match="is of commit abc, not def"):
        kept(tmp_path / "gpu_decode.json", facts | {"commit": "def"})
    with pytest.raises(ValueError, match="run without --resume first"):
        kept(tmp_path / "none.json", facts)


def test_targets_are_met_up_to_their_limit_and_relative_ones_follow_the_other_case() -> None:
    first, long = CASES[0], next(case for case in CASES if case.within is not None)
    assert long.within is not None
    reference = long.within[0]
    results = Results.of(
        [measured(first, "inplace-plugin", 650.0), measured(first, "torch.compile", 10.0)]
    )
    assert (must(first, results).met, aim(first, results).met) == (True, False)
    assert must(Case("1b", 8, 4096, must_us=1350), results).met is None
    assert must(long, results).limit is None
    for us, met in ((1050.0, True), (1051.0, False)):
        both = Results.of(
            [measured(reference, "inplace-plugin", 1000.0), measured(long, "inplace-plugin", us)]
        )
        assert must(long, both).met is met


def test_the_report_shows_times_failures_and_targets() -> None:
    case = CASES[3]
    failed = replace(measured(CASES[4], "torch.compile", 1.0), us=None, error="out of memory")
    again = replace(
        measured(case, "torch.compile", 1.0), us=None, error=LEFT_OUT
    )  # hides no number
    left = replace(again, shape="135m", rows=1, tokens=1, capacity=1024)
    times = [measured(case, "inplace-plugin", 1400.0), measured(case, "torch.compile", 8000.0)]
    text = report(record([*times, failed, again, left]))
    assert "| – | left out |" in text
    assert "| – | failed |" in text
    line = next(line for line in text.splitlines() if line.startswith(f"| {case.name}"))
    floor = floor_us("1b", 8 * 601, BANDWIDTH)
    assert line.split(" | ")[1:3] == [f"1400 ({1400 / floor:.2f})", f"8000 ({8000 / floor:.2f})"]
    assert "1350: **not met**" in line
    assert "1b B64 c1024, length 600: out of memory" in text
    assert "copied caches" not in text  # no measurement, no column


def test_plots_have_one_panel_for_each_quantity_that_varies(tmp_path: Path) -> None:
    one = [measured(Case("1b", rows, 1024), "inplace-plugin", 1000.0 + rows) for rows in (64, 1, 8)]
    (panel,) = panels(one, AXES[2])
    assert [result.rows for result in panel.lines["inplace-plugin"]] == [1, 8, 64]
    assert panels(one, AXES[0]) == []
    files = draw([*one, measured(CASES[0], "torch.compile", 1500.0)], BANDWIDTH, tmp_path)
    assert [path.name for path in files] == ["gpu_cases.png", "gpu_by_rows.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
