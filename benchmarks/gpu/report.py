"""From measurements to a Markdown report: a row a case, the engines side by side, the targets.

python -m benchmarks.gpu.report benchmarks/results/gpu_decode.json
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.measurement import LEFT_OUT, Measurement
from benchmarks.gpu.shapes import (
    CASES,
    PREFILL_CAPACITY,
    PREFILL_SHAPE,
    PREFILL_TOKENS,
    Case,
    floor_us,
)

OURS = "inplace-plugin"
ENGINES = {
    OURS: "Inplace, plugin",
    "inplace-copy": "Inplace, copied caches",
    "torch.compile": "torch.compile",
    "torch.compile-tuned": "torch.compile, tuned",
    "torch-cuda-graph": "PyTorch, CUDA graph",
    "torch-eager": "PyTorch, eager",
}
"""Engines in the order of the columns, and their headings; unmeasured ones get no column."""
PREFILL = (PREFILL_SHAPE, 1, PREFILL_CAPACITY, 0, PREFILL_TOKENS, "prefill")
"""The step of the prefill, as `Measurement.step` has it."""

Step = tuple[str, int, int, int, int, str]


@dataclass(frozen=True)
class Results:
    """Every measurement, by step and engine; the last one counts, but a failure hides no number.

    Attributes:
        by: measurements by `Measurement.step`, then by engine.
    """

    by: dict[Step, dict[str, Measurement]]

    @classmethod
    def of(cls, measurements: Iterable[Measurement]) -> "Results":
        """Sorted by step and engine."""
        by: dict[Step, dict[str, Measurement]] = {}
        for measurement in measurements:
            engines = by.setdefault(measurement.step, {})
            if measurement.us is not None or measurement.engine not in engines:
                engines[measurement.engine] = measurement
        return cls(by)

    def at(self, case: Case) -> dict[str, Measurement]:
        """The measurements of this case by engine."""
        return self.by.get(step_of(case), {})

    def ours(self, case: Case) -> float | None:
        """Microseconds of our engine, None where there is no number."""
        measurement = self.at(case).get(OURS)
        return None if measurement is None else measurement.us


def step_of(case: Case) -> Step:
    """The case as `Measurement.step` has it."""
    return case.shape, case.rows, case.capacity, case.length, case.rows, "decode"


@dataclass(frozen=True)
class Target:
    """A limit in microseconds and whether it is met; None if it cannot be determined."""

    limit: float | None
    met: bool | None

    def __str__(self) -> str:
        if self.limit is None:
            return "–"
        word = {True: "met", False: "**not met**", None: "not measured"}[self.met]
        return f"{self.limit:.0f}: {word}"


def must(case: Case, results: Results) -> Target:
    """The limit of this case; a relative one needs the case it is compared with measured."""
    limit = case.must_us
    if case.within is not None:
        other, percent = case.within
        reference = results.ours(other)
        limit = None if reference is None else reference * (1 + percent / 100)
    return _target(limit, results.ours(case))


def aim(case: Case, results: Results) -> Target:
    """The limit hoped for."""
    return _target(case.aim_us, results.ours(case))


def _target(limit: float | None, us: float | None) -> Target:
    return Target(limit, None if limit is None or us is None else us <= limit)


def write_report(record: dict[str, Any], path: Path) -> None:
    """Write the report of a ``gpu_decode.json``.

    Raises:
        ValueError: the record holds something that is not a measurement.
    """
    path.write_text(report(record))


def report(record: dict[str, Any]) -> str:
    """The report as Markdown text. Raises as `write_report`."""
    measurements = [Measurement.of(one) for one in record["measurements"]]
    results = Results.of(measurements)
    machine, versions, bandwidth = record["machine"], record["versions"], record["bandwidth"]
    parts = [
        "# Step times on a GPU",
        f"{record['what']} Microseconds a step, median ({_repeats(measurements)}); in brackets, "
        "times the floor. The floor is the time to read the weights and the cached positions once "
        f"at {bandwidth / 1e12:.2f} TB/s, which a copy on this GPU reaches. The columns must and "
        "aim are targets that `benchmarks/gpu/shapes.py` sets, and whether they are met.",
        f"{record['date']}, commit {record['commit']}, `{record['command']}`  \n"
        + ", ".join(f"{key} {value}" for key, value in machine.items())
        + "  \n"
        + ", ".join(f"{key} {value}" for key, value in versions.items()),
        "## Decode",
        decode_table(results, bandwidth),
    ]
    if PREFILL in results.by:
        parts += [
            f"## Prefill, {PREFILL_TOKENS} tokens of one sequence",
            prefill_table(results, bandwidth),
        ]
    if notes := [
        f"- {_where(measurement)}: {measurement.notes}"
        for measurement in measurements
        if measurement.notes
    ]:
        parts += ["## Notes", "\n".join(notes)]
    if failed := [
        f"- {_where(measurement)}: {measurement.error}"
        for measurement in measurements
        if measurement.error
    ]:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def decode_table(results: Results, bandwidth: float) -> str:
    """The decode cases, one a row; floors at so many bytes a second."""
    engines = _engines(results, (step_of(case) for case in CASES))
    lines = [["case", *(ENGINES[engine] for engine in engines), "floor", "must", "aim"]]
    for case in CASES:
        floor = floor_us(case.shape, case.rows * (case.length + 1), bandwidth)
        cells = [_cell(results.at(case).get(engine), floor) for engine in engines]
        lines.append(
            [
                f"{case.name}, length {case.length}",
                *cells,
                f"{floor:.0f}",
                str(must(case, results)),
                str(aim(case, results)),
            ]
        )
    return _table(lines)


def prefill_table(results: Results, bandwidth: float) -> str:
    """The prefill, beside its floor (which counts memory only, not arithmetic)."""
    engines, floor = (
        _engines(results, [PREFILL]),
        floor_us(PREFILL_SHAPE, PREFILL_TOKENS, bandwidth),
    )
    cells = [_cell(results.by[PREFILL].get(engine), floor) for engine in engines]
    return _table(
        [
            ["case", *(ENGINES[engine] for engine in engines), "floor"],
            [f"{PREFILL_SHAPE} c{PREFILL_CAPACITY}", *cells, f"{floor:.0f}"],
        ]
    )


def _engines(results: Results, steps: Iterable[Step]) -> list[str]:
    seen = {engine for step in steps for engine in results.by.get(step, {})}
    return [engine for engine in ENGINES if engine == OURS or engine in seen]


def _cell(measurement: Measurement | None, floor: float) -> str:
    if measurement is None:
        return "–"
    if measurement.us is None:
        return "left out" if measurement.error == LEFT_OUT else "failed"
    return f"{measurement.us:.0f} ({measurement.us / floor:.2f})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _where(measurement: Measurement) -> str:
    return (
        f"{measurement.engine}, {measurement.kind}, {measurement.shape} B{measurement.rows} "
        f"c{measurement.capacity}, length {measurement.length}"
    )


def _repeats(measurements: Iterable[Measurement]) -> str:
    counts = sorted(
        {measurement.repeats for measurement in measurements if measurement.repeats is not None}
    )
    return "of " + " or ".join(map(str, counts)) + " repeats" if counts else "none measured"


def main() -> None:
    """Write the report beside the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    path: Path = parser.parse_args().json
    write_report(json.loads(path.read_text()), path.with_suffix(".md"))


if __name__ == "__main__":
    main()
