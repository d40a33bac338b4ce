"""Plots of a ``gpu_decode.json``: the cases, and step time by capacity, length and rows.

    python -m benchmarks.gpu.plots benchmarks/results/gpu_decode.json

Runs anywhere; needs matplotlib, no GPU.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.gpu.measurement import Measurement
from benchmarks.gpu.report import ENGINES, OURS, Results
from benchmarks.gpu.shapes import CASES, floor_us

COLOURS = dict(
    zip(ENGINES, ("#0b6e4f", "#6fb98f", "#c8553d", "#e9a178", "#4f6d9b", "#a3a9b5"), strict=True)
)
DPI = 150


@dataclass(frozen=True)
class Axis:
    """A quantity to plot step times against.

    Attributes:
        field: of `Measurement`.
        label: of the horizontal axis.
    """

    field: str
    label: str


AXES = (
    Axis("capacity", "capacity (positions a sequence may hold)"),
    Axis("length", "cached length (positions a sequence holds)"),
    Axis("rows", "rows (sequences in the step)"),
)


@dataclass(frozen=True)
class Panel:
    """One plot: what is equal in all its points, and the points of every engine.

    Attributes:
        title: what is equal.
        lines: by engine, its measurements in the order of the axis.
    """

    title: str
    lines: dict[str, list[Measurement]]

    @property
    def points(self) -> list[Measurement]:
        """The measurements of all engines."""
        return [measurement for line in self.lines.values() for measurement in line]


def panels(measurements: Sequence[Measurement], axis: Axis) -> list[Panel]:
    """Decode measurements that differ only along this axis, at least two of one engine."""
    others = [other.field for other in AXES if other is not axis]
    groups: dict[tuple[str, ...], dict[str, dict[int, Measurement]]] = {}
    for measurement in measurements:
        if (
            measurement.kind == "decode"
            and measurement.us is not None
            and measurement.engine in ENGINES
        ):
            key = (
                measurement.shape,
                *(f"{other} {getattr(measurement, other)}" for other in others),
            )
            groups.setdefault(key, {}).setdefault(measurement.engine, {})[
                getattr(measurement, axis.field)
            ] = measurement
    made = []
    for key, engines in groups.items():
        if max(map(len, engines.values())) > 1:
            lines = {
                engine: [engines[engine][at] for at in sorted(engines[engine])]
                for engine in ENGINES
                if engine in engines
            }
            made.append(Panel(", ".join(key), lines))
    return made


def draw_panel(axes: Axes, panel: Panel, axis: Axis, bandwidth: float) -> None:
    """A line an engine, the floor, microseconds from zero."""
    for engine, line in panel.lines.items():
        at, times = (
            [getattr(measurement, axis.field) for measurement in line],
            [measurement.us or 0.0 for measurement in line],
        )
        axes.plot(
            at,
            times,
            "o-",
            color=COLOURS[engine],
            label=ENGINES[engine],
            linewidth=2.2 if engine == OURS else 1.4,
        )
    floors = {
        getattr(measurement, axis.field): floor_us(
            measurement.shape, measurement.rows * (measurement.length + 1), bandwidth
        )
        for measurement in panel.points
    }
    axes.plot(
        sorted(floors),
        [floors[at] for at in sorted(floors)],
        label="floor",
        color="black",
        linestyle=":",
        linewidth=1.2,
    )
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(axis.label)
    axes.set_ylabel("step, µs")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(floors), [str(at) for at in sorted(floors)])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def draw_cases(results: Results, bandwidth: float) -> Figure | None:
    """Bars of every case and engine, each case on its own scale; None if none is measured."""
    cases = [
        case
        for case in CASES
        if any(measurement.us is not None for measurement in results.at(case).values())
    ]
    engines = [engine for engine in ENGINES if any(engine in results.at(case) for case in cases)]
    if not cases:
        return None
    figure, grid = plt.subplots(
        1, len(cases), figsize=(2.4 * len(cases), 4.0), layout="constrained", squeeze=False
    )
    for axes, case in zip(grid[0], cases, strict=True):
        times = {
            engine: measurement.us
            for engine in engines
            if (measurement := results.at(case).get(engine)) is not None
            and measurement.us is not None
        }
        bars = axes.bar(
            [engines.index(engine) for engine in times],
            list(times.values()),
            color=[COLOURS[engine] for engine in times],
        )
        axes.bar_label(bars, [f"{us:.0f}" for us in times.values()], fontsize=7)
        axes.axhline(
            floor_us(case.shape, case.rows * (case.length + 1), bandwidth),
            color="black",
            linestyle=":",
            linewidth=1.2,
        )
        axes.set_xlim(-0.6, len(engines) - 0.4)
        axes.set_xticks([])
        axes.set_title(case.name, fontsize=10)
    grid[0][0].set_ylabel("decode step, µs")
    handles: list[Artist] = [
        Patch(color=COLOURS[engine], label=ENGINES[engine]) for engine in engines
    ]
    handles.append(Line2D([], [], color="black", linestyle=":", label="floor"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def draw(measurements: Sequence[Measurement], bandwidth: float, folder: Path) -> list[Path]:
    """Write a PNG of the cases and one for each axis with measurements; returns the files.

    Floors are drawn for ``bandwidth`` bytes a second.
    """
    written = []
    if (figure := draw_cases(Results.of(measurements), bandwidth)) is not None:
        written.append(_saved(figure, folder / "gpu_cases.png"))
    for axis in AXES:
        if shown := panels(measurements, axis):
            figure, grid = plt.subplots(
                1, len(shown), figsize=(5.2 * len(shown), 4.0), layout="constrained", squeeze=False
            )
            for axes, panel in zip(grid[0], shown, strict=True):
                draw_panel(axes, panel, axis, bandwidth)
            written.append(_saved(figure, folder / f"gpu_by_{axis.field}.png"))
    return written


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def main() -> None:
    """Draw what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument(
        "--out", type=Path, help="folder of the plots; beside the file unless given"
    )
    given = parser.parse_args()
    record = json.loads(given.json.read_text())
    measurements = [Measurement.of(one) for one in record["measurements"]]
    for path in draw(measurements, record["bandwidth"], given.out or given.json.parent):
        print(path)


if __name__ == "__main__":
    main()
