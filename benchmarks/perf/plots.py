"""Plots of what ``python -m benchmarks.perf`` wrote.

``python -m benchmarks.perf.plots benchmarks/results/perf.json`` needs matplotlib, but no server.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Level = dict[str, Any]
STYLES = {"tritonclient": "-", "perf_analyzer": "--"}
COLOURS = ("#0b6e4f", "#c8553d", "#4f6d9b")


@dataclass(frozen=True)
class Panel:
    """One plot of one mode.

    Attributes:
        mode: of `benchmarks.perf`.
        title, across, up: what is shown; the axes' labels.
        lines: by label, where a level holds its value, and what to divide it by.
    """

    mode: str
    title: str
    across: str
    up: str
    lines: dict[str, tuple[tuple[str, ...], float]]


def _times(field: str) -> dict[str, tuple[tuple[str, ...], float]]:
    return {level: ((field, level), 1000.0) for level in ("p50", "p90", "p99")}


PANELS = (
    Panel("unary", "Steps, unary", "live sequences", "latency, ms", _times("latency_us")),
    Panel(
        "unary",
        "Steps, unary",
        "live sequences",
        "requests a second",
        {"answered": (("requests_per_second",), 1.0)},
    ),
    Panel(
        "rate",
        "Steps at a rate",
        "requests a second, asked for",
        "latency, ms",
        _times("latency_us"),
    ),
    Panel(
        "rate",
        "Steps at a rate",
        "requests a second, asked for",
        "answered a second",
        {"answered": (("requests_per_second",), 1.0)},
    ),
    Panel("stream", "Steps over streams", "live sequences", "latency, ms", _times("latency_us")),
    Panel(
        "stream",
        "Steps over streams",
        "live sequences",
        "requests a second",
        {"answered": (("requests_per_second",), 1.0)},
    ),
    Panel("generate", "Generations", "live sequences", "first token, ms", _times("first_token_us")),
    Panel(
        "generate", "Generations", "live sequences", "between tokens, ms", _times("inter_token_us")
    ),
    Panel(
        "generate",
        "Generations",
        "live sequences",
        "tokens a second",
        {"generated": (("tokens_per_second",), 1.0)},
    ),
)


def value(level: Level, where: tuple[str, ...]) -> float | None:
    """The value of a level at this place; None where it failed or has none."""
    current: Any = level
    for name in where:
        current = current.get(name) if isinstance(current, dict) else None
    return current if isinstance(current, int | float) else None


def points(
    levels: Sequence[Level], tool: str, where: tuple[str, ...], divisor: float
) -> list[tuple[float, float]]:
    """A line: the levels of one tool in rising order."""
    points = [(level["level"], value(level, where)) for level in levels if level["tool"] == tool]
    return sorted((at, seen / divisor) for at, seen in points if seen is not None)


def draw_panel(axes: Axes, panel: Panel, levels: Sequence[Level]) -> None:
    """A line for each of the panel's lines and each tool."""
    for (label, (where, divisor)), colour in zip(panel.lines.items(), COLOURS, strict=False):
        for tool, style in STYLES.items():
            if line := points(levels, tool, where, divisor):
                axes.plot(
                    *zip(*line, strict=True), "o" + style, color=colour, label=f"{label}, {tool}"
                )
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.across)
    axes.set_ylabel(panel.up)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _drawn(level: Level) -> bool:
    """Whether it is a number of the model itself, of one instance."""
    return "failed" not in level and "computes" not in level and level.get("instances", 1) == 1


def draw(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write ``perf_<mode>.png`` for each mode that the document holds; returns the files."""
    written = []
    for mode in dict.fromkeys(panel.mode for panel in PANELS):
        levels = [level for level in document["levels"] if level["mode"] == mode and _drawn(level)]
        if not levels:
            continue
        panels = [panel for panel in PANELS if panel.mode == mode]
        figure, grid = plt.subplots(
            1, len(panels), figsize=(4.6 * len(panels), 3.6), layout="constrained", squeeze=False
        )
        for axes, panel in zip(grid[0], panels, strict=True):
            draw_panel(axes, panel, levels)
        model, machine = levels[0]["model"], document["machine"]
        on = machine.get("GPU", "") if model["device"] == "cuda" else machine["processor"]
        figure.suptitle(f"{model['engine']} engine, {model['dtype']}, {on}", fontsize=9)
        path = folder / f"perf_{mode}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def main() -> None:
    """Draw what the file holds, beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    given = parser.parse_args()
    for path in draw(json.loads(given.json.read_text()), given.json.parent):
        print(path)


if __name__ == "__main__":
    main()
