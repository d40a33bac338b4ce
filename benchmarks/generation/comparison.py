"""Inplace beside vLLM on one machine, both through their servers.

    python -m benchmarks.generate --beside vllm --vllm-python /path/to/python \
        --models build/compare/models --engines build/compare/engines --out r.json

``--models`` has the Hugging Face folders that `benchmarks.generation.sources` writes, ``--engines``
what `inplace build` made of them with ``--serve stream``, under the same names. Inplace is measured
over gRPC on tritonserver and through its OpenAI front end, vLLM through its OpenAI server, which
needs no tokenizer. The servers run one after the other, on the first GPU of
``CUDA_VISIBLE_DEVICES``.

Cells: all streams begin at once, each generates ``--rounds`` times, as in `benchmarks.generate`.
Then a mixed load: prompts of different lengths arrive as a Poisson process, at shares of the
requests a second that vLLM reaches when all of them arrive at once.

Each result is written into ``--out`` when it is there, and what is there already is not measured
again: a run that ended early goes on. Two runs may write into one file: with two GPUs ``--sides
inplace`` on one and ``--sides vllm`` on the other. `benchmarks.generation.comparison_report` makes
the table and the plot.
"""

import argparse
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inplace.schema.served import Manifest
from inplace.server.settings import QUEUE
from inplace_builder.tools.front_process import FrontOptions, FrontProcess
from inplace_builder.tools.tritonserver import Ports, TritonServer

from benchmarks.generation.arrivals import Arrivals
from benchmarks.generation.burst import Burst
from benchmarks.generation.clients import Target
from benchmarks.generation.measured import (
    cpu_seconds,
    described,
    requests_per_second,
    run_arrivals,
    run_burst,
)
from benchmarks.generation.vllm_server import MODEL, VllmOptions, VllmServer, versions_of
from benchmarks.perf.served import served
from benchmarks.perf.server import Counters, engine_part
from benchmarks.record import facts

SIDES = ("vllm", "inplace")
WAYS = {"vllm": ("vllm",), "inplace": ("inplace", "inplace_openai")}
"""The results of each side."""

CELL_SECONDS, SERVER_SECONDS = 15.0, 45.0
"""Seconds that must be left to begin a cell, and a server."""


@dataclass(frozen=True)
class Cell:
    """A number of streams, the tokens of each prompt and of each generation."""

    prompt: int
    tokens: int
    streams: int


def _cells(prompt: int, tokens: int, *streams: int) -> tuple[Cell, ...]:
    return tuple(Cell(prompt, tokens, count) for count in streams)


CELLS = {
    "135m": _cells(128, 256, 1, 8, 32, 64),
    "1b": (*_cells(128, 256, 1, 8, 32, 64), *_cells(2048, 64, 1, 16)),
    "8b": _cells(128, 256, 1, 8, 64),
    "tiny": (*_cells(16, 24, 1, 8), *_cells(200, 8, 4)),
}
"""What is measured of each shape; ``tiny`` is there to try it."""


@dataclass(frozen=True)
class Mixed:
    """The mixed load: prompts from ``low`` to ``high`` tokens, and ``tokens`` new ones each."""

    low: int
    high: int
    tokens: int
    shares: tuple[float, ...] = (0.3, 0.6, 0.9)


MIXED = {"1b": Mixed(64, 4096, 128), "tiny": Mixed(16, 256, 16)}
"""The shapes with a mixed load."""


class Results:
    """The document of one or several runs, in a file."""

    def __init__(self, path: Path, head: dict[str, Any], note: str) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.changed() as document:
            if not document:
                document |= head
            document["runs"].append(
                {name: head[name] for name in ("command", "commit", "date")} | {"note": note}
            )

    @contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """The document, which is written afterwards; no other run writes it meanwhile."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            document = json.loads(self._path.read_text()) if self._path.exists() else {}
            yield document
            scratch = self._path.with_suffix(".new")
            scratch.write_text(json.dumps(document, indent=1) + "\n")
            scratch.replace(self._path)

    def read(self) -> dict[str, Any]:
        """The document as it is."""
        found: dict[str, Any] = json.loads(self._path.read_text())
        return found

    def has(self, place: str, key: dict[str, Any], way: str) -> bool:
        """Whether there is a result of this way."""
        return way in _line(self.read()[place], key)

    def add(self, place: str, key: dict[str, Any], way: str, result: dict[str, Any]) -> None:
        """Write a result, and print it."""
        with self.changed() as document:
            line = _line(document[place], key)
            if not line:
                document[place].append(line := dict(key))
            line[way] = result
        print(json.dumps(key | {way: result}), flush=True)


def _line(lines: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    """That of a key; an empty one if there is none."""
    return next((line for line in lines if key.items() <= line.items()), {})


@dataclass(frozen=True)
class Running:
    """The servers of a side that run.

    Attributes:
        targets: what is measured, by the name of its results.
        about: how it is served.
        around: called with the name of a result, a measurement and the tokens that it generates;
            returns what it measured, with what the servers say of it.
    """

    targets: dict[str, Target]
    about: dict[str, Any]
    around: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


class Comparison:
    """The measurements of a run."""

    def __init__(self, given: argparse.Namespace, results: Results) -> None:
        self._given, self._results = given, results
        self._deadline: float = time.monotonic() + given.limit

    def run(self) -> None:
        """Each side with each shape, as far as the time goes."""
        for side in self._given.sides.split(","):
            for shape in self._given.shapes.split(","):
                if not self._missing(side, shape):
                    continue
                if self._left() < SERVER_SECONDS:
                    print(f"no time is left for {side} with {shape}", flush=True)
                    continue
                try:
                    with self._serving(side, shape) as running:
                        self._measure(side, shape, running)
                except Exception as error:  # the others go on
                    print(f"{side} with {shape} failed: {error}", flush=True)
                    with self._results.changed() as document:
                        document["failed"].append(f"{side} with {shape}: {str(error)[-1500:]}")

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _missing(self, side: str, shape: str) -> bool:
        """Whether anything is not measured yet."""
        document = self._results.read()
        cells = [(cell_key(shape, cell), "cells") for cell in CELLS[shape]]
        mixed = [({"shape": shape, "share": share}, "mixed") for share in self._shares(shape)]
        return any(
            way not in _line(document[place], key)
            for key, place in cells + mixed
            for way in self._ways(side)
        )

    def _shares(self, shape: str) -> tuple[float, ...]:
        return MIXED[shape].shares if shape in MIXED and self._given.seconds else ()

    def _ways(self, side: str) -> tuple[str, ...]:
        return tuple(way for way in WAYS[side] if self._given.front or way != "inplace_openai")

    @contextmanager
    def _serving(self, side: str, shape: str) -> Iterator[Running]:
        begin = time.monotonic()
        with (self._vllm if side == "vllm" else self._inplace)(shape) as running:
            about = running.about | {"started_s": time.monotonic() - begin}
            with self._results.changed() as document:
                document["setups"].setdefault(side, {})[shape] = about
            yield running

    @contextmanager
    def _vllm(self, shape: str) -> Iterator[Running]:
        given = self._given
        manifest = Manifest.load(given.engines / shape / "1")
        assert manifest.capacity is not None
        options = VllmOptions(
            given.vllm_python,
            given.models / shape,
            manifest.capacity,
            manifest.slots,
            given.vllm_memory,
            given.vllm_caches,
            given.out.parent / f"vllm-{shape}.log",
            tuple(given.vllm_options.split()),
            min(240.0, self._left()),
        )
        with VllmServer(options) as server:
            target = Target("vllm", server.url, MODEL, vocabulary_of(manifest))
            about = {
                "versions": versions_of(given.vllm_python),
                "arguments": server.options.command(0)[6:],
                "gpu": gpu(),
            }
            yield Running({"vllm": target}, about, lambda _, measure: measure())

    @contextmanager
    def _inplace(self, shape: str) -> Iterator[Running]:
        model = self._given.engines / shape
        manifest = Manifest.load(model / "1")
        options = FrontOptions("127.0.0.1", Ports(0).resolve().grpc)
        workers = [f"--workers={self._given.front_workers}"]
        gpus = (0,) if manifest.device == "cuda" else ()
        with (
            served(model, manifest, "stream", gpus=gpus, settings={QUEUE: "4096"}) as server,
            FrontProcess(options, server.grpc_url, server.repository, workers) as front,
        ):
            vocabulary = vocabulary_of(manifest)
            targets = {
                "inplace": Target("grpc", server.grpc_url, manifest.name, vocabulary),
                "inplace_openai": Target(
                    "openai", f"127.0.0.1:{options.port}", manifest.name, vocabulary
                ),
            }

            def around(way: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
                if way == "inplace":
                    return with_engine(server, manifest.name, measure)
                return with_processor(front, measure)

            ways = {way: targets[way] for way in self._ways("inplace")}
            yield Running(ways, about_engine(manifest) | {"gpu": gpu()}, around)

    def _measure(self, side: str, shape: str, running: Running) -> None:
        """All cells, and the mixed load."""
        given = self._given
        for way, target in running.targets.items():
            run_burst(Burst(target, 1, 1, 16, 8, salt=f"lazy {way}"), 1)  # what is lazy
        for cell in CELLS[shape]:
            for way, target in running.targets.items():
                key = cell_key(shape, cell)
                if self._results.has("cells", key, way):
                    continue
                if self._left() < CELL_SECONDS:
                    print(f"no time is left for {way} with {key}", flush=True)
                    continue
                load = Burst(target, cell.streams, given.rounds, cell.prompt, cell.tokens)
                run_burst(replace(load, rounds=1, tokens=min(16, cell.tokens), salt="warm"), 8)

                def measure(load: Burst = load) -> dict[str, Any]:
                    return described(run_burst(load, given.clients))

                self._results.add("cells", key, way, running.around(way, measure))
        if self._shares(shape):
            for way, target in running.targets.items():
                self._mixed(side, shape, way, target, running)

    def _mixed(self, side: str, shape: str, way: str, target: Target, running: Running) -> None:
        """The saturation of a target, and its times below that of vLLM."""
        given, mixed = self._given, MIXED[shape]
        load = Arrivals(
            target, None, given.requests, (mixed.low, mixed.high), mixed.tokens, given.patience
        )
        if not self._results.has("saturation", {"shape": shape}, way):
            if self._left() < CELL_SECONDS:
                return
            generations = run_arrivals(load, given.clients)
            result = described(generations, load.end)
            result["requests_per_second"] = requests_per_second(generations)
            self._results.add("saturation", {"shape": shape}, way, result)
        reached = self._saturation(shape)
        for share in mixed.shares:
            key = {"shape": shape, "share": share}
            if reached is None or self._results.has("mixed", key, way):
                continue
            if self._left() < given.seconds + CELL_SECONDS:
                print(f"no time is left for {way} with {key}", flush=True)
                continue
            rate = reached * share
            part = replace(load, rate=rate, count=max(2, round(rate * given.seconds)))

            def measure(part: Arrivals = part) -> dict[str, Any]:
                return described(run_arrivals(part, given.clients), part.end)

            result = {"rate": rate, "requests": part.count} | running.around(way, measure)
            self._results.add("mixed", key, way, result)

    def _saturation(self, shape: str) -> float | None:
        """Requests a second of vLLM; another run may have to measure it first."""
        while True:
            line = _line(self._results.read()["saturation"], {"shape": shape})
            if "vllm" in line:
                return float(line["vllm"]["requests_per_second"])
            if self._left() < self._given.seconds + CELL_SECONDS:
                print(f"the saturation of vLLM with {shape} is not measured yet", flush=True)
                return None
            time.sleep(1.0)


def cell_key(shape: str, cell: Cell) -> dict[str, Any]:
    """What a line of the document is found by."""
    return {
        "shape": shape,
        "prompt": cell.prompt,
        "tokens": cell.tokens,
        "streams": cell.streams,
    }


def gpu() -> str:
    """The number of the GPU that is measured on."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def vocabulary_of(manifest: Manifest) -> int:
    """Of the token ids that a model takes."""
    limits = {spec.name: spec.maximum for spec in manifest.program("step").client_inputs}
    return (limits["input_ids"] or 0) + 1


def about_engine(manifest: Manifest) -> dict[str, Any]:
    """What an engine was built for."""
    step = manifest.program("step")
    return {
        "engine": step.engine.kind,
        "device": manifest.device,
        "dtype": str(step.engine.dtype),
        "slots": manifest.slots,
        "rows": step.max_rows,
        "capacity": manifest.capacity,
        "chunk": step.chunk,
        "step_tokens": step.max_tokens,
    }


def with_engine(
    server: TritonServer, model: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A measurement, and what the engine did meanwhile."""
    before = Counters.of(server, model)
    result = measure()
    spent = Counters.of(server, model) - before
    return result | engine_part(spent, result["seconds"])


def with_processor(front: FrontProcess, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement, and the processor time of the front end meanwhile for each token."""
    before = cpu_seconds(front.pid)
    result = measure()
    spent = cpu_seconds(front.pid) - before
    tokens = result["tokens_per_second"] * result["seconds"]
    return result | {"front_cpu_us_per_token": spent / max(1.0, tokens) * 1e6}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", choices=("vllm",), required=True)
    parser.add_argument(
        "--vllm-python", type=Path, required=True, help="interpreter of its environment"
    )
    parser.add_argument("--models", type=Path, default=Path("build/compare/models"))
    parser.add_argument("--engines", type=Path, default=Path("build/compare/engines"))
    parser.add_argument("--shapes", default="1b,135m,8b", help="in this order")
    parser.add_argument("--sides", default=",".join(SIDES), help="in this order")
    parser.add_argument(
        "--no-front", dest="front", action="store_false", help="without the OpenAI front end"
    )
    parser.add_argument(
        "--front-workers", type=int, default=4, help="processes of the OpenAI front end"
    )
    parser.add_argument("--rounds", type=int, default=2, help="generations of each stream")
    parser.add_argument(
        "--clients",
        type=int,
        default=max(1, min(8, (os.cpu_count() or 2) // 2)),
        help="processes of clients",
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of each mixed load; 0: without them"
    )
    parser.add_argument(
        "--requests", type=int, default=320, help="that arrive at once to find the saturation"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=20.0,
        help="seconds after which requests of a mixed load are given up",
    )
    parser.add_argument("--vllm-memory", type=float, default=0.5, help="share of GPU memory")
    parser.add_argument(
        "--vllm-caches",
        type=Path,
        default=Path("build/compare/vllm-caches"),
        help="folder for what vLLM compiles",
    )
    parser.add_argument("--vllm-options", default="", help="further arguments of vllm serve")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    what = (
        f"Inplace and vLLM through their servers; prompts of random tokens, greedy, {given.rounds} "
        "generations of each stream, all streams at once; a mixed load of prompts that arrive as "
        "a Poisson process"
    )
    head = facts(what, "python -m benchmarks.generate") | {
        "runs": [],
        "setups": {},
        "cells": [],
        "saturation": [],
        "mixed": [],
        "failed": [],
    }
    Comparison(given, Results(given.out, head, given.note)).run()
    print(f"written to {given.out}", flush=True)


if __name__ == "__main__":
    main()
