"""Plots of what ``python -m benchmarks.generate`` wrote.

``python -m benchmarks.generation.plots gpu_generate_135m.json`` needs matplotlib, but no server.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.perf.plots import value

SIDES = {
    "served": ("Inplace, served", "#0b6e4f"),
    "engine_alone": ("its engine alone", "#6fb98f"),
    "transformers": ("transformers", "#c8553d"),
}
PANELS: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("Throughput", "tokens a second", ("tokens_per_second",), 1.0),
    ("First token", "ms", ("first_token_us",), 1e3),
    ("Between tokens", "ms", ("inter_token_us",), 1e3),
)


def draw_panel(
    axes: Axes, lines: list[dict[str, Any]], where: tuple[str, ...], divisor: float
) -> None:
    """A line for each side that was measured; for times the median, and p99 dashed."""
    for side, (label, colour) in SIDES.items():
        for level, style in (("p50", "-"), ("p99", "--")) if divisor > 1 else (("", "-"),):
            place = (side, *where, level) if level else (side, *where)
            points = [
                (line["streams"], seen / divisor)
                for line in lines
                if (seen := value(line, place)) is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    "o" + style,
                    color=colour,
                    label=f"{label}, {level}" if level else label,
                )
    axes.set_xlabel("streams at once")
    axes.set_xscale("log", base=2)
    axes.set_xticks(streams := [line["streams"] for line in lines], map(str, streams))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the plot."""
    figure, grid = plt.subplots(
        1, len(PANELS), figsize=(4.6 * len(PANELS), 3.6), layout="constrained"
    )
    for axes, (title, up, where, divisor) in zip(grid, PANELS, strict=True):
        draw_panel(axes, document["generate"], where, divisor)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(up)
    model, machine = document["model"], document["machine"]
    on = machine["GPU"] if model["device"] == "cuda" else machine["processor"]
    figure.suptitle(
        f"{model['name']}, {model['engine']}, {model['dtype']}, {on}: {document['what']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Draw what the file holds, beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    given = parser.parse_args()
    path = given.json.with_suffix(".png")
    draw(json.loads(given.json.read_text()), path)
    print(path)


if __name__ == "__main__":
    main()
