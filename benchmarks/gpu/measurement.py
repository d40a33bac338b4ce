"""One measured step, as the benchmark processes print it: a JSON object on a line."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

REQUIRED = ("engine", "shape", "rows", "capacity", "length", "tokens", "kind")
KINDS = ("decode", "prefill")
LEFT_OUT = "left out: no time left"
"""The error of what was not tried, so that a report can tell it from a failure."""


@dataclass(frozen=True)
class Measurement:
    """A step time, or the reason why there is none.

    Attributes:
        engine: ``inplace-plugin``, ``inplace-copy``, ``torch.compile``, …
        shape: key of `benchmarks.gpu.shapes.SHAPES`.
        rows: sequences in the step.
        capacity: positions a sequence may hold.
        length: cached positions of each sequence before the step.
        tokens: new tokens of the step, all rows together.
        kind: ``decode`` (one token a row) or ``prefill``.
        us: microseconds a step, the median of the repeats.
        us_min: the fastest repeat.
        repeats: number of repeats, each of many steps.
        weight_bytes: bytes of weights a step reads.
        cache_bytes_read: bytes of cached keys and values a step must read.
        memory: bytes by what they hold.
        build_s: seconds from the model to an engine that can run (compilation, warm-up).
        notes: what a reader of the number should know.
        error: why there is no number; then `us` is None.
    """

    engine: str
    shape: str
    rows: int
    capacity: int
    length: int
    tokens: int
    kind: str
    us: float | None = None
    us_min: float | None = None
    repeats: int | None = None
    weight_bytes: int | None = None
    cache_bytes_read: int | None = None
    memory: dict[str, int] | None = None
    build_s: float | None = None
    notes: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless there is exactly one of a positive, finite time and an error."""
        if self.kind not in KINDS:
            raise ValueError(
                f"a measurement of {self.engine} has kind {self.kind!r}; "
                f"expected one of {', '.join(KINDS)}"
            )
        if (self.us is None) == (self.error is None):
            raise ValueError(
                f"a measurement of {self.engine} needs either 'us' or 'error', "
                f"got us={self.us} and error={self.error!r}"
            )
        if self.us is not None and not (math.isfinite(self.us) and self.us > 0):
            raise ValueError(
                f"a measurement of {self.engine} has {self.us} µs a step; expected a time above 0"
            )

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """From a decoded JSON object.

        Raises:
            ValueError: a field is missing or unknown, or the values make no measurement.
        """
        if missing := [name for name in REQUIRED if name not in record]:
            raise ValueError(f"a measurement lacks {', '.join(missing)}: {record}")
        if unknown := sorted(set(record) - {field.name for field in fields(cls)}):
            raise ValueError(f"a measurement has unknown fields {', '.join(unknown)}")
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """The JSON object, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def step(self) -> tuple[str, int, int, int, int, str]:
        """What was run, whatever ran it: shape, rows, capacity, length, tokens, kind."""
        return self.shape, self.rows, self.capacity, self.length, self.tokens, self.kind


def measurements_in(output: str) -> list[Measurement]:
    """The measurements in what a process printed; other lines are skipped.

    Raises:
        ValueError: a JSON object with an ``engine`` is not a measurement.
    """
    measurements = []
    for line in output.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "engine" in record:
            measurements.append(Measurement.of(record))
    return measurements
