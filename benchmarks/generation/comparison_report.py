"""Tables and a plot of what ``python -m benchmarks.generate --beside vllm`` wrote.

``python -m benchmarks.generation.comparison_report gpu_compare.json`` prints the tables and writes
the plot beside the file; it needs matplotlib, but no server.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAYS = {
    "inplace": ("Inplace, gRPC", "#0b6e4f"),
    "inplace_openai": ("Inplace, OpenAI", "#6fb98f"),
    "vllm": ("vLLM", "#c8553d"),
}
NAMES = {"135m": "SmolLM2-135M", "1b": "Llama 1B", "8b": "Llama 8B", "tiny": "tiny"}
"""Of the shapes."""


def shown(value: float | None, digits: int = 0) -> str:
    """A number of a table; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def rate(line: dict[str, Any], way: str) -> float | None:
    """Tokens a second."""
    value: float | None = line.get(way, {}).get("tokens_per_second")
    return value


def milliseconds(line: dict[str, Any], way: str, what: str, level: str) -> float | None:
    """A percentile of ``first_token_us`` or ``inter_token_us``."""
    value = line.get(way, {}).get(what, {}).get(level)
    return None if value is None else float(value) / 1e3


def times(line: dict[str, Any], what: str, digits: int) -> str:
    """``p50 / p99`` of each way."""
    return " · ".join(
        " / ".join(shown(milliseconds(line, way, what, level), digits) for level in ("p50", "p99"))
        for way in WAYS
    )


def cells_table(document: dict[str, Any]) -> Iterator[str]:
    """A row a cell."""
    yield "| model, prompt + new | streams | tokens a second | first token | between tokens |"
    yield "|---|---|---|---|---|"
    for line in ordered(document["cells"]):
        yield (
            "| "
            + " | ".join(
                (
                    f"{NAMES[line['shape']]}, {line['prompt']} + {line['tokens']}",
                    str(line["streams"]),
                    " · ".join(shown(rate(line, way)) for way in WAYS),
                    times(line, "first_token_us", 0),
                    times(line, "inter_token_us", 1),
                )
            )
            + " |"
        )


def ordered(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By shape, prompt and streams."""
    shapes = list(NAMES)
    return sorted(
        lines, key=lambda line: (shapes.index(line["shape"]), line["prompt"], line["streams"])
    )


def mixed_table(document: dict[str, Any]) -> Iterator[str]:
    """A row a rate."""
    yield "| model, share of vLLM's saturation | requests a second | first token | between tokens |"
    yield "|---|---|---|---|"
    for line in sorted(document["mixed"], key=lambda line: (line["shape"], line["share"])):
        rates = [line[way]["rate"] for way in WAYS if way in line]
        yield (
            "| "
            + " | ".join(
                (
                    f"{NAMES[line['shape']]}, {line['share']:.0%}",
                    shown(rates[0], 1),
                    times(line, "first_token_us", 0),
                    times(line, "inter_token_us", 1),
                )
            )
            + " |"
        )


def behind(document: dict[str, Any], way: str) -> list[str]:
    """Where vLLM is ahead: in tokens a second, or in the p99 of a time under the mixed load."""
    found = []
    for line in ordered(document["cells"]):
        own, other = rate(line, way), rate(line, "vllm")
        if own is not None and other is not None and own < other:
            found.append(
                f"{NAMES[line['shape']]} {line['prompt']} + {line['tokens']}, "
                f"{line['streams']} streams: {own:,.0f} tokens a second, {other:,.0f}"
            )
    for line in document["mixed"]:
        for what in ("first_token_us", "inter_token_us"):
            own, other = (milliseconds(line, each, what, "p99") for each in (way, "vllm"))
            if own is not None and other is not None and own > other:
                found.append(
                    f"{NAMES[line['shape']]} at {line['share']:.0%}, {what} p99: "
                    f"{own:.1f} ms, {other:.1f}"
                )
    return found


def draw(document: dict[str, Any], path: Path) -> None:
    """Tokens a second of each model, and the times of the mixed load."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for line in ordered(document["cells"]):
        groups.setdefault((line["shape"], line["prompt"], line["tokens"]), []).append(line)
    loads = sorted(document["mixed"], key=lambda line: line["share"])
    panels = len(groups) + (2 if loads else 0)
    figure, grid = plt.subplots(
        2, max(1, (panels + 1) // 2), figsize=(4.2 * max(1, (panels + 1) // 2), 6.4),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    axes_left = list(grid.flat)
    for (shape, prompt, tokens), lines in groups.items():
        axes = axes_left.pop(0)
        for way, (label, colour) in WAYS.items():
            points = [(line["streams"], value) for line in lines if (value := rate(line, way))]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        axes.set_title(f"{NAMES[shape]}, {prompt} + {tokens}", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks([line["streams"] for line in lines], [line["streams"] for line in lines])
        axes.set_xlabel("streams at once")
        axes.set_ylabel("tokens a second")
        axes.set_ylim(bottom=0)
    for what, title in (("first_token_us", "first token"), ("inter_token_us", "between tokens")):
        if not loads:
            break
        axes = axes_left.pop(0)
        for way, (label, colour) in WAYS.items():
            for level, style in (("p50", "o-"), ("p99", "o--")):
                points = [
                    (line["share"] * 100, value)
                    for line in loads
                    if (value := milliseconds(line, way, what, level)) is not None
                ]
                if points:
                    name = f"{label}, {level}"
                    axes.plot(*zip(*points, strict=True), style, color=colour, label=name)
        axes.set_title(f"{NAMES[loads[0]['shape']]}, mixed load: {title}", fontsize=10)
        axes.set_xlabel("% of vLLM's saturation")
        axes.set_ylabel("ms")
        axes.set_yscale("log")
    for axes in grid.flat:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
        else:
            axes.set_axis_off()
    machine = document["machine"]
    figure.suptitle(
        f"{machine['GPU'] if machine['GPU'] != 'none' else machine['processor']}, bfloat16, "
        f"greedy, through the servers; commit {document['commit']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Print the tables and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    given = parser.parse_args()
    document = json.loads(given.json.read_text())
    columns = " · ".join(label for label, _ in WAYS.values())
    print(f"Each column: {columns}; times in milliseconds, p50 / p99.\n")
    print("\n".join(cells_table(document)) + "\n")
    print("\n".join(mixed_table(document)) + "\n")
    for way in ("inplace", "inplace_openai"):
        for line in behind(document, way):
            print(f"vLLM is ahead of {WAYS[way][0]}: {line}")
    path = given.json.with_suffix(".png")
    draw(document, path)
    print(path)


if __name__ == "__main__":
    main()
