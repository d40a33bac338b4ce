"""The processes of the GPU benchmark, in order, and what each is expected to print."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.baseline import described
from benchmarks.gpu.measurement import Measurement
from benchmarks.gpu.shapes import (
    CASES,
    LENGTHS,
    PREFILL_CAPACITY,
    PREFILL_SHAPE,
    PREFILL_TOKENS,
    Case,
)

ENGINE_TIMEOUT, BASELINE_TIMEOUT = 150, 120


@dataclass(frozen=True)
class Child:
    """One process of the benchmark.

    Attributes:
        name: of its log file.
        command: what is run.
        timeout: seconds after which it is ended.
        expected: what it should measure; each carries the error to record where it does not.
    """

    name: str
    command: tuple[str, ...]
    timeout: int
    expected: tuple[Measurement, ...]


def plan() -> list[Child]:
    """Our engines, then the comparison of each case, then tuned ones where a step has one row."""
    return [
        *_ours("plugin", (*CASES, *LENGTHS)),
        *(_peer(case, "torch_compile") for case in CASES),
        _baseline(
            "torch_compile-prefill",
            PREFILL_SHAPE,
            1,
            PREFILL_CAPACITY,
            PREFILL_TOKENS,
            "prefill_compile",
        ),
        *_ours("copy", CASES),
        *(
            _peer(case, "torch_compile_tuned")
            for case in CASES
            if case.rows == 1 and case.within is None
        ),
        *(_peer(case, "torch_compile") for case in LENGTHS),
        *(_peer(case, "torch_graph") for case in CASES if case.must_us is not None),
    ]


def _ours(alias: str, all_cases: Sequence[Case]) -> list[Child]:
    """One process for each shape and capacity, with all of its steps.

    The plugin engine of one of them also times the prefill.
    """
    groups: dict[tuple[str, int, int], list[Case]] = {}
    for case in all_cases:
        # an engine of the kind copy steps all of its slots, so each number of rows is one engine
        groups.setdefault(
            (case.shape, case.capacity, case.rows if alias == "copy" else 0), []
        ).append(case)
    children = []
    for (shape, capacity, _), cases in groups.items():
        prefill = alias == "plugin" and (shape, capacity) == (PREFILL_SHAPE, PREFILL_CAPACITY)
        steps = ",".join(f"{case.rows}x{case.length}" for case in cases)
        command = [
            *_module("engine"),
            "--shape",
            shape,
            "--alias",
            alias,
            "--capacity",
            str(capacity),
            "--cases",
            steps,
        ]
        command += ["--prefill", str(PREFILL_TOKENS)] if prefill else []
        expected = [
            _missing(
                f"inplace-{alias}", shape, case.rows, capacity, case.length, case.rows, "decode"
            )
            for case in cases
        ]
        if prefill:
            expected.append(
                _missing(f"inplace-{alias}", shape, 1, capacity, 0, PREFILL_TOKENS, "prefill")
            )
        rows = ",".join(str(count) for count in sorted({case.rows for case in cases}))
        children.append(
            Child(
                f"inplace_{alias}-{shape}-c{capacity}-B{rows}",
                tuple(command),
                ENGINE_TIMEOUT,
                tuple(expected),
            )
        )
    return children


def _peer(case: Case, engine: str) -> Child:
    return _baseline(
        f"{engine}-{case.shape}-B{case.rows}-c{case.capacity}-n{case.length}",
        case.shape,
        case.rows,
        case.capacity,
        case.length,
        engine,
    )


def _baseline(name: str, shape: str, rows: int, capacity: int, length: int, engine: str) -> Child:
    command = [
        *_module("baseline"),
        "--shape",
        shape,
        "--rows",
        str(rows),
        "--capacity",
        str(capacity),
        "--length",
        str(length),
    ]
    return Child(
        name,
        (*command, "--engine", engine),
        BASELINE_TIMEOUT,
        (described(shape, rows, capacity, length, engine),),
    )


def _module(name: str) -> tuple[str, ...]:
    return sys.executable, "-m", f"benchmarks.gpu.{name}"


def _missing(
    engine: str, shape: str, rows: int, capacity: int, length: int, tokens: int, kind: str
) -> Measurement:
    return Measurement(engine, shape, rows, capacity, length, tokens, kind, error="not run")
