"""The GPU benchmark: every engine in a process of its own, into one JSON file, a report and plots.

python -m benchmarks.gpu.run --out benchmarks/results --budget 480
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.bandwidth import bandwidth
from benchmarks.gpu.measurement import LEFT_OUT, Measurement, measurements_in
from benchmarks.gpu.plan import Child, plan
from benchmarks.gpu.report import write_report
from benchmarks.record import ROOT, facts

NAME = "gpu_decode.json"
LEAST_LEFT = 20
"""Seconds of the budget without which no process is started: none could finish."""
WHAT = (
    "Decode steps of randomly weighted Llamas in bfloat16, greedy: "
    "every sequence has `length` cached positions and one new token."
)


def run_child(child: Child, logs: Path, limit: float) -> list[Measurement]:
    """Run one process for at most ``limit`` seconds and return what it measured.

    A measurement that is missing becomes an error. Its output goes to ``<logs>/<name>.out`` and
    ``.err``.
    """
    out, err = logs / f"{child.name}.out", logs / f"{child.name}.err"
    with out.open("w") as stdout, err.open("w") as stderr:
        # a session of its own, so that the compiler processes it starts end with it
        process = subprocess.Popen(
            child.command, stdout=stdout, stderr=stderr, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            problem = None if code == 0 else f"exit status {code}: {_last_line(err)}"
        except subprocess.TimeoutExpired:
            problem = f"ended after {limit:.0f} s"
        finally:
            _end(process)
    try:
        measurements = measurements_in(out.read_text())
    except ValueError as error:
        measurements, problem = [], f"its output is not a measurement: {error}"
    return completed(child, measurements, problem or "it did not print this measurement")


def completed(child: Child, measurements: Sequence[Measurement], problem: str) -> list[Measurement]:
    """What a process measured, and an error for each expected measurement that it did not print."""
    seen = {(measurement.engine, measurement.step) for measurement in measurements}
    lost = [
        replace(expected, error=problem)
        for expected in child.expected
        if (expected.engine, expected.step) not in seen
    ]
    return [*measurements, *lost]


def kept(path: Path, head: dict[str, Any]) -> list[Measurement]:
    """The numbers of an earlier run of the same commit on the same machine.

    Raises:
        ValueError: there is no earlier run, or its commit, machine or versions differ.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path} to resume; run without --resume first")
    earlier = json.loads(path.read_text())
    for key in ("commit", "machine", "versions"):
        if earlier[key] != head[key]:
            raise ValueError(
                f"{path} is of {key} {earlier[key]}, not {head[key]}; run without --resume"
            )
    measurements = [Measurement.of(record) for record in earlier["measurements"]]
    return [measurement for measurement in measurements if measurement.us is not None]


def unmeasured(children: Sequence[Child], measurements: Sequence[Measurement]) -> list[Child]:
    """The processes that should measure something that is not measured yet."""
    seen = {(measurement.engine, measurement.step) for measurement in measurements}
    return [
        child
        for child in children
        if not all((one.engine, one.step) in seen for one in child.expected)
    ]


def run(
    children: Sequence[Child],
    out: Path,
    budget: float,
    head: dict[str, Any],
    measured: Sequence[Measurement] = (),
) -> dict[str, Any]:
    """Run the processes in order until the budget (seconds) is used up.

    The budget may cut the last one short. The record starts with ``measured`` and is written after
    each process, so that nothing is lost when the run is ended.

    Returns:
        The record: the facts, the measurements, the processes with their seconds, and the names of
        those left out.
    """
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    measurements = list(measured)
    processes: list[dict[str, Any]] = []
    record = head | {
        "measurements": [one.record() for one in measurements],
        "processes": processes,
        "left_out": [],
    }
    for index, child in enumerate(children):
        left = budget - (time.monotonic() - begin)
        if left < LEAST_LEFT:
            skipped = children[index:]
            record["left_out"] = [other.name for other in skipped]
            measurements += [
                replace(expected, error=LEFT_OUT)
                for other in skipped
                for expected in other.expected
            ]
            print(f"no time left for {', '.join(record['left_out'])}", flush=True)
        else:
            before = time.monotonic()
            results = run_child(child, logs, min(child.timeout, left))
            seconds = round(time.monotonic() - before, 1)
            measurements += results
            processes.append(
                {
                    "name": child.name,
                    "command": shlex.join(["python", *child.command[1:]]),
                    "seconds": seconds,
                }
            )
            summary = "; ".join(
                f"B{one.rows} {one.kind} {one.error or f'{one.us:.0f} µs'}" for one in results
            )
            print(f"{child.name} ({seconds:.0f} s): {summary}", flush=True)
        record["measurements"] = [measurement.record() for measurement in measurements]
        (out / NAME).write_text(json.dumps(record, indent=1) + "\n")
        if record["left_out"]:
            break
    return record


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and every process it started."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it wrote nothing to stderr"


def main() -> None:
    """Run everything. Exit status 1 where our own engine has no number for a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--budget",
        type=float,
        default=480,
        help="seconds; what does not fit is left out, and listed",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the numbers in --out of the same commit and machine, run the rest",
    )
    parser.add_argument(
        "--only", default="", help="run only the processes whose name contains this"
    )
    given = parser.parse_args()
    options = [
        "--budget",
        f"{given.budget:.0f}",
        *["--resume"] * given.resume,
        *["--only", given.only][: 2 * bool(given.only)],
    ]
    head = facts(WHAT, "python -m benchmarks.gpu.run", options) | {"bandwidth": bandwidth()}
    children = [child for child in plan() if given.only in child.name]
    if not children:
        parser.error(
            f"no process is named like {given.only!r}; "
            f"there are {', '.join(child.name for child in plan())}"
        )
    try:
        measured = kept(given.out / NAME, head) if given.resume else []
    except ValueError as error:
        parser.error(str(error))
    record = run(unmeasured(children, measured), given.out, given.budget, head, measured)
    write_report(record, (given.out / NAME).with_suffix(".md"))
    print(f"{given.out / NAME}\n{(given.out / NAME).with_suffix('.md')}")
    sys.exit(
        any(one["engine"] == "inplace-plugin" and "error" in one for one in record["measurements"])
    )


if __name__ == "__main__":
    main()
