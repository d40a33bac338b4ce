"""Sequences and generations by a real tritonserver, under load.

    python -m benchmarks.perf unary    --model model_repository/my-model [--levels 1,2,4,8]
    python -m benchmarks.perf rate     --model model_repository/my-model [--levels 50,100]
    python -m benchmarks.perf stream   --model model_repository/my-model
    python -m benchmarks.perf generate --model model_repository/my-model
    python -m benchmarks.perf all      --source path/to/model

The load comes from perf_analyzer where it runs, and from a load generator on tritonclient
everywhere. ``unary``: one token a request, by live sequences. ``rate``: the same, by requests a
second. ``stream``: the same steps over gRPC streams. ``generate``: first-token and inter-token
time. ``all`` builds both models (`make perf`). Several modes may be named. The model is any built
decoder; one built for the other protocol is served with the configuration for this one.

``--instances 1,2,4`` measures steps with so many instances, each with an engine of its own, one
number after the other; ``--share-engine`` measures each number above 1 with one engine for all of
them too, and before. ``--nothing`` also sends the same steps to a model of Triton's own Python
backend that computes nothing: what a request costs before anything is done.

Writes one JSON of all levels; `benchmarks.perf.plots` draws it. Input files are in perf_analyzer's
format: one inner list is one sequence.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from inplace.schema.served import Manifest
from inplace_builder.tools.tritonserver import TritonServer

from benchmarks.perf import analyzer, generator
from benchmarks.perf.clients import Load
from benchmarks.perf.served import Serve, served
from benchmarks.perf.server import Counters, engine_steps
from benchmarks.record import facts

FOLDER = Path(__file__).parent
TOOLS: dict[str, Callable[[Load], dict[str, Any]]] = {
    "tritonclient": generator.run,
    "perf_analyzer": analyzer.run,
}
MODES = ("unary", "rate", "stream", "generate")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modes",
        nargs="+",
        choices=(*MODES, "all"),
        metavar="mode",
        help=f"some of {', '.join(MODES)}, or all",
    )
    parser.add_argument("--model", type=Path, help="a decoder in a model repository")
    parser.add_argument(
        "--source",
        type=Path,
        help="all: what to build both models of; SmolLM2-135M-Instruct unless given",
    )
    parser.add_argument(
        "--levels", help="live sequences, or requests a second for rate; separated by commas"
    )
    parser.add_argument("--sequences", type=int, default=8, help="rate: live sequences")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each level")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="generate: tokens of a generation"
    )
    parser.add_argument("--tool", choices=("tritonclient", "perf_analyzer"), help="only this one")
    parser.add_argument(
        "--instances",
        default="1",
        help="unary, stream: instances of the model; separated by commas",
    )
    parser.add_argument(
        "--share-engine",
        action="store_true",
        help="unary, stream: also several instances with one engine",
    )
    parser.add_argument(
        "--nothing", action="store_true", help="unary, stream: also a model that computes nothing"
    )
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds after which no level begins"
    )
    parser.add_argument("--input-data", type=Path, help="another input file")
    parser.add_argument("--out", type=Path, default=Path("build/perf/perf.json"))
    given = parser.parse_args()
    if (reason := analyzer.missing()) is not None:
        print(f"{reason}; only the load generator on tritonclient runs", flush=True)
    if (everything := "all" in given.modes) == (given.model is not None):
        parser.error(
            "all builds its models itself, without --model" if everything else "--model is missing"
        )
    what = (
        "one token a request (unary, rate, stream) or whole generations (generate), "
        "against tritonserver on this machine"
    )
    document = facts(what, "python -m benchmarks.perf") | {
        "perf_analyzer": reason or "runs",
        "levels": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    asked = (
        measure_all(given)
        if everything
        else chain.from_iterable(measure(given, mode, given.model) for mode in given.modes)
    )
    ends = time.monotonic() + given.limit
    for line in asked:
        print(json.dumps(line), flush=True)
        document["levels"].append(line)
        given.out.write_text(
            json.dumps(document, indent=1) + "\n"
        )  # each time: a run takes long and may be ended
        if time.monotonic() > ends:
            print(f"ended after {given.limit:.0f} s", flush=True)
            break
    print(f"written to {given.out}")


def measure(
    given: argparse.Namespace, mode: str, model: Path, levels: list[float] | None = None
) -> Iterator[dict[str, Any]]:
    """Serve the model in each way that is asked for, and drive every level with every tool."""
    manifest = Manifest.load(model / "1")
    if levels is None:
        asked = given.levels or ("20,40" if mode == "rate" else "1,2,4,8")
        levels = [float(level) for level in asked.split(",")]
    about = {
        "name": model.name,
        "engine": manifest.program("step").engine.kind,
        "device": manifest.device,
        "dtype": str(manifest.program("step").engine.dtype),
    }
    serve: Serve = "step" if mode in ("unary", "rate") else "stream"
    steps = mode in ("unary", "stream")
    alone: dict[float, float] = {}
    if steps:
        rows = [min(int(level), manifest.program("step").max_rows) for level in levels]
        alone = dict(zip(levels, engine_steps(model / "1", rows), strict=True))
    counts = [int(count) for count in given.instances.split(",")] if steps else [1]
    kinds = []
    for count in counts:
        if steps and given.share_engine and count > 1:
            kinds.append((count, True, False))
        kinds.append((count, False, False))
    if steps and given.nothing:
        kinds += [(count, False, True) for count in counts]
    for instances, shared, nothing in kinds:
        with served(
            model, manifest, serve, instances=instances, shared=shared, nothing=nothing
        ) as server:
            for level, tool in product(levels, tools(given)):
                load = loaded(given, mode, level, server.grpc_url, manifest.name)
                line = {
                    "mode": mode,
                    "level": level,
                    "tool": tool,
                    "model": about,
                    "sequences": load.sequences,
                }
                line |= ({"instances": instances} if steps else {}) | (
                    {"computes": "nothing"} if nothing else {}
                )
                line |= {"shared_engine": True} if shared else {}
                line |= driven(server, TOOLS[tool], load, 1 if shared else instances)
                if alone and not nothing:
                    line["engine_alone_us"] = alone[level]
                yield line


def tools(given: argparse.Namespace) -> list[str]:
    """By name, those that were asked for and run here."""
    return [
        name
        for name in TOOLS
        if given.tool in (None, name) and (name != "perf_analyzer" or analyzer.missing() is None)
    ]


def loaded(given: argparse.Namespace, mode: str, level: float, url: str, model: str) -> Load:
    """The load of one level."""
    return Load(
        url=url,
        model=model,
        mode="unary" if mode == "rate" else mode,  # type: ignore[arg-type]
        sequences=given.sequences if mode == "rate" else int(level),
        begin=0.0,
        seconds=given.seconds,
        input_data=str(
            given.input_data or FOLDER / ("generate.json" if mode == "generate" else "steps.json")
        ),
        rate=level if mode == "rate" else None,
        max_tokens=given.max_tokens,
    )


def driven(
    server: TritonServer, run: Callable[[Load], dict[str, Any]], load: Load, instances: int = 1
) -> dict[str, Any]:
    """One level by one tool, with where the time went, warm-up included."""
    generator.run(replace(load, seconds=0.5, warm_up=0.5, rate=None))
    before = Counters.of(server, load.model)
    try:
        result = run(load)
    except RuntimeError as error:
        return {"failed": str(error)}
    spent = Counters.of(server, load.model) - before
    if load.mode != "generate" and load.rate is None and result["requests_per_second"]:
        seconds = (
            spent.requests / result["requests_per_second"]
        )  # closed loop: as long as these requests take at that rate
        result |= spent.breakdown(seconds, instances)
        if load.mode == "unary":
            result["latency_parts_us"] = spent.latency(result["latency_us"]["mean"])
    return result


def measure_all(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Build a step and a stream model and measure all modes.

    Rates are shares of what the step model reached with all sequences.
    """
    from benchmarks.perf.models import built

    with tempfile.TemporaryDirectory() as scratch:
        step, stream = built(given.source, Path(scratch), given.sequences)
        reached = 0.0
        for line in measure(given, "unary", step):
            if "computes" not in line:
                reached = max(reached, line.get("requests_per_second", 0.0))
            yield line
        yield from measure(
            given, "rate", step, [round(reached * share, 1) for share in (0.25, 0.5, 0.75, 0.9)]
        )
        yield from measure(given, "stream", stream)
        yield from measure(given, "generate", stream)


if __name__ == "__main__":
    main()
